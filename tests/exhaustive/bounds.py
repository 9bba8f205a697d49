"""What may happen in one search: its processes and branches, and how many faults of each kind."""

from __future__ import annotations

from typing import Any, NamedTuple

from coordinator.log.register import Register
from coordinator.model import Branch, BranchId, Claim, LogId, MemberId, TransactionId, Xid
from coordinator.protocol import Transaction
from coordinator.sweep import clear_mark, horizon_candidate

IDS = (
    TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11"),
    TransactionId("0199f3c2-7a11-7cc2-98a4-6c1c2f5d8a12"),
)
OTHER_ID = TransactionId("0199f3c2-7a0f-7cc2-98a4-6c1c2f5d8a10")
KEY = Claim("key", "order-7")
OUR_LOG, OTHER_LOG = LogId("10" * 8), LogId("30" * 8)

# Times in milliseconds; only their relations matter.
CREATED_MS = 0x0199F3C27A10 - 600_000
YOUNG_MS = 0x0199F3C27A10 + 1_000
OLD_MS = YOUNG_MS + 3_600_000
RETENTION_MS = 600_000
ABSENCE_LIMIT_MS = 1_000_000_000


class Place(NamedTuple):
    """A branch of the search: whose it is, where, and how it takes part.

    `kind`: local, one phase (local, may commit without preparing), remote (a called service
    prepares it), handed (prepared before its coordinators are asked), or last resource.
    """

    name: str
    kind: str = "local"
    transaction: int = 0
    resource: str = ""

    @property
    def branch(self) -> Branch:
        digits = self.name.encode().hex().rjust(16, "0")[-16:]
        xid = Xid(OUR_LOG, MemberId("20" * 8), IDS[self.transaction], BranchId(digits))
        return Branch(xid, self.resource or self.name)


class Bounds(NamedTuple):
    """One search. `drives` says for each original coordinator which transaction it drives.

    `faults`: how many messages may be lost or doubled. `crashes`: how often each original may
    crash, and `sweep_crashes` each process that sweeps.
    `rules`: the horizon rises as the sweep lets it, no delay is longer than the retention, and so
    nothing may be quarantined; without it the horizon rises at any moment whatever.
    `reads`: a branch may find that it only read.
    `meddles`: the id is known to somebody who asks once for an abort.
    `keyed`: the second original is a further caller under one key. `claimed`: another transaction
    has committed under this one's key.
    `slow_answers`: an answer is a message of its own, with other events between it and its effect.
    """

    places: tuple[Place, ...]
    drives: tuple[int, ...] = (0,)
    sweepers: int = 1
    crashes: int = 1
    sweep_crashes: int = 1
    faults: int = 1
    rules: bool = False
    reads: bool = False
    meddles: bool = False
    keyed: bool = False
    claimed: bool = False
    slow_answers: bool = False

    @property
    def transactions(self) -> tuple[TransactionId, ...]:
        return IDS[: 1 + max(place.transaction for place in self.places)]


class Parts(NamedTuple):
    """The real code that is searched; a planted bug puts something else in one of the places."""

    transaction: Any = Transaction
    register: Any = Register
    clear_mark: Any = clear_mark
    horizon_candidate: Any = horizon_candidate


LOCAL = (Place("A"), Place("B"))
HANDED = (Place("A", "handed"), Place("B", "handed"))
CALLED = (Place("A"), Place("r1", "remote"), Place("r2", "remote"))
LAST = (Place("A"), Place("K", "last resource"))
ATTEMPTS = (Place("A"), Place("B", transaction=1))
ALONE = (Place("A", "one phase"),)

SMALL: dict[str, Bounds] = {
    "two branches": Bounds(LOCAL, reads=True),
    "forgetting by the rules": Bounds((Place("A"),), rules=True),
    "one phase": Bounds(ALONE, meddles=True, reads=True),
    "a last resource": Bounds(LAST, faults=0),
    "votes handed on": Bounds(HANDED, drives=(0, 0), faults=0, sweep_crashes=0),
    "a called service": Bounds(CALLED, faults=0, sweep_crashes=0),
    "two attempts under a key": Bounds(
        ATTEMPTS, drives=(0, 1), keyed=True, faults=0, crashes=0, sweep_crashes=0
    ),
    "a key that is held": Bounds(LOCAL, claimed=True, faults=0),
}
"""What `make test` searches: the first is an original and a sweep, two branches, a crash of each,
and one message lost or doubled."""

LARGE: dict[str, Bounds] = {
    "two branches, two faults": Bounds(LOCAL, reads=True, faults=2),
    "one phase, two faults": Bounds(ALONE, meddles=True, reads=True, faults=2),
    "a last resource, two faults": Bounds(LAST, faults=2),
    "a key that is held, two faults": Bounds(LOCAL, claimed=True, faults=2),
    "forgetting by the rules, two branches": Bounds(LOCAL, rules=True),
    "votes handed on, a fault": Bounds(HANDED, drives=(0, 0)),
    "a called service, a fault": Bounds(CALLED),
    "two attempts under a key, a fault": Bounds(ATTEMPTS, drives=(0, 1), keyed=True),
    "three branches": Bounds((*LOCAL, Place("C"))),
    "three coordinators": Bounds(LOCAL, sweepers=2, faults=0),
}
"""What `make exhaustive` searches besides."""
