"""The FastAPI service of the how-tos: its lifespan, its sessions, and what clients are answered.

It runs on the loop of each test, so that switches can make a database fail; `test_workers` runs it
under uvicorn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import ModuleType

import httpx
import pytest
from fastapi import Depends

from coordinator.testing import assert_atomic, lose_answer, refuse, unreachable
from tests.howto.serving import BALANCE, Shop, load


@pytest.fixture
def example(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The service, read anew for the databases of this test."""
    return load("fastapi_app", shop, monkeypatch)


@pytest.fixture
async def client(example: ModuleType) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(example.app)
    async with (
        example.app.router.lifespan_context(example.app),
        httpx.AsyncClient(transport=transport, base_url="http://shop") as client,
    ):
        yield client


async def post(
    client: httpx.AsyncClient, path: str, key: str, source: str, target: str, amount: int
) -> httpx.Response:
    return await client.post(
        path,
        json={"source": source, "target": target, "amount": amount},
        headers={"Idempotency-Key": key},
    )


async def test_a_session_of_a_dependency_takes_part(client: httpx.AsyncClient, shop: Shop) -> None:
    answers = await asyncio.gather(
        *(post(client, "/transfers", f"k{n}", f"a{n}", "bob", n) for n in range(8))
    )
    assert [(each.status_code, each.json()) for each in answers] == [
        (200, {"balance": BALANCE - n}) for n in range(8)
    ]
    assert shop.entries() == {f"k{n}": 1 for n in range(8)}


async def test_a_repeat_gets_the_first_answer(client: httpx.AsyncClient, shop: Shop) -> None:
    answers = [await post(client, "/transfers", "k", "a1", "bob", 30) for _ in range(2)]
    answers += await asyncio.gather(
        *(post(client, "/transfers", "k", "a1", "bob", 30) for _ in range(3))
    )
    assert {(each.status_code, each.text) for each in answers} == {(200, '{"balance":9970}')}
    assert shop.balance("a1") == BALANCE - 30 and shop.entries() == {"k": 1}
    missing = await client.post("/transfers", json={"source": "a1", "target": "b", "amount": 1})
    assert missing.status_code == 422


async def test_an_ordinary_endpoint_works_in_a_thread(
    client: httpx.AsyncClient, shop: Shop
) -> None:
    answers = await asyncio.gather(
        *(post(client, "/deposits", f"k{n}", "bob", f"a{n}", n) for n in range(8))
    )
    assert [each.status_code for each in answers] == [200] * 8
    repeated = await post(client, "/deposits", "k3", "bob", "a3", 3)
    assert repeated.status_code == 200 and repeated.json()["outcome"] == "committed"
    assert shop.balance("a3") == BALANCE + 3
    assert shop.entries() == {f"k{n}": 1 for n in range(8)}


async def test_an_exception_of_the_endpoint_rolls_back(
    client: httpx.AsyncClient, shop: Shop
) -> None:
    answer = await post(client, "/transfers", "k", "nobody", "bob", 1)
    assert (answer.status_code, answer.json()) == (404, {"detail": "no such account"})
    assert shop.entries() == {}
    answer = await post(client, "/transfers", "k", "a1", "bob", 1)
    assert answer.status_code == 200 and shop.entries() == {"k": 1}


async def test_what_is_worth_another_try_is_503(
    client: httpx.AsyncClient, example: ModuleType, shop: Shop
) -> None:
    with refuse(example.ledger, "too many locks", retryable=True, times=3):
        answer = await post(client, "/transfers", "k", "a1", "bob", 1)
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "1", answer.text
    with unreachable(example.coordinator):
        answer = await post(client, "/transfers", "k", "a1", "bob", 1)
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "1", answer.text
    again = await post(client, "/transfers", "k", "a1", "bob", 1)
    assert again.status_code == 200 and shop.entries() == {"k": 1}


async def test_a_session_can_be_enlisted_once_more(
    client: httpx.AsyncClient, example: ModuleType, shop: Shop
) -> None:
    stubborn = example.coordinator.transactional(timeout=5, attempts=2)
    example.app.post("/stubborn")(stubborn(example.transfer.__wrapped__))
    with refuse(example.ledger, "too many locks", retryable=True):
        answer = await post(client, "/stubborn", "k", "a1", "bob", 1)
    assert answer.status_code == 200, answer.text
    assert shop.balance("a1") == BALANCE - 1 and shop.entries() == {"k": 1}


async def test_what_is_not_worth_another_try_is_409(
    client: httpx.AsyncClient, example: ModuleType, shop: Shop
) -> None:
    with refuse(example.ledger, "a deferred constraint"):
        answer = await post(client, "/transfers", "k", "a1", "bob", 1)
    assert answer.status_code == 409 and "a deferred constraint" in answer.json()["error"]
    assert "Retry-After" not in answer.headers
    assert shop.balance("a1") == BALANCE and shop.entries() == {}


async def test_an_unknown_outcome_is_202_and_can_be_asked_for(
    client: httpx.AsyncClient, example: ModuleType, shop: Shop
) -> None:
    hurried = example.coordinator.transactional(
        timeout=0.5, idempotency_key=lambda key, **_: key, record_result=True
    )
    example.app.post("/hurried")(hurried(example.transfer.__wrapped__))
    with lose_answer(example.coordinator, "propose", times=100):
        answer = await post(client, "/hurried", "k", "a1", "bob", 1)
    assert answer.status_code == 202, answer.text
    where = answer.headers["Location"]
    assert where == f"/transactions/{answer.json()['transaction']}"
    while (told := await client.get(where)).json() == {"status": "undecided"}:
        await asyncio.sleep(0.01)
    assert told.json() == {"status": "committed"}
    repeated = await post(client, "/hurried", "k", "a1", "bob", 1)
    assert (repeated.status_code, repeated.json()) == (200, {"balance": BALANCE - 1})
    assert (await client.get("/transactions/nonsense")).status_code == 404
    await assert_atomic(example.coordinator)
    assert shop.entries() == {"k": 1}


async def test_a_transaction_in_a_dependency_ends_before_the_answer_only_in_scope_function(
    client: httpx.AsyncClient, example: ModuleType
) -> None:
    async def begun() -> AsyncIterator[None]:
        async with example.coordinator.transaction(timeout=5):
            yield

    async def endpoint() -> None:
        for participant in (example.accounts, example.ledger):
            conn = await participant.connection()
            await conn.execute("CREATE TABLE never (id int)")

    example.app.post("/in-time", dependencies=[Depends(begun, scope="function")])(endpoint)
    example.app.post("/too-late", dependencies=[Depends(begun)])(endpoint)
    with refuse(example.ledger):
        assert (await client.post("/in-time")).status_code == 409
    with refuse(example.ledger), pytest.raises(RuntimeError, match="response already started"):
        await client.post("/too-late")
