"""The table as a whole: total by absence, without dead rules, and safe from every state.

What must hold here holds in every state that `explore` has reached, by events that make sense and
by events that do not: whatever the ports do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest

from coordinator.errors import ProtocolError
from coordinator.events import (
    Action,
    Answered,
    AskLastResource,
    Commit,
    CommitOnePhase,
    CommitRequested,
    Decide,
    Decided,
    Event,
    Finished,
    Forget,
    Prepare,
    RecordAnswer,
    Report,
    Resolved,
    Rollback,
    Voted,
)
from coordinator.model import Outcome, Verdict
from coordinator.protocol import RULES, Phase, Transaction
from tests.protocol.explore import Step, steps
from tests.protocol.values import (
    ID,
    PREPARED,
    READ_ONLY,
    state_of,
)

EVENT_TYPES = get_args(Event)


def failing(wrong: Iterator[Step]) -> str:
    """The first steps that break a rule, for a message that can be read."""
    return "\n".join(str(step) for step, _ in zip(wrong, range(5), strict=False))


def test_the_exploration_is_not_trivial() -> None:
    taken = [step for step in steps() if step.actions is not None]
    assert len(steps()) > 30_000
    assert {step.before.phase for step in taken} == set(Phase)
    produced = {type(action) for step in taken for action in step.actions or ()}
    assert produced == set(get_args(Action))


@pytest.mark.parametrize("phase", Phase)
def test_a_pair_is_in_the_table_or_is_refused(phase: Phase) -> None:
    for event_type in EVENT_TYPES:
        if (phase, event_type) in RULES:
            continue
        tried = [s for s in steps() if s.before.phase is phase and type(s.event) is event_type]
        assert tried
        assert all(isinstance(step.error, ProtocolError) for step in tried)


def test_a_refused_event_changes_nothing() -> None:
    refused = [step for step in steps() if step.actions is None]
    assert refused
    wrong = (
        step
        for step in refused
        if not isinstance(step.error, ProtocolError)
        or state_of(step.before) != state_of(step.after)
    )
    assert not failing(wrong)


def test_every_rule_can_be_taken() -> None:
    taken = {(step.before.phase, type(step.event)) for step in steps() if step.actions is not None}
    assert set(RULES) - taken == set()


def test_a_decided_outcome_never_changes() -> None:
    wrong = (
        step
        for step in steps()
        if step.before.decided and step.after.outcome is not step.before.outcome
    )
    assert not failing(wrong)


def _permits_commit(step: Step) -> bool:
    """True where the event says that a commit stands, or nobody needs a record of it."""
    match step.event:
        case Decided(decision, _, answer):
            return Verdict.COMMIT in (decision.verdict, answer)
        case Resolved(verdict):
            return verdict is Verdict.COMMIT
        case Voted() | CommitRequested():
            written = [v for v in step.after._votes.values() if v.kind is PREPARED.kind]
            return step.before.private and not written
    return False


def test_no_commit_leaves_before_the_decision() -> None:
    def has_commit(step: Step) -> bool:
        return any(isinstance(action, Commit) for action in step.actions or ())

    assert any(has_commit(step) for step in steps())
    assert not failing(s for s in steps() if has_commit(s) and not _permits_commit(s))


def test_nothing_is_rolled_back_while_a_commit_is_proposed() -> None:
    waiting = (Phase.COMMIT_PROPOSED, Phase.DELEGATED, Phase.ANSWERED, Phase.ONE_PHASE)
    wrong = (
        step
        for step in steps()
        if step.after.phase in waiting
        and any(isinstance(action, Rollback) for action in step.actions or ())
    )
    assert not failing(wrong)


def test_a_named_branch_is_never_rolled_back_after_its_commit() -> None:
    wrong = (
        step
        for step in steps()
        if step.after.outcome is Outcome.COMMITTED
        for action in step.actions or ()
        if isinstance(action, Rollback) and action.branch.id in step.after._named
    )
    assert not failing(wrong)


def test_nothing_is_committed_after_an_abort() -> None:
    wrong = (
        step
        for step in steps()
        if step.after.outcome is not Outcome.COMMITTED
        and any(isinstance(action, Commit | Forget) for action in step.actions or ())
    )
    assert not failing(wrong)


def test_an_unknown_outcome_touches_nothing_that_may_be_prepared() -> None:
    wrong = (
        step
        for step in steps()
        if step.after.phase is Phase.UNKNOWN
        for action in step.actions or ()
        if not (
            isinstance(action, Rollback)
            and step.after._votes.get(action.branch.id) == READ_ONLY
            and not step.after._handed
        )
    )
    assert not failing(wrong)


@pytest.mark.parametrize(
    ("action_type", "event_types", "phases"),
    [
        (Prepare, {CommitRequested}, {Phase.PREPARING}),
        (CommitOnePhase, {CommitRequested}, {Phase.ONE_PHASE}),
        (AskLastResource, {Decided}, {Phase.DELEGATED}),
        (RecordAnswer, {Answered}, {Phase.ANSWERED}),
        (Forget, {Finished}, {Phase.COMMITTING, Phase.ENDED}),
        (Report, {Finished}, {Phase.COMMITTING, Phase.ROLLING_BACK, Phase.ENDED}),
    ],
)
def test_an_action_has_one_origin(
    action_type: type, event_types: set[type], phases: set[Phase]
) -> None:
    origins = [
        (type(step.event), step.after.phase)
        for step in steps()
        if any(isinstance(action, action_type) for action in step.actions or ())
    ]
    assert {event for event, _ in origins} == event_types
    assert {phase for _, phase in origins} <= phases


def test_only_what_is_private_commits_in_one_phase() -> None:
    wrong = (
        step
        for step in steps()
        if any(isinstance(action, CommitOnePhase) for action in step.actions or ())
        and (
            not step.before.private
            or len(step.before.branches) != 1
            or step.before.has_last_resource
            or step.event != CommitRequested()
        )
    )
    assert not failing(wrong)


def test_a_delegation_is_proposed_never_assumed() -> None:
    wrong = (
        step
        for step in steps()
        for action in step.actions or ()
        if isinstance(action, AskLastResource)
        and (not isinstance(step.event, Decided) or step.event.decision.last_resource is None)
    )
    assert not failing(wrong)


def test_commit_and_delegation_are_proposed_once() -> None:
    wrong = (
        step
        for step in steps()
        for action in step.actions or ()
        if isinstance(action, Decide)
        and action.decision.verdict is not Verdict.ABORT
        and step.before._commit_proposed
    )
    assert not failing(wrong)


def test_ended_means_decided_and_nothing_left() -> None:
    wrong = (
        step
        for step in steps()
        if (step.after.phase is Phase.ENDED) and (not step.after.decided or step.after._unended)
    )
    assert not failing(wrong)


def test_what_is_shown_fits_a_log_line() -> None:
    assert repr(Transaction(ID)) == f"<Transaction {ID} active 0/0 voted, 0 to end>"
