"""Each test pins a sentence of the design on what the log says; the docstring is the sentence."""

from __future__ import annotations

import pytest

from coordinator.errors import ProtocolError
from coordinator.events import (
    AbortRequested,
    Answered,
    ClaimStands,
    Commit,
    CommitRequested,
    Decide,
    Decided,
    Enlisted,
    Event,
    Finished,
    Forget,
    Refused,
    Report,
    Resolved,
    Rollback,
    Voted,
)
from coordinator.model import (
    ABORT,
    Claim,
    Decision,
    Ending,
    EndingKind,
    Outcome,
    Verdict,
)
from coordinator.protocol import Phase, Transaction
from tests.protocol.values import (
    ID,
    OTHER_ID,
    PREPARED,
    READ_ONLY,
    A,
    B,
    K,
    commit,
    delegated,
    kinds,
    preparing,
    proposed,
    steps,
)

KEY = Claim("key", "order-7")


def test_absent_is_not_permission() -> None:
    """Recovery must record abort, then obey whatever stands."""
    recovery = Transaction.in_doubt(ID, [A])
    with pytest.raises(ProtocolError):
        recovery.step(Finished(A.id))
    assert recovery.step(AbortRequested()) == [Decide(ABORT)]
    assert recovery.outcome is None


def test_refused_is_not_abort() -> None:
    """Everybody else says unknown and touches nothing."""
    for transaction in (proposed(A), Transaction.in_doubt(ID, [A])):
        steps(transaction, AbortRequested())
        assert transaction.step(Refused()) == []
        assert (transaction.phase, transaction.outcome) == (Phase.UNKNOWN, Outcome.UNKNOWN)


def test_handed_votes_make_refused_unknown() -> None:
    """Only who never proposed commit and never handed the votes on says aborted."""
    transaction = preparing(A, handed=True)
    assert transaction.step(AbortRequested()) == [Decide(ABORT)]
    assert transaction.step(Refused()) == []
    assert transaction.outcome is Outcome.UNKNOWN


def test_an_own_session_that_only_read_ends_also_when_unknown() -> None:
    """What may be prepared is left alone; what wrote nothing has no reason to stay open."""
    transaction = preparing(A, B)
    steps(transaction, Voted(A.id, PREPARED), Voted(B.id, READ_ONLY))
    assert transaction.step(Refused()) == [Rollback(B)]
    assert transaction.step(Finished(B.id)) == []
    assert transaction.phase is Phase.UNKNOWN
    assert kinds(transaction.step(Decided(commit(A)))) == ["Commit A"]


def test_an_unknown_outcome_touches_nothing_of_handed_branches() -> None:
    """Everybody else says unknown and touches nothing: another daemon may be committing them."""
    transaction = Transaction(ID, handed=True)
    steps(transaction, Enlisted(A, PREPARED), Enlisted(B, READ_ONLY), CommitRequested())
    assert transaction.step(Refused()) == []


def test_an_unknown_outcome_touches_nothing_that_recovery_found() -> None:
    """Who recovers has prepared nothing itself: somebody else may be committing it."""
    transaction = Transaction.in_doubt(ID, [A])
    steps(transaction, AbortRequested(), Voted(A.id, READ_ONLY))
    assert transaction.step(Refused()) == []


def test_an_abort_needs_no_record() -> None:
    """An abort needs no record as long as no commit was proposed and no votes were handed on."""
    transaction = preparing(A)
    assert transaction.step(AbortRequested()) == [Rollback(A)]
    assert transaction.outcome is Outcome.ABORTED


def test_an_unrecorded_abort_is_not_followed_by_a_commit() -> None:
    """Nobody can commit then, so a commit that stands nevertheless is a bug and is refused."""
    for standing in (commit(A), delegated(A)):
        transaction = preparing(A)
        steps(transaction, AbortRequested())
        with pytest.raises(ProtocolError):
            transaction.step(Decided(standing))


def test_an_abort_under_a_key_is_recorded() -> None:
    """The next attempt starts only when the former's abort stands recorded."""
    transaction = Transaction(ID, claims=(KEY,))
    steps(transaction, Enlisted(A))
    assert Decide(ABORT) in transaction.step(AbortRequested())


def test_a_claim_that_stands_refuses_the_commit() -> None:
    """A proposal is refused when a claim stands; it is not thereby aborted."""
    transaction = Transaction(ID, claims=(KEY,))
    assert steps(transaction, Enlisted(A), CommitRequested(), Voted(A.id, PREPARED)) == [
        Decide(commit(A), (KEY,))
    ]
    assert transaction.step(ClaimStands(KEY, OTHER_ID)) == [Decide(ABORT)]
    assert transaction.outcome is None


def test_ones_own_claim_is_not_somebody_elses() -> None:
    """A claim that names us says that we committed: abort is not proposed on top of that."""
    transaction = Transaction(ID, claims=(KEY,))
    steps(transaction, Enlisted(A), CommitRequested(), Voted(A.id, PREPARED))
    with pytest.raises(ProtocolError):
        transaction.step(ClaimStands(KEY, ID))


