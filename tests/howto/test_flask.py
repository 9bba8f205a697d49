"""The Flask service of the how-tos under gunicorn: threads, several workers, with and without fork.

Nothing is opened before the first request, in whichever process that is.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from werkzeug.test import TestResponse

from coordinator.testing import lose_answer, refuse, unreachable
from tests.howto.page import snippet
from tests.howto.serving import BALANCE, Server, Shop, command, load, serving, wait_until

BIND = "--bind=fd://{}"


def transfers(server: Server, count: int) -> None:
    """So many at a time, each from an account of its own."""
    with ThreadPoolExecutor(count) as threads:
        answers = threads.map(
            lambda n: server.post("/transfers", f"k{n}", source=f"a{n}", target="bob", amount=n),
            range(count),
        )
        for number, answer in enumerate(answers):
            assert answer.status_code == 200, answer.text
            assert answer.json() == {"balance": BALANCE - number}


def test_transfers_of_many_threads_and_workers(shop: Shop) -> None:
    with serving(shop, command("flask"), socket_option=BIND) as server:
        transfers(server, 8)
        repeated = server.post("/transfers", "k1", source="a1", target="bob", amount=1)
        assert repeated.status_code == 200 and repeated.json() == {"balance": BALANCE - 1}
        refused = server.post("/transfers", "k9", source="nobody", target="bob", amount=1)
        assert refused.status_code == 404
        assert server.post("/transfers", source="a1", target="bob", amount=1).status_code == 400
    assert shop.entries() == {f"k{n}": 1 for n in range(8)}


def test_outcomes_as_answers(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("flask_app", shop, monkeypatch)
    hurried = example.coordinator.transactional(timeout=0.5, idempotency_key=lambda key, **_: key)
    monkeypatch.setattr(example, "transfer", hurried(example.transfer.__wrapped__))
    order = {"source": "a1", "target": "bob", "amount": 1}
    client = example.app.test_client()

    def post() -> TestResponse:
        return client.post("/transfers", json=order, headers={"Idempotency-Key": "k"})

    with example.coordinator.blocking:
        with refuse(example.ledger, "too many locks", retryable=True):
            answer = post()
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        with unreachable(example.coordinator):
            answer = post()
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        with refuse(example.ledger, "a deferred constraint"):
            answer = post()
        assert (answer.status_code, answer.json) == (409, {"error": "a deferred constraint"})
        with lose_answer(example.coordinator, "propose", times=100):
            answer = post()
        assert answer.status_code == 202
        where = answer.headers["Location"]
        wait_until(lambda: client.get(where).json == {"status": "committed"}, "it stays unknown")
        assert client.get("/transactions/nonsense").status_code == 404
        wait_until(lambda: shop.entries() == {"k": 1}, "the commit never came")


def test_preload_forks_before_anything_is_open(shop: Shop) -> None:
    with serving(shop, command("preload"), socket_option=BIND) as server:
        transfers(server, 8)
    assert shop.entries() == {f"k{n}": 1 for n in range(8)}


OPENS_TOO_EARLY = """
from flask_app import app, coordinator

coordinator.blocking.open()
"""
USES_IT_FIRST = """
from flask_app import app, coordinator, transfer

with coordinator.blocking:
    transfer("at start", source="a0", target="bob", amount=0)
"""


def test_a_worker_whose_parent_has_it_open_is_told_so(shop: Shop) -> None:
    (shop.folder / "early.py").write_text(OPENS_TOO_EARLY)
    early = command("preload", "flask_app:app", "early:app")
    with serving(shop, early, socket_option=BIND, folder=shop.folder) as server:
        refused = server.post("/transfers", "k1", source="a1", target="bob", amount=1)
        assert refused.status_code == 500
        assert "the child process must open its own" in server.output()
    assert shop.entries() == {}


def test_a_parent_that_used_and_closed_it_leaves_it_to_post_fork(shop: Shop) -> None:
    (shop.folder / "early.py").write_text(USES_IT_FIRST)
    (shop.folder / "gunicorn.conf.py").write_text(snippet("gunicorn.conf.py"))
    early = command("preload", "flask_app:app", "early:app")
    with serving(shop, early, socket_option=BIND, folder=shop.folder) as server:
        transfers(server, 8)
    assert shop.entries() == {"at start": 1} | {f"k{n}": 1 for n in range(8)}
