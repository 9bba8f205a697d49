"""Every state of the core that events can lead to, and every event tried in it.

Breadth first from each kind of beginning, with events that make sense and events that do not. The
result is computed once and read by `test_rules` and by the generated `docs/protocol.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from coordinator.events import (
    AbortRequested,
    Action,
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
from coordinator.model import ABORT, Claim, Ending, EndingKind, Verdict
from coordinator.protocol import Transaction
from tests.protocol.values import (
    ABORTED,
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
    state_of,
)

KEY = Claim("key", "order-7")
STRANGER = branch("stranger")
DEPTH = 8
STATES_MAX = 1_500


def _starts() -> list[Transaction]:
    return [
        Transaction(ID),
        Transaction(ID, claims=(KEY,)),
        Transaction(ID, handed=True),
        Transaction.in_doubt(ID, [A]),
        Transaction.in_doubt(ID, []),
    ]


EVENTS: tuple[Event, ...] = (
    Enlisted(A, one_phase=True),
    Enlisted(B, PREPARED),
    Enlisted(K, last_resource=True),
    Enlisted(K, one_phase=True, last_resource=True),
    Enlisted(branch("A", transaction=OTHER_ID)),
    Published(),
    CommitRequested(),
    CommitRequested(b"result"),
    AbortRequested("wanted", retryable=True),
    *(Voted(A.id, vote) for vote in (PREPARED, READ_ONLY, ABORTED)),
    Voted(B.id, READ_ONLY),
    *(Voted(K.id, vote) for vote in (PREPARED, ABORTED)),
    Voted(STRANGER.id, PREPARED),
    Decided(ABORT),
    Decided(commit(A, B)),
    Decided(commit(A), ended=frozenset({A.id})),
    Decided(delegated(A)),
    Decided(delegated(A), answer=Verdict.COMMIT),
    Decided(delegated(A), answer=Verdict.ABORT),
    Decided(delegated(A), answer=Verdict.DELEGATED),
    Refused(),
    ClaimStands(KEY, OTHER_ID),
    ClaimStands(KEY, ID),
    ClaimStands(Claim("key", "never claimed"), OTHER_ID),
    *(Answered(verdict) for verdict in Verdict),
    *(Resolved(verdict) for verdict in Verdict),
    *(Finished(each.id) for each in (A, B, K, STRANGER)),
    Finished(A.id, Ending(EndingKind.HEURISTIC_ROLLBACK, "seen")),
)


@dataclass
class Step:
    """One event in one state: what it was before, and what came of it."""

    before: Transaction
    event: Event
    after: Transaction
    actions: list[Action] | None  # None: refused
    error: BaseException | None = None

    def __str__(self) -> str:
        return f"{self.before!r} on {self.event!r} -> {self.after!r}: {self.actions or self.error}"


def _copy(transaction: Transaction) -> Transaction:
    twin = Transaction.__new__(Transaction)
    for slot, value in state_of(transaction).items():
        setattr(twin, slot, value)
    return twin


def _fingerprint(transaction: Transaction) -> str:
    """The state without what nothing depends on."""
    state = state_of(transaction)
    for told in ("reason", "retryable", "_heuristic", "_attachment"):
        del state[told]
    return repr(state)


def _explore() -> Iterator[Step]:
    frontier = _starts()
    seen = {_fingerprint(start) for start in frontier}
    for _ in range(DEPTH):
        reached = []
        for before in frontier:
            for event in EVENTS:
                step = _take(before, event)
                yield step
                if step.actions is None:
                    continue
                fingerprint = _fingerprint(step.after)
                if fingerprint not in seen and len(seen) < STATES_MAX:
                    seen.add(fingerprint)
                    reached.append(step.after)
        frontier = reached


def _take(before: Transaction, event: Event) -> Step:
    after = _copy(before)
    try:
        return Step(before, event, after, after.step(event))
    except Exception as error:
        return Step(before, event, after, None, error)


@cache
def steps() -> tuple[Step, ...]:
    return tuple(_explore())
