"""What happened to a transaction is told again from its log records alone, and is the truth.

Each scenario runs on participants in memory that keep what they were asked and what they answered.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from coordinator import HeuristicOutcome, OutcomeUnknown, Status, TransactionAborted
from coordinator.model import Branch, Ending, EndingKind
from coordinator.testing import assert_atomic, crash_at, lose_answer, unreachable
from tests.support.told import Records
from tests.support.witness import WitnessedShop


@pytest.fixture
def shop() -> WitnessedShop:
    return WitnessedShop()


def levels(records: Records, transaction: str) -> dict[str, int]:
    """What was said above DEBUG, each word with its level."""
    loud = [each for each in records.of(transaction) if each.levelno > logging.DEBUG]
    return {each.what: each.levelno for each in loud}


async def test_a_commit(shop: WitnessedShop, records: Records) -> None:
    async with shop.coordinator:
        await shop.sell()
        assert await shop.verdict() == "commit"
    told = records.told(shop.id)
    heard = ("committed", None)
    assert told == shop.truth(["commit"], [("commit", True)], "committed", heard)
    assert told.votes == {"stock": "prepared", "ledger": "prepared"}
    assert told.ended == {"stock": "finished", "ledger": "finished"}
    assert records.whats(shop.id)[:5] == [
        "begun", "published", "enlisted", "enlisted", "commit-requested",
    ]  # fmt: skip
    assert levels(records, shop.id) == {}
    branches = {
        each.participant: each.branch for each in records.of(shop.id) if each.what == "enlisted"
    }
    for record in records.of(shop.id):
        if hasattr(record, "branch"):
            assert record.branch == branches[record.participant]


async def test_a_synchronous_commit(shop: WitnessedShop, records: Records) -> None:
    def sell() -> None:
        with shop.coordinator.blocking.transaction(timeout=5) as transaction:
            shop.id = transaction.id
            shop.stock.blocking.put("sold", 1)

    async with shop.coordinator:
        await asyncio.to_thread(sell)
    heard = ("committed", None)
    assert records.told(shop.id) == shop.truth(["commit"], [("commit", True)], "committed", heard)


async def test_a_commit_in_one_phase_has_no_record_in_the_log(
    shop: WitnessedShop, records: Records
) -> None:
    async with shop.coordinator, shop.coordinator.transaction(timeout=5):
        await shop.stock.put("sold", 1)
    (shop.id,) = records.transactions()
    assert records.told(shop.id) == shop.truth([], [], "committed", ("committed", None))
    assert records.one("asked").verb == "commit in one phase"
    assert records.one("answered").verdict == "commit"


async def test_an_abort_by_a_vote(shop: WitnessedShop, records: Records) -> None:
    shop.ledger.refuses = True
    async with shop.coordinator:
        with pytest.raises(TransactionAborted, match="refused"):
            await shop.sell()
        assert await shop.verdict() is None
    heard = ("aborted", "TransactionAborted")
    told = records.told(shop.id)
    assert told == shop.truth([], [], "aborted", heard)
    assert told.votes["ledger"] == "aborted" and told.ended["stock"] == "finished"
    assert [e.retryable for e in records.of(shop.id) if getattr(e, "vote", "") == "aborted"] == [
        True
    ]


async def test_what_the_body_raised(shop: WitnessedShop, records: Records) -> None:
    async with shop.coordinator:
        with pytest.raises(ZeroDivisionError):
            async with shop.coordinator.transaction() as transaction:
                shop.id = transaction.id
                await shop.stock.put("sold", 1)
                raise ZeroDivisionError("mine")
    heard = ("aborted", "ZeroDivisionError")
    assert records.told(shop.id) == shop.truth([], [], "aborted", heard)
    assert records.one("abort-requested").reason == "the body raised ZeroDivisionError"


async def test_a_doomed_transaction(shop: WitnessedShop, records: Records) -> None:
    async with shop.coordinator:
        with pytest.raises(TransactionAborted):
            async with shop.coordinator.transaction() as transaction:
                shop.id = transaction.id
                transaction.abort("enough")
    assert records.told(shop.id) == shop.truth([], [], "aborted", ("aborted", "TransactionAborted"))
    assert records.one("abort-requested").reason == "it is doomed by TransactionAborted"


async def test_a_deadline(shop: WitnessedShop, records: Records) -> None:
    async with shop.coordinator:
        with pytest.raises(TransactionAborted, match="deadline"):
            await shop.sell(timeout=0.05, work=5)
    assert records.told(shop.id) == shop.truth([], [], "aborted", ("aborted", "TransactionAborted"))
    assert levels(records, shop.id) == {"abort-requested": logging.INFO}
    assert records.one("abort-requested").reason == "the deadline of 0.05 s passed"
    assert records.one("begun").seconds == 0.05


async def test_a_deadline_of_a_thread(shop: WitnessedShop, records: Records) -> None:
    def sell() -> None:
        with shop.coordinator.blocking.transaction(timeout=0.05) as transaction:
            shop.id = transaction.id
            while not transaction.expired:
                pass

    async with shop.coordinator:
        with pytest.raises(TransactionAborted, match="deadline"):
            await asyncio.to_thread(sell)
    assert levels(records, shop.id) == {"abort-requested": logging.INFO}


async def test_a_cancelled_caller(shop: WitnessedShop, records: Records) -> None:
    async with shop.coordinator:
        with unreachable(shop.ledger):
            caller = asyncio.create_task(shop.sell())
            while "voted" not in records.whats(shop.id):
                await asyncio.sleep(0.001)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
        await assert_atomic(shop.coordinator)
    assert records.told(shop.id).heard == ("aborted", "CancelledError")


async def test_a_retry_behind_a_lost_answer_of_the_log(
    shop: WitnessedShop, records: Records
) -> None:
    async with shop.coordinator:
        with lose_answer(shop.coordinator, "propose"):
            await shop.sell()
    heard = ("committed", None)
    assert records.told(shop.id) == shop.truth(["commit"], [("commit", True)], "committed", heard)
    assert levels(records, shop.id) == {"retry": logging.WARNING}
    retry = records.one("retry", shop.id)
    assert (retry.asked, retry.attempt) == ("the log", 1) and "lost" in retry.error


async def test_retries_of_a_branch_are_warnings_now_and_then(
    shop: WitnessedShop, records: Records
) -> None:
    async with shop.coordinator:
        with lose_answer(shop.ledger, "commit", times=11):
            await shop.sell()
    retries = [each for each in records.of(shop.id) if each.what == "retry"]
    loud = [each.attempt for each in retries if each.levelno == logging.WARNING]
    assert ([each.attempt for each in retries], loud) == (list(range(1, 12)), [1, 10])
    assert {each.asked for each in retries} == {"ledger"}
    assert records.told(shop.id).ended == {"stock": "finished", "ledger": "finished"}


async def test_a_participant_that_does_not_answer_prepare(
    shop: WitnessedShop, records: Records
) -> None:
    async with shop.coordinator:
        with lose_answer(shop.ledger, "prepare"), pytest.raises(TransactionAborted):
            await shop.sell()
    told = records.told(shop.id)
    assert told.votes["ledger"] == "aborted" and told.heard == ("aborted", "TransactionAborted")
    silence = records.one("no-answer")
    assert (silence.participant, silence.error) == ("ledger", "AnswerLost")
    assert silence.place.endswith(" lost")
    assert levels(records, shop.id) == {"no-answer": logging.WARNING}


async def test_an_abort_that_somebody_else_recorded(shop: WitnessedShop, records: Records) -> None:
    async with shop.coordinator:
        with pytest.raises(TransactionAborted, match="somebody else"):
            async with shop.coordinator.transaction() as transaction:
                shop.id = transaction.id
                await shop.stock.put("sold", 1)
                assert await shop.coordinator.abort(shop.id) is Status.ABORTED
    heard = ("aborted", "TransactionAborted")
    assert records.told(shop.id) == shop.truth(["commit"], [("abort", False)], "aborted", heard)
    assert levels(records, shop.id) == {"abort-asked": logging.INFO}
    assert records.one("abort-asked").status is Status.ABORTED


async def test_a_silent_log(
    shop: WitnessedShop, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.transactional.GRACE_SECONDS", 0.05)
    async with shop.coordinator:
        with unreachable(shop.coordinator), pytest.raises(OutcomeUnknown):
            await shop.sell(timeout=0.05)
        await assert_atomic(shop.coordinator)
        stands = await shop.verdict()
    told = records.told(shop.id)
    assert told.heard == ("unknown", "OutcomeUnknown")
    assert told.proposed == ["commit", "abort"]
    assert set(told.decided) == {(stands, True)}, "whichever of our proposals came first"
    found = levels(records, shop.id)
    assert (found["told"], found["abort-requested"]) == (logging.WARNING, logging.INFO)


@pytest.mark.parametrize(
    ("point", "before", "after", "outcome"),
    [
        ("decide:before", [], ["abort"], "aborted"),
        ("decide:after", [], ["commit"], "committed"),
        ("commit:before", ["commit"], ["commit"], "committed"),
    ],
)
async def test_a_recovery_after_a_crash(
    point: str,
    before: list[str],
    after: list[str],
    outcome: str,
    shop: WitnessedShop,
    records: Records,
) -> None:
    await shop.coordinator.open(sweep=False)
    async with crash_at(shop.coordinator, point):
        await shop.sell()
    crashed = records.told(shop.id)
    assert crashed.votes == {"stock": "prepared", "ledger": "prepared"}
    assert crashed.decided == [(verdict, True) for verdict in before]
    assert (crashed.ended, crashed.outcome) == ({}, None)
    records.all.clear()

    await assert_atomic(shop.coordinator)
    told = records.told(shop.id)
    assert told.ended == {"stock": "finished", "ledger": "finished"}
    assert told.ended == shop.truth([], [], None, None).ended
    assert told.proposed == ["abort"] and told.heard is None
    assert [verdict for verdict, _ in told.decided] == after
    assert [ours for _, ours in told.decided] == [after == ["abort"]]
    seen, driven = records.one("seen", shop.id), records.one("driven", shop.id)
    assert seen.participants == ["ledger", "stock"]
    assert seen.verdict == (None if after == ["abort"] else "commit")
    assert driven.reason == "its owner is dead"
    assert (records.one("recovered", shop.id).outcome, told.outcome) == (outcome, outcome)
    assert levels(records, shop.id) == {"recovered": logging.INFO}


async def test_a_heuristic_outcome(shop: WitnessedShop, records: Records) -> None:
    await shop.coordinator.open(sweep=False)
    async with crash_at(shop.coordinator, "commit:before"):
        await shop.sell()
    records.all.clear()
    shop.ledger.store.prepared.clear()  # somebody rolled it back
    async with shop.coordinator:
        while "recovered" not in records.whats(shop.id):
            await asyncio.sleep(0.01)
    told = records.told(shop.id)
    assert told.decided == [("commit", False)]
    assert told.ended == shop.truth([], [], None, None).ended
    assert told.ended == {"stock": "finished", "ledger": "heuristic rollback"}
    error = records.one("heuristic")
    assert (error.participant, error.ending) == ("ledger", "heuristic rollback")
    assert "holds no branch" in error.evidence
    expected = {"heuristic": logging.ERROR, "recovered": logging.INFO}
    assert levels(records, shop.id) == expected


async def test_a_heuristic_outcome_that_the_caller_hears(
    shop: WitnessedShop, records: Records
) -> None:
    shop.ledger.ending = Ending(EndingKind.HEURISTIC_HAZARD, "nobody knows")
    async with shop.coordinator:
        with pytest.raises(HeuristicOutcome):
            await shop.sell()
    told = records.told(shop.id)
    assert told.heard == ("committed", "HeuristicOutcome")
    assert told.ended == {"stock": "finished", "ledger": "heuristic hazard"}
    assert levels(records, shop.id) == {"heuristic": logging.ERROR}


async def test_a_participant_with_a_bug(shop: WitnessedShop, records: Records) -> None:
    async def lies(branch: Branch) -> Any:
        raise RuntimeError("a row of the user")

    shop.stock.commit_one_phase = lies  # type: ignore[method-assign]
    async with shop.coordinator:
        with pytest.raises(OutcomeUnknown):
            async with shop.coordinator.transaction(timeout=0.05):
                await shop.stock.put("sold", 1)
        broken = records.one("broken")
        assert broken.levelno == logging.CRITICAL and broken.error == "RuntimeError"
        assert broken.place.endswith(" lies")
    assert "a row of the user" not in records.texts()
