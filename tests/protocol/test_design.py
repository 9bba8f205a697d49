"""Each test pins a sentence of the design of the core; the docstring is the sentence."""

from __future__ import annotations

import pytest

from coordinator.errors import ProtocolError
from coordinator.events import (
    AbortRequested,
    Answered,
    AskLastResource,
    Commit,
    CommitOnePhase,
    CommitRequested,
    Decide,
    Decided,
    Enlisted,
    Event,
    Prepare,
    Published,
    RecordAnswer,
    Resolved,
    Rollback,
    Voted,
)
from coordinator.model import (
    ABORT,
    Branch,
    Claim,
    Outcome,
    Verdict,
    Vote,
    VoteKind,
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
    branch,
    commit,
    delegated,
    kinds,
    preparing,
    proposed,
    steps,
)

KEY = Claim("key", "order-7")


def test_an_abort_while_a_commit_is_proposed() -> None:
    """An AbortRequested while a commit proposal is out yields only Decide, never Rollback."""
    assert proposed(A).step(AbortRequested()) == [Decide(ABORT)]


def test_an_abort_is_proposed_once() -> None:
    """Decide means: propose until the log answers. A second wish adds nothing to the first."""
    transaction = proposed(A)
    steps(transaction, AbortRequested("first"))
    assert transaction.step(AbortRequested("second")) == []
    assert transaction.reason == "first"


def test_delegated_is_a_value_of_the_register() -> None:
    """The last resource is a third value of the register, never a note beside it."""
    transaction = preparing(A, K)
    steps(transaction, Voted(K.id, PREPARED))
    assert transaction.step(Voted(A.id, PREPARED)) == [Decide(delegated(A))]


def test_delegated_stands_before_the_last_resource_is_asked() -> None:
    """Delegated stands before EndTxn(commit) is sent."""
    assert proposed(A, K).step(Decided(delegated(A))) == [AskLastResource(K, commit=True)]


def test_the_answer_stands_before_others_are_touched() -> None:
    """The answer is written beside the record before any other branch is touched."""
    transaction = proposed(A, K)
    steps(transaction, Decided(delegated(A)))
    assert transaction.step(Answered(Verdict.COMMIT)) == [RecordAnswer(Verdict.COMMIT)]
    assert transaction.step(Resolved(Verdict.COMMIT)) == [Commit(A)]


def test_the_answer_that_stands_counts() -> None:
    """The first answer stands: everybody obeys what the log returns, not what they heard."""
    transaction = proposed(A, K)
    steps(transaction, Decided(delegated(A)), Answered(Verdict.ABORT))
    assert transaction.step(Resolved(Verdict.COMMIT)) == [Commit(A)]


def test_a_stranger_asks_the_last_resource_for_abort() -> None:
    """Once delegated stands everybody asks; only who proposed it asks for commit."""
    recovery = Transaction.in_doubt(ID, [A])
    steps(recovery, AbortRequested())
    assert recovery.step(Decided(delegated(A))) == [AskLastResource(K, commit=False)]


def test_a_last_resource_that_answered_is_not_rolled_back() -> None:
    """Where the answer would be erased, an id is not ended again: it has ended by its answer."""
    transaction = proposed(A, K)
    steps(transaction, Decided(delegated(A)), Answered(Verdict.ABORT, "fenced", retryable=True))
    assert transaction.step(Resolved(Verdict.ABORT)) == [Rollback(A)]
    assert (transaction.reason, transaction.retryable) == ("fenced", True)


def test_a_late_vote_of_the_last_resource_changes_nothing() -> None:
    """What may commit is never touched: the last resource's own commit was the decision."""
    transaction = preparing(A, K, handed=True)
    steps(transaction, Voted(A.id, PREPARED), AbortRequested(), Decided(delegated(A)))
    steps(transaction, Answered(Verdict.COMMIT), Resolved(Verdict.COMMIT))
    assert transaction.step(Voted(K.id, PREPARED)) == []


