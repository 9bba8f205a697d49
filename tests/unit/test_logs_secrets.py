"""What users work with is never logged, and nothing is made where nobody listens."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import pytest

from coordinator import Outcome, TransactionAborted
from coordinator.model import Vote, Xid
from coordinator.story import Story
from coordinator.testing import refuse
from tests.support.told import Records
from tests.support.witness import WitnessedShop


@pytest.fixture
def shop() -> WitnessedShop:
    return WitnessedShop()


async def test_nobody_reads_what_users_work_with(shop: WitnessedShop, records: Records) -> None:
    canary = "canary-4711"

    def fail(_: Outcome) -> None:
        raise ValueError(canary)

    @shop.coordinator.transactional(idempotency_key=lambda: "order-1", record_result=True)
    async def result() -> str:
        await shop.stock.put(canary, canary)
        return canary

    async def raising() -> None:
        async with shop.coordinator.transaction() as transaction:
            transaction.after_end(fail)
            await shop.stock.put("x", canary)
            raise ValueError(canary) from RuntimeError(canary)

    async def joined() -> None:
        async with shop.coordinator.transaction():
            with suppress(ValueError):
                async with shop.coordinator.transaction():
                    raise ValueError(canary)

    async def voting() -> None:
        with refuse(shop.ledger, canary):
            await shop.sell()

    async def silent() -> None:
        error = ConnectionError(canary)
        shop.ledger.prepare = failing(error)  # type: ignore[method-assign]
        await shop.sell()

    def failing(error: Exception) -> Any:
        async def prepare(xid: Xid) -> Vote:
            raise error

        return prepare

    async with shop.coordinator:
        assert await result() == canary == await result()
        for part in (raising, joined, voting, silent):
            with pytest.raises((ValueError, TransactionAborted)):
                await part()
    assert records.one("call-failed").error == "ValueError"
    assert records.one("call-failed").place.endswith(" fail")
    assert {"voted", "no-answer", "told"} <= {vars(each)["what"] for each in records.all}
    assert canary not in records.texts()


async def test_nothing_is_made_where_nobody_listens(
    shop: WitnessedShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(Story, "__init__", lambda self, *_: made.append(self))
    monkeypatch.setattr(logging.Logger, "makeRecord", lambda *_, **__: made.append(_))
    logger = logging.getLogger("syncpoint")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    logging.getLogger("syncpoint").manager._clear_cache()  # type: ignore[attr-defined]
    async with shop.coordinator:
        await shop.sell()
    assert made == []
