"""A state of the search as a value, and what may be on its way in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from coordinator.events import CommitOnePhase
from coordinator.model import TransactionId, Vote, VoteKind

ABSENT, WORKING, CUT, READING, PREPARED, QUARANTINED, COMMITTED, ABORTED, LEFT = range(9)
"""A branch. CUT: its session's client is gone, and the server has not noticed. LEFT: only read."""
STATES = (
    "not begun",
    "working",
    "cut off",
    "reading",
    "prepared",
    "quarantined",
    "committed",
    "aborted",
    "left",
)

GONE, DONE, CALLS = -1, -2, -3
"""Instead of a core: crashed; nothing left to do; has not yet asked for the key."""

NOBODY = -1
"""The sender of what nobody waits for any more."""

YES = Vote(VoteKind.PREPARED, b"xid8")

NOT_TOLD, TOLD_COMMITTED, TOLD_ABORTED = range(3)


class Mail(NamedTuple):
    """A request on its way: an action of a core, a mark, or what a client asks for."""

    sender: int
    transaction: int
    what: Any


class State(NamedTuple):
    """Everything that the future depends on."""

    originals: tuple[int, ...]
    sweepers: tuple[int, ...]
    log: int
    branches: tuple[int, ...]
    mail: tuple[int, ...]
    told: tuple[int, ...]
    crashes: tuple[int, ...]
    faults: int
    requests: int
    """How often a called service was asked."""
    answered: int
    """The branch whose answer was enlisted, or -1."""
    late: bool
    """Longer than the retention has passed since the beginning."""
    meddled: bool


class Draft:
    """A state while it changes."""

    __slots__ = (
        "answered",
        "branches",
        "crashes",
        "faults",
        "late",
        "log",
        "mail",
        "meddled",
        "originals",
        "requests",
        "sweepers",
        "told",
    )

    def __init__(self, state: State) -> None:
        self.originals = list(state.originals)
        self.sweepers = list(state.sweepers)
        self.log = state.log
        self.branches = list(state.branches)
        self.mail = list(state.mail)
        self.told = list(state.told)
        self.crashes = list(state.crashes)
        self.faults = state.faults
        self.requests = state.requests
        self.answered = state.answered
        self.late = state.late
        self.meddled = state.meddled

    def twin(self) -> Draft:
        return Draft(self.frozen())

    def frozen(self) -> State:
        self.mail.sort()
        return State(
            tuple(self.originals),
            tuple(self.sweepers),
            self.log,
            tuple(self.branches),
            tuple(self.mail),
            tuple(self.told),
            tuple(self.crashes),
            self.faults,
            self.requests,
            self.answered,
            self.late,
            self.meddled,
        )


# What is asked for beside the actions of a core.


class Serve(msgspec.Struct, frozen=True):
    """A request to a called service: work, prepare, answer with the vote."""

    request: int


class Became(msgspec.Struct, frozen=True):
    """What became of a one-phase commit that was not answered?"""

    action: CommitOnePhase


class Settle(msgspec.Struct, frozen=True):
    """A further caller under a key wants an end of the former attempt."""

    former: TransactionId


class Name(msgspec.Struct, frozen=True):
    """It names its own attempt."""

    former: TransactionId


class ReadKey(msgspec.Struct, frozen=True):
    """After a refusal it reads who holds the key."""

    former: TransactionId


class Slow(msgspec.Struct, frozen=True):
    """An answer that is on its way, where the bounds keep answers apart from effects."""

    request: Any
    answer: Any