def test_an_attachment_is_decided_with_the_outcome() -> None:
    """An attachment is a few bytes that must be decided together with the outcome."""
    transaction = Transaction(ID)
    steps(transaction, Enlisted(A, one_phase=True), CommitRequested(b"result"))
    assert transaction.step(Voted(A.id, PREPARED)) == [Decide(commit(A), (), b"result")]


# How branches end, and what the caller is told.


def test_a_prepare_that_lands_after_its_rollback() -> None:
    """A PREPARE that lands after its ROLLBACK leaves a branch that must be rolled back again."""
    transaction = preparing(A)
    steps(transaction, AbortRequested(), Finished(A.id))
    assert transaction.phase is Phase.ENDED
    assert transaction.step(Voted(A.id, PREPARED)) == [Rollback(A)]
    steps(transaction, Finished(A.id))
    assert transaction.phase is Phase.ENDED


def test_the_end_waits_for_the_second_rollback() -> None:
    """Ended means that nothing is left: the answer to a rollback that came too early is not it."""
    transaction = preparing(A)
    steps(transaction, AbortRequested(), Voted(A.id, PREPARED))
    phases = []
    for _ in range(2):
        steps(transaction, Finished(A.id))
        phases.append(transaction.phase)
    assert phases == [Phase.ROLLING_BACK, Phase.ENDED]


def test_a_branch_seen_prepared_is_ended_though_marked() -> None:
    """I7: no orphan branch, also after its database came back from a backup."""
    recovery = Transaction.in_doubt(ID, [A])
    steps(recovery, AbortRequested())
    assert recovery.step(Decided(commit(A), frozenset({A.id}))) == [Commit(A)]


def test_only_named_branches_are_marked() -> None:
    """I9: a commit record is deleted only when every named branch has acknowledged."""
    transaction = preparing(A, B)
    steps(transaction, Voted(A.id, PREPARED), Voted(B.id, READ_ONLY), Decided(commit(A)))
    assert transaction.step(Finished(B.id)) == []
    assert transaction.step(Finished(A.id)) == [Forget(A.id)]


def test_a_heuristic_ending_never_counts_as_acknowledged() -> None:
    """What cannot end safely is shown to a person with the evidence."""
    transaction = proposed(A)
    steps(transaction, Decided(commit(A)))
    ending = Ending(EndingKind.HEURISTIC_ROLLBACK, "pg_xact_status says aborted")
    assert transaction.step(Finished(A.id, ending)) == [Report(A, ending)]
    assert transaction.heuristic == ((A, ending),)
    assert (transaction.phase, transaction.outcome) == (Phase.ENDED, Outcome.COMMITTED)


def test_an_aborted_transaction_has_a_reason() -> None:
    """Errors say what to do next: an abort by somebody else says so, and may be run again."""
    transaction = proposed(A)
    steps(transaction, Decided(ABORT))
    assert transaction.reason
    assert transaction.retryable


def test_a_commit_has_no_reason_to_give() -> None:
    """An abort that was wanted and came too late leaves nothing behind in a commit."""
    transaction = proposed(A)
    steps(transaction, AbortRequested("the deadline", retryable=True), Decided(commit(A)))
    assert (transaction.reason, transaction.retryable) == ("", False)


@pytest.mark.parametrize("verdict_of", [Answered, Resolved])
def test_a_last_resource_answers_commit_or_abort(verdict_of: type) -> None:
    """The register holds one of three values, an answer one of two."""
    transaction = proposed(A, K)
    steps(transaction, Decided(delegated(A)))
    if verdict_of is Resolved:
        steps(transaction, Answered(Verdict.COMMIT))
    with pytest.raises(ProtocolError):
        transaction.step(verdict_of(Verdict.DELEGATED))


def test_an_answer_beside_the_record_is_taken_at_once() -> None:
    """Any replica may drive any transaction: what another one has resolved need not be asked."""
    transaction = proposed(A, K)
    steps(transaction, AbortRequested(), Decided(delegated(A)))
    assert transaction.step(Decided(delegated(A), answer=Verdict.COMMIT)) == [Commit(A)]
    assert transaction.step(Answered(Verdict.COMMIT)) == []


def test_an_answer_that_contradicts_the_outcome_is_refused() -> None:
    """I3: the register changes once, and its answer once."""
    transaction = proposed(A, K)
    steps(transaction, Decided(delegated(A)), Answered(Verdict.COMMIT), Resolved(Verdict.COMMIT))
    contradictions: list[Event] = [
        Decided(delegated(A), answer=Verdict.ABORT),
        Answered(Verdict.ABORT),
        Resolved(Verdict.ABORT),
        Decided(Decision(Verdict.COMMIT, (A,))),
    ]
    for event in contradictions:
        with pytest.raises(ProtocolError):
            transaction.step(event)
