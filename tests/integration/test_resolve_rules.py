"""What `syncpoint resolve` and `forget` refuse, and in which order they act; the log in memory."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from coordinator.commands import forget, resolve
from coordinator.coordinator import Coordinator
from coordinator.engine import now_ms
from coordinator.errors import TransactionError
from coordinator.log.base import Incident, Log, Proposal, Word
from coordinator.model import (
    ABORT,
    Branch,
    BranchId,
    Decision,
    Ending,
    EndingKind,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    Xid,
    id_floor,
)
from tests.unit.scripted import Scripted

T = TypeVar("T")
DEAD = MemberId("d" * 16)
_numbers = itertools.count(1)


class Place:
    """A log with one participant, whose branches the test makes and whose answers it orders."""

    def __init__(self) -> None:
        self.stock = Scripted("stock")
        self.log_url = f"memory:resolve-{next(_numbers)}"
        self.coordinator = self.coordinator_of(self.stock)
        self.log_id, self.newest = self.with_log(self._identity)

    def coordinator_of(self, *participants: Scripted) -> Coordinator:
        return Coordinator(self.log_url, cluster="test", participants=participants)

    async def _identity(self, log: Log) -> tuple[LogId, TransactionId]:
        identity = await log.open()
        return identity.id, id_floor(identity.created_ms + 1)

    def with_log(self, work: Callable[[Log], Awaitable[T]]) -> T:
        async def opened() -> T:
            async with self.coordinator:
                return await work(self.coordinator.engine().log)

        return asyncio.run(opened())

    def branch(self, *, old: bool = False) -> Branch:
        """One of a dead member; `old` is below the horizon."""
        transaction = id_floor(now_ms() - 3_600_000) if old else self.newest
        number = BranchId(f"{next(_numbers):016x}")
        return Branch(Xid(self.log_id, DEAD, transaction, number), "stock")

    def quarantined(self, *, kind: EndingKind | None = None, held: bool = True) -> Branch:
        branch = self.branch(old=True)
        if held:
            self.stock.prepared[str(branch.xid)] = branch
        incident = Incident(str(branch.xid), "stock", kind, "as the test says", now_ms())
        self.with_log(lambda log: log.report(incident))
        return branch

    def record(self, branch: Branch, decision: Decision) -> None:
        self.with_log(lambda log: log.propose(Proposal(branch.xid.transaction, decision)))

    def words(self) -> list[Word]:
        return list(self.with_log(lambda log: log.words()))

    def incidents(self) -> list[Incident]:
        return list(self.with_log(lambda log: log.incidents()))

    def resolve(self, branch: Branch, verb: str, *, dry_run: bool = False) -> int:
        named = None if verb == "abort" else branch.id
        order = resolve.read_order(branch.xid.transaction, verb, named, "why", dry_run=dry_run)
        return resolve.run(self.coordinator, order, as_json=False)

    def forget(self, branch: Branch) -> int:
        return forget.run(self.coordinator, branch.xid.transaction, "mended", as_json=False)


@pytest.fixture
def place() -> Place:
    return Place()


@pytest.mark.parametrize("verb", ["commit", "rollback"])
def test_the_word_is_recorded_before_the_branch_is_touched(place: Place, verb: str) -> None:
    branch = place.quarantined()
    place.stock.failures[verb] = 1
    with pytest.raises(TransactionError, match="the word is recorded: run the same command again"):
        place.resolve(branch, verb)
    assert [word.subject for word in place.words()] == [str(branch.xid)]
    assert len(place.incidents()) == 1 and place.stock.prepared


def test_the_same_word_may_be_given_again_and_no_other(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    branch = place.quarantined()
    place.stock.failures["commit"] = 1
    with pytest.raises(TransactionError):
        place.resolve(branch, "commit")
    for dry_run in (True, False):
        assert place.resolve(branch, "rollback", dry_run=dry_run) == 4
        errors = capsys.readouterr().err
        assert "another word stands already" in errors and ": why; " in errors
    assert "rollback" not in place.stock.calls
    assert place.resolve(branch, "commit") == 0
    assert place.incidents() == [] and not place.stock.prepared
    assert [word.verdict for word in place.words()] == [Verdict.COMMIT]


def test_a_word_that_others_give_at_the_same_moment_is_obeyed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the words and our own word."""
    branch = place.quarantined()
    other = Word(str(branch.xid), Verdict.ABORT, "other", "bob@host", now_ms())

    async def not_yet(*_: Any) -> str:
        await place.coordinator.engine().log.give_word(other)
        return ""

    monkeypatch.setattr(resolve, "_other_words", not_yet)
    assert place.resolve(branch, "commit") == 4
    assert place.words() == [other] and "commit" not in place.stock.calls


