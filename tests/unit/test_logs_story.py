"""The story of the protocol core: rarer events, and that telling never changes what is done."""

from __future__ import annotations

import logging
import random
from functools import partial

import pytest

from coordinator import OutcomeUnknown
from coordinator.errors import ProtocolError
from coordinator.events import (
    AbortRequested,
    Answered,
    ClaimStands,
    CommitRequested,
    Decided,
    Enlisted,
    Event,
    Finished,
    Published,
    Refused,
    Resolved,
    Voted,
)
from coordinator.model import (
    ABORT,
    Branch,
    BranchId,
    Claim,
    Decision,
    Ending,
    EndingKind,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    Vote,
    VoteKind,
    Xid,
)
from coordinator.protocol import Phase, Transaction
from coordinator.story import FullStory, Story
from tests.support.told import Records

ID = TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11")
OTHER = TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a12")
KEY = Claim("key", "order-1")
PREPARED = Vote(VoteKind.PREPARED)


def branch(digit: str, name: str) -> Branch:
    return Branch(Xid(LogId("c" * 16), MemberId("d" * 16), ID, BranchId(digit * 16)), name)


A, B = branch("a", "stock"), branch("b", "broker")
DELEGATED = Decision(Verdict.DELEGATED, (A,), B)


def tell(story: FullStory, *events: Event) -> None:
    for event in events:
        story.step(event)


def test_a_last_resource(records: Records) -> None:
    story = FullStory(Transaction(ID), 5.0, ())
    tell(story, Enlisted(A), Enlisted(B, last_resource=True), CommitRequested())
    tell(story, Voted(A.id, PREPARED), Voted(B.id, PREPARED), Decided(DELEGATED))
    tell(story, Answered(Verdict.COMMIT), Resolved(Verdict.COMMIT), Finished(A.id))
    asked = [(each.participant, each.verb) for each in records.of(ID) if each.what == "asked"]
    assert asked == [
        ("stock", "prepare"), ("broker", "prepare"), ("broker", "commit and decide"),
        ("stock", "commit"),
    ]  # fmt: skip
    assert records.whats(ID)[8:] == [
        "proposed", "decided", "asked", "answered", "recording-answer", "resolved", "asked",
        "finished", "ended",
    ]  # fmt: skip
    for what in ("answered", "recording-answer", "resolved"):
        assert records.one(what).verdict is Verdict.COMMIT
    assert records.told(ID).decided == [("delegated", True)]


def test_a_key_that_another_transaction_has(records: Records) -> None:
    story = FullStory(Transaction(ID, claims=(KEY,)), 5.0, (KEY,))
    tell(story, Enlisted(A), CommitRequested(), Voted(A.id, PREPARED), ClaimStands(KEY, OTHER))
    held = records.one("claim-held")
    assert (held.key, held.holder) == ("order-1", OTHER)
    tell(story, Decided(ABORT))
    assert records.told(ID).decided == [("abort", False)]
    assert records.of(ID)[-1].verb == "roll back"


def test_an_abort_behind_a_lost_answer_may_be_ours(records: Records) -> None:
    story = FullStory(Transaction(ID), 5.0, ())
    tell(story, Enlisted(A), CommitRequested(), Voted(A.id, PREPARED), AbortRequested("late"))
    story.failed("the log", 1, ConnectionError("lost"))
    tell(story, Decided(ABORT))
    assert records.told(ID).decided == [("abort", None)]
    story.ours = True
    tell(story, Decided(ABORT))
    assert records.told(ID).decided[-1] == ("abort", True)


def test_an_unknown_outcome_is_a_warning_also_where_no_story_is_told(records: Records) -> None:
    story = Story(Transaction(ID))
    story.told(None)
    story.told(ValueError())
    story.told(OutcomeUnknown("silence", transaction_id=ID))
    told = records.one("told")
    assert (told.levelno, told.outcome, told.phase) == (logging.WARNING, "unknown", "active")


def test_telling_changes_nothing_and_never_fails(records: Records) -> None:
    heuristic = Ending(EndingKind.HEURISTIC_HAZARD, "nobody knows")
    votes = (PREPARED, Vote(VoteKind.READ_ONLY), Vote(VoteKind.ABORTED, reason="no"))
    decisions = (ABORT, DELEGATED, Decision(Verdict.COMMIT, (A, B)), Decision(Verdict.COMMIT, (A,)))
    events: list[Event] = [
        Enlisted(A, one_phase=True), Enlisted(A), Enlisted(B, last_resource=True), Enlisted(B),
        Enlisted(B, vote=PREPARED), Published(), CommitRequested(), AbortRequested("enough"),
        Refused(), ClaimStands(KEY, OTHER),
        *(Voted(each.id, vote) for each in (A, B) for vote in votes),
        *(Decided(each) for each in decisions),
        *(kind(verdict) for kind in (Answered, Resolved) for verdict in Verdict),
        *(Finished(each.id, ending) for each in (A, B) for ending in (heuristic, Ending())),
    ]  # fmt: skip
    phases = set()
    for seed in range(400):
        chance = random.Random(seed)
        claims = chance.choice([(), (KEY,)])
        make = chance.choice([partial(Transaction, ID, claims=claims), in_doubt])
        silent, core = make(), make()
        story = FullStory(core, 5.0, claims)
        for _ in range(40):
            event = chance.choice(events)
            try:
                actions = silent.step(event)
            except ProtocolError:
                with pytest.raises(ProtocolError):
                    story.step(event)
                continue
            assert story.step(event) == actions, f"seed {seed}"
            phases.add(core.phase)
    assert phases == set(Phase) - {Phase.IN_DOUBT}
    assert {"answered", "claim-held", "refused", "finished"} <= set(records.whats(ID))


def in_doubt() -> Transaction:
    return Transaction.in_doubt(ID, [A])