def test_a_read_only_branch_ends_after_the_decision() -> None:
    """A read-only branch takes no part in the record and is ended after the decision."""
    transaction = preparing(A, B)
    steps(transaction, Voted(B.id, READ_ONLY))
    assert transaction.step(Voted(A.id, PREPARED)) == [Decide(commit(A))]
    assert kinds(transaction.step(Decided(commit(A)))) == ["Commit A", "Commit B"]


def test_one_phase() -> None:
    """One phase for a single local branch that is not prepared, when the id never left."""
    transaction = Transaction(ID)
    steps(transaction, Enlisted(A, one_phase=True))
    assert transaction.step(CommitRequested()) == [CommitOnePhase(A)]
    with pytest.raises(ProtocolError):
        transaction.step(Published())
    assert transaction.step(Answered(Verdict.COMMIT)) == []
    assert (transaction.phase, transaction.outcome) == (Phase.ENDED, Outcome.COMMITTED)


@pytest.mark.parametrize(
    ("transaction", "before", "request_"),
    [
        (Transaction(ID), [Enlisted(A, one_phase=True), Published()], CommitRequested()),
        (Transaction(ID), [Published(), Enlisted(A, one_phase=True)], CommitRequested()),
        (Transaction(ID, private=False), [Enlisted(A, one_phase=True)], CommitRequested()),
        (Transaction(ID, claims=(KEY,)), [Enlisted(A, one_phase=True)], CommitRequested()),
        (Transaction(ID, handed=True), [Enlisted(A, one_phase=True)], CommitRequested()),
        (Transaction(ID), [Enlisted(A, one_phase=True)], CommitRequested(b"result")),
        (Transaction(ID), [Enlisted(A)], CommitRequested()),
        (
            Transaction(ID),
            [Enlisted(A, one_phase=True), Enlisted(B, one_phase=True)],
            CommitRequested(),
        ),
    ],
    ids=[
        "published",
        "published-first",
        "known",
        "claims",
        "handed",
        "attachment",
        "cannot",
        "two",
    ],
)
def test_in_every_other_case_the_commit_is_recorded(
    transaction: Transaction, before: list[Event], request_: CommitRequested
) -> None:
    """No header sent, nothing published, no idempotency key, no saga step, not Kafka."""
    steps(transaction, *before)
    assert all(isinstance(action, Prepare) for action in transaction.step(request_))


def test_a_remote_branch_is_no_one_phase_branch() -> None:
    """A sole writing branch that is remote is prepared already."""
    with pytest.raises(ProtocolError):
        Transaction(ID).step(Enlisted(A, PREPARED, one_phase=True))


def test_there_is_at_most_one_last_resource() -> None:
    """Its own commit is the decision, and there is one decision."""
    transaction = Transaction(ID)
    steps(transaction, Enlisted(K, last_resource=True))
    with pytest.raises(ProtocolError):
        transaction.step(Enlisted(branch("L"), last_resource=True))


def test_kafka_never_commits_in_one_phase() -> None:
    """Kafka never commits in one phase."""
    with pytest.raises(ProtocolError):
        Transaction(ID).step(Enlisted(K, one_phase=True, last_resource=True))


def test_a_commit_covers_exactly_what_it_names() -> None:
    """A prepared branch of a committed transaction that the record does not name is rolled back."""
    sweep = Transaction.in_doubt(ID, [B])
    steps(sweep, AbortRequested())
    assert kinds(sweep.step(Decided(commit(A), frozenset({A.id})))) == ["Rollback B"]


def test_the_record_carries_what_a_stranger_needs() -> None:
    """A commit names its branches with what each needs to be finished by a stranger."""
    transaction = preparing(A)
    with_token = Branch(A.xid, A.participant, b"xid8 7711")
    vote = Vote(VoteKind.PREPARED, token=b"xid8 7711")
    assert transaction.step(Voted(A.id, vote)) == [Decide(commit(with_token))]


def test_a_branch_of_another_transaction_is_refused() -> None:
    """I8: never touch a branch that is not ours."""
    stranger = branch("A", transaction=OTHER_ID)
    with pytest.raises(ProtocolError):
        Transaction(ID).step(Enlisted(stranger))
    with pytest.raises(ProtocolError):
        Transaction.in_doubt(ID, [stranger])