@pytest.mark.parametrize(
    ("stands", "verb", "code"),
    [
        (Verdict.COMMIT, "commit", 0),
        (Verdict.COMMIT, "rollback", 4),
        (Verdict.ABORT, "rollback", 0),
        (Verdict.ABORT, "commit", 4),
        (Verdict.DELEGATED, "commit", 4),
        (Verdict.DELEGATED, "rollback", 4),
        (None, "rollback", 0),
        (None, "commit", 4),
    ],
)
def test_a_record_is_never_contradicted(
    place: Place, stands: Verdict | None, verb: str, code: int
) -> None:
    """None: a commit stands, and does not name the branch."""
    branch = place.branch()
    place.stock.prepared[str(branch.xid)] = branch
    decision = {
        Verdict.COMMIT: Decision(Verdict.COMMIT, (branch,)),
        Verdict.ABORT: ABORT,
        Verdict.DELEGATED: Decision(Verdict.DELEGATED, (branch,), place.branch()),
        None: Decision(Verdict.COMMIT, (place.branch(),)),
    }[stands]
    place.record(branch, decision)
    incident = Incident(str(branch.xid), "stock", None, "before the log was restored", now_ms())
    place.with_log(lambda log: log.report(incident))
    place.stock.calls.clear()
    assert place.resolve(branch, verb) == code
    assert (verb in place.stock.calls) == (code == 0) == bool(place.words())


def test_only_a_quarantined_branch_is_ended_by_a_word(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = place.branch(old=True)
    place.stock.prepared[str(prepared.xid)] = prepared
    ended = place.quarantined(kind=EndingKind.HEURISTIC_HAZARD)
    for branch, said in ((prepared, "is not quarantined"), (ended, "syncpoint forget")):
        assert place.resolve(branch, "rollback") == 4
        assert said in capsys.readouterr().err
    assert "rollback" not in place.stock.calls and place.words() == []


def test_how_it_ended_is_told_with_its_evidence(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    branch = place.quarantined()
    place.stock.endings["commit"] = Ending(EndingKind.HEURISTIC_ROLLBACK, "somebody was faster")
    assert place.resolve(branch, "commit") == 0
    assert "ended otherwise: heuristic rollback (somebody was faster)" in capsys.readouterr().out
    assert place.incidents() == []


def test_a_participant_that_is_not_configured_is_named(place: Place) -> None:
    branch = place.quarantined()
    place.coordinator = place.coordinator_of()
    with pytest.raises(TransactionError, match="stock is not configured here; nothing was rec"):
        place.resolve(branch, "commit")
    assert place.words() == []
    assert place.forget(branch) == 4, "it may still be prepared there"
    assert place.words() == [] and len(place.incidents()) == 1


def test_abort_of_what_is_delegated_says_so(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    branch, last = place.branch(), place.branch()
    place.record(branch, Decision(Verdict.DELEGATED, (branch,), last))
    assert place.resolve(branch, "abort") == 4
    assert "delegated to its last resource, stock" in capsys.readouterr().err
    transaction = branch.xid.transaction
    place.with_log(lambda log: log.record_answer(transaction, Verdict.ABORT))
    place.stock.prepared[str(branch.xid)] = branch
    assert place.resolve(branch, "abort") == 0
    assert not place.stock.prepared and place.words() == []


def test_a_branch_that_cannot_be_rolled_back_now_is_left_to_the_sweep(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    branch = place.branch()
    place.stock.prepared[str(branch.xid)] = branch
    place.stock.failures["rollback"] = 1
    assert place.resolve(branch, "abort") == 3
    output, errors = capsys.readouterr()
    assert "abort stands; to be rolled back in stock" in output
    assert "the sweep of a service tries again" in errors and errors.count("\n") == 1


def test_a_commit_that_comes_before_the_abort_is_obeyed(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    branch = place.branch()
    commit = Proposal(branch.xid.transaction, Decision(Verdict.COMMIT, (branch,)))
    propose = resolve._propose_abort

    async def too_late(log: Log, transaction: TransactionId) -> Any:
        await log.propose(commit)
        return await propose(log, transaction)

    monkeypatch.setattr(resolve, "_propose_abort", too_late)
    assert place.resolve(branch, "abort") == 4
    assert "a commit stands for" in capsys.readouterr().err
    assert "rollback" not in place.stock.calls


def test_json_tells_a_refusal_too(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    branch = place.quarantined(held=False)
    order = resolve.read_order(branch.xid.transaction, "commit", branch.id, "why")
    assert resolve.run(place.coordinator, order, as_json=True) == 4
    told = json.loads(capsys.readouterr().out)
    assert (told["exit_code"], told["asked"], told["said"]) == (4, "commit", "")
    assert "is not prepared in stock any more" in told["refused"]
