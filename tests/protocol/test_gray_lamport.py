"""Each test pins a sentence of Gray & Lamport, "Consensus on Transaction Commit".

The docstring is the sentence. Where the paper speaks of a resource manager, we say participant or
branch; its transaction manager is the coordinator together with the log.
"""

from __future__ import annotations

import pytest

from coordinator.errors import ProtocolError
from coordinator.events import (
    AbortRequested,
    CommitRequested,
    Decide,
    Decided,
    Enlisted,
    Event,
    Finished,
    Prepare,
    Voted,
)
from coordinator.model import (
    ABORT,
    Outcome,
)
from coordinator.protocol import Phase, Transaction
from tests.protocol.values import (
    ABORTED,
    ID,
    PREPARED,
    A,
    B,
    commit,
    kinds,
    preparing,
    proposed,
    steps,
)

# The paper, section 2: transaction commit.


def test_stability() -> None:
    """Once an RM has entered the committed or aborted state, it remains in that state forever."""
    committed = proposed(A)
    steps(committed, Decided(commit(A)))
    with pytest.raises(ProtocolError):
        committed.step(Decided(ABORT))
    assert committed.outcome is Outcome.COMMITTED


def test_consistency() -> None:
    """It is impossible for one RM to be in the committed state and another in the aborted state."""
    original, recovery = proposed(A, B), Transaction.in_doubt(ID, [A, B])
    steps(recovery, AbortRequested())
    assert kinds(original.step(Decided(commit(A, B)))) == ["Commit A", "Commit B"]
    assert kinds(recovery.step(Decided(commit(A, B)))) == ["Commit A", "Commit B"]


def test_an_rm_may_abort_while_working() -> None:
    """[RMChooseToAbort] An RM can spontaneously decide to abort while it is working."""
    transaction = preparing(A, B)
    assert kinds(transaction.step(Voted(A.id, ABORTED))) == ["Rollback A", "Rollback B"]
    assert (transaction.outcome, transaction.reason) == (Outcome.ABORTED, "duplicate key")


def test_commit_needs_all() -> None:
    """The transaction can commit only if all RMs are in the prepared (or committed) state."""
    transaction = preparing(A, B)
    assert transaction.step(Voted(A.id, PREPARED)) == []
    assert transaction.phase is Phase.PREPARING
    assert transaction.step(Voted(B.id, PREPARED)) == [Decide(commit(A, B))]


# The paper, section 3: two-phase commit.


def test_the_tm_asks_all_the_others() -> None:
    """The TM sends a Prepare message to every RM; they are sent in parallel."""
    transaction = Transaction(ID)
    assert steps(transaction, Enlisted(A), Enlisted(B), CommitRequested()) == [
        Prepare(A),
        Prepare(B),
    ]


def test_the_tm_may_abort_before_it_commits() -> None:
    """The TM can abort as long as it has not decided to commit. [TMAbort]"""
    transaction = preparing(A, B)
    steps(transaction, Voted(A.id, PREPARED))
    assert kinds(transaction.step(AbortRequested("timeout"))) == ["Rollback A", "Rollback B"]


def test_an_rm_may_vote_unasked() -> None:
    """An RM may enter the prepared state and send its Prepared message before it is asked to."""
    transaction = Transaction(ID)
    steps(transaction, Enlisted(A, PREPARED), Enlisted(B, PREPARED))
    assert transaction.step(CommitRequested()) == [Decide(commit(A, B))]


def test_messages_may_be_received_twice() -> None:
    """Receiving the same message twice has no effect: a message once sent may be received again."""
    transaction = preparing(A, B)
    vote = Voted(A.id, PREPARED)
    assert steps(transaction, vote, vote) == []
    steps(transaction, Voted(B.id, PREPARED), Decided(commit(A, B)))
    repeated: list[Event] = [Decided(commit(A, B)), vote, Finished(A.id)]
    steps(transaction, Finished(A.id))
    assert [transaction.step(event) for event in repeated] == [[], [], []]


# The paper, section 4: Paxos Commit, whose register is our log.


def test_the_decision_is_what_the_log_chose() -> None:
    """The decision to commit is made when the consensus has chosen it, not when a leader wishes."""
    transaction = proposed(A, B)
    assert transaction.outcome is None
    assert kinds(transaction.step(Decided(ABORT))) == ["Rollback A", "Rollback B"]


def test_several_leaders_are_safe() -> None:
    """Several processes may believe to be the leader; safety never rests on there being one."""
    leaders = [proposed(A, B), Transaction.in_doubt(ID, [A]), Transaction.in_doubt(ID, [B])]
    for recovering in leaders[1:]:
        assert recovering.step(AbortRequested()) == [Decide(ABORT)]
    for leader in leaders:
        steps(leader, Decided(ABORT))
    assert {leader.outcome for leader in leaders} == {Outcome.ABORTED}


def test_a_new_leader_proposes_abort() -> None:
    """A leader that does not know what was chosen proposes aborted, and learns what stands."""
    recovery = Transaction.in_doubt(ID, [A])
    assert recovery.step(AbortRequested()) == [Decide(ABORT)]
    assert recovery.outcome is None
    assert kinds(recovery.step(Decided(commit(A, B)))) == ["Commit A", "Commit B"]
