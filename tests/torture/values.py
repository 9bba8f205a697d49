"""What the torture speaks of: its options, the lines of a history, and what is found at the end.

Everything here is an immutable value that can be written to a file and read again, so that a run
can be checked once more long after its servers are gone.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from coordinator import Settings

DATABASES = ("accounts", "ledger")
BALANCE = 10_000
CLUSTER = "torture"

SETTINGS = Settings(
    timeout=3,
    timeout_max=6,
    retention=40,
    sweep_interval=0.5,
    beat_interval=0.25,
    scan_timeout=2,
    drain_timeout=5,
)
"""Short deadlines and a short memory, so that a run of minutes sees thousands of both."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to run. `interval` is the pause between two faults, in seconds from and to.

    `longest` is how many seconds a fault lasts at most; every duration is drawn as a part of it.
    """

    seed: int
    seconds: float = 60.0
    clients: int = 32
    clients_each: int = 4
    interval: tuple[float, float] = (2.0, 5.0)
    longest: float = 15.0
    accounts: int = 200

    @property
    def processes(self) -> int:
        return max(1, round(self.clients / self.clients_each))


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What one client process is told. `epoch` is when the run began, on the monotonic clock."""

    name: str
    seed: str
    log: str
    urls: tuple[str, str]
    history: str
    epoch: float
    clients: int
    accounts: int
    is_blocking: bool


class Change(msgspec.Struct, frozen=True, array_like=True):
    """One account of one database gets `amount` more; a marker row says so in the same branch."""

    database: str
    account: int
    amount: int


# The lines of a history. `n` counts the lines of a file, so that a missing one is noticed; `at` is
# the wall clock and `mono` the monotonic one, which all processes of the machine share.


class Invoked(msgspec.Struct, frozen=True, tag="invoke", kw_only=True):
    """Written and fsynced before the operation began."""

    n: int
    at: float
    mono: float
    op: str
    how: str
    changes: tuple[Change, ...]
    key: str | None = None
    seconds: float = 0.0
    publishes: bool = False
    """Its body reads `txn.id`, and the marker rows hold it."""


Outcome = Literal["committed", "aborted", "unknown", "repeat", "surprise"]


class Told(msgspec.Struct, frozen=True, tag="told", kw_only=True):
    """What the caller was told, written before anything else was done.

    A `repeat` was told that its key had been used by `transaction`, or was given the result `first`
    which that one had recorded. A `surprise` is an exception that no caller should ever see.
    """

    n: int
    at: float
    mono: float
    op: str
    outcome: Outcome
    transaction: str | None = None
    first: str | None = None
    error: str = ""


class Asked(msgspec.Struct, frozen=True, tag="asked", kw_only=True):
    """A status, or what stood after an abort was asked for: asked at `since`, told at `mono`."""

    n: int
    at: float
    mono: float
    since: float
    transaction: str
    verb: str
    status: str


class Ended(msgspec.Struct, frozen=True, tag="end", kw_only=True):
    """The process closed its coordinator and wrote this as the last line."""

    n: int
    at: float
    mono: float


Line = Invoked | Told | Asked | Ended


class History(msgspec.Struct, frozen=True):
    """One file: what can be read of it, and what is wrong with it, which a crash cannot explain."""

    name: str
    lines: tuple[Line, ...]
    damage: tuple[str, ...] = ()


class Exit(msgspec.Struct, frozen=True):
    """How a client process went.

    `killed` by us, `ended` when told to, `stopped` before it had begun anything, or by itself.
    """

    name: str
    how: str


class Fault(msgspec.Struct, frozen=True):
    """One fault as it was done: `kind`, on what, and from when to when."""

    kind: str
    detail: str
    at: float
    mono: float
    seconds: float
    error: str = ""


class Marker(msgspec.Struct, frozen=True):
    """A row that is there in the end. `writer` is the number of the server's own transaction."""

    database: str
    op: str
    change: int
    account: int
    amount: int
    writer: int
    transaction: str | None = None
    key: str | None = None


class Named(msgspec.Struct, frozen=True, array_like=True):
    """A branch that a commit's record names: where, and the server's number for it."""

    database: str
    writer: int


class Recorded(msgspec.Struct, frozen=True):
    """What the log was seen to hold under an id, in the scans from `first` to `last`.

    Each is the moments between which such a scan ran, on the monotonic clock.
    """

    transaction: str
    verdict: str
    branches: tuple[Named, ...]
    first: tuple[float, float]
    last: tuple[float, float]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What was found when the faults were over and recovery had run."""

    log: str
    planted: tuple[str, ...]
    balances: dict[str, dict[int, int]]
    markers: tuple[Marker, ...]
    prepared: tuple[str, ...]
    records: tuple[Recorded, ...]
    last_scan: float
    """When the last scan of the log began: a record that it did not see was deleted."""
    horizon: str
    longest_gap: float
    """The most seconds between two scans of the log: short enough, and none was missed."""
    incidents: tuple[str, ...] = ()
    recover_exit: int = 0
    recovered_by_sweeps: int = 0
    recovered_by_command: int = 0
    """Transactions that were ended for somebody else: meanwhile, and by the last recovery."""
    calm_commits: int = 1
    """Commits that were told after the faults had ended and before the clients were stopped."""
    close_seconds: float = 0.0


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the checker looks at."""

    options: Options
    histories: tuple[History, ...]
    exits: tuple[Exit, ...]
    faults: tuple[Fault, ...]
    found: Found
