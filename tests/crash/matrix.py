"""Which fault meets which boundary on which way of a transaction, and what must come of it.

A *way* is how the transaction goes, a *boundary* a point of it, a *fault* what happens there. The
boundaries are those of `coordinator.failpoint`, `<effect>:<before|after>` for the n-th time, and
finer ones:

    decide:written, forget:written     inside the log's transaction, before its COMMIT
    decide:durable, forget:durable     after that COMMIT, before anybody hears of it
    <participant> <STATEMENT>:sent     the server has it, its answer is not read
    <participant> <STATEMENT>:answered the answer is read, nothing was done about it
    <participant> <STATEMENT>          on its way, for faults of the network

`all_cases` is the whole matrix, `NO_SENSE` what is left out of it and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

import msgspec

ACCOUNTS, LEDGER = PARTICIPANTS = ("accounts", "ledger")
COMMITTED, ABORTED, UNKNOWN, NOTHING = "committed", "aborted", "unknown", ""


class Way(StrEnum):
    COMMIT = "commit"
    THREAD = "commit in a thread"
    EXAMINED = "commit of what functions wrote"
    KEYED = "commit, with a key"
    READER = "a reader beside a writer"
    ALONE = "one branch, recorded"
    ONE_PHASE = "one phase"
    ABORT = "abort"
    KEYED_ABORT = "abort, with a key"
    VOTE_NO = "vote no"


class Fault(StrEnum):
    KILLED = "process killed"
    PAUSED = "process paused"
    FIRST_KILLED = "accounts killed"
    SECOND_KILLED = "ledger killed"
    FIRST_PAUSED = "accounts paused"
    SECOND_PAUSED = "ledger paused"
    LOST = "answer lost"
    CUT = "request cut"
    SILENT = "link silent"


SERVER_FAULTS = {
    Fault.FIRST_KILLED: 0,
    Fault.SECOND_KILLED: 1,
    Fault.FIRST_PAUSED: 0,
    Fault.SECOND_PAUSED: 1,
}
PAUSES = (Fault.PAUSED, Fault.FIRST_PAUSED, Fault.SECOND_PAUSED, Fault.SILENT)
NETWORK_FAULTS = (Fault.LOST, Fault.CUT, Fault.SILENT)

NO_SENSE = {
    "the server of a participant that takes no part (one phase, one branch)": "nothing to meet",
    "process paused inside a write of the log": "it holds the lock of the file, so that no other "
    "process can recover before it goes on; tests/crash/test_sqlite_crash.py races such a process",
    "server killed or paused inside a write of the log, or between a statement's sending and its "
    "answer": "the log is a file of the process, and who comes first there is up to the kernel; an "
    "answer lost, a request cut and a silent link are the same boundaries without that chance",
    "answer of the log lost, request cut, on the network": "the log is a file: its call fails "
    "instead, before or after it has written",
    "prepare, decide or commit of an abort": "there are none: without a key an abort is not even "
    "recorded",
    "rollback of a commit": "there is none, but where another fault makes the commit an abort",
    "a transaction that only reads, everywhere": "it leaves nothing that could be counted",
    "report": "only after a person has ended a branch by hand: tests/crash/test_crash_report.py",
    "ask and record-answer of a last resource": "no resource on a real server is one yet; they are "
    "in the simulation and the search",
}
"""What is not in the matrix, and why."""

_PREPARES = [(f"prepare:{when}", n) for when in ("before", "after") for n in (1, 2)]
_DECISION = [("decide:before", 1), ("decide:after", 1)]
_COMMITS = [(f"commit:{when}", n) for when in ("before", "after") for n in (1, 2)]
_ROLLBACKS = [(f"rollback:{when}", n) for when in ("before", "after") for n in (1, 2)]
_FORGETS = [("forget:before", 1), ("forget:after", 1)]
_TWO_BRANCHES = _PREPARES + _DECISION + _COMMITS + _FORGETS

BOUNDARIES: dict[Way, list[tuple[str, int]]] = {
    Way.COMMIT: _TWO_BRANCHES,
    Way.THREAD: _TWO_BRANCHES,
    Way.EXAMINED: _TWO_BRANCHES,
    Way.KEYED: _TWO_BRANCHES,
    Way.READER: _TWO_BRANCHES,
    Way.ALONE: [each for each in _TWO_BRANCHES if each[1] == 1],
    Way.ONE_PHASE: [("one-phase:before", 1), ("one-phase:after", 1)],
    Way.ABORT: _ROLLBACKS,
    Way.KEYED_ABORT: _DECISION + _ROLLBACKS,
    Way.VOTE_NO: _PREPARES + _ROLLBACKS,
}
"""Every effect boundary of each way, with how often it is reached."""

# Whether a branch has written is asked before PREPARE only where the answers to its statements have
# not told, as after a SELECT of a function that writes; else both go in one message.
_WRITER = ("PREPARE", "COMMIT PREPARED")
_BOTH_WRITE = [(each, verb) for each in PARTICIPANTS for verb in _WRITER]

STATEMENTS: dict[Way, list[tuple[str, str]]] = {
    Way.COMMIT: _BOTH_WRITE,
    Way.THREAD: _BOTH_WRITE,
    Way.EXAMINED: [(each, "EXAMINE") for each in PARTICIPANTS] + _BOTH_WRITE,
    Way.KEYED: _BOTH_WRITE,
    Way.READER: [
        (ACCOUNTS, "EXAMINE"),
        (ACCOUNTS, "COMMIT"),
        *((LEDGER, verb) for verb in _WRITER),
    ],
    Way.ALONE: [(ACCOUNTS, verb) for verb in _WRITER],
    Way.ONE_PHASE: [(ACCOUNTS, "EXAMINE"), (ACCOUNTS, "COMMIT")],
    Way.ABORT: [(each, "ROLLBACK") for each in PARTICIPANTS],
    Way.KEYED_ABORT: [(each, "ROLLBACK") for each in PARTICIPANTS],
    Way.VOTE_NO: [
        (each, verb) for each in PARTICIPANTS for verb in ("PREPARE", "ROLLBACK PREPARED")
    ],
}
"""The statements of the protocol that each participant sends on each way."""


class Case(msgspec.Struct, frozen=True):
    """One fault at one boundary of one way."""

    way: Way
    point: str
    occurrence: int
    fault: Fault

    @property
    def name(self) -> str:
        return f"{self.way} / {self.point} {self.occurrence} / {self.fault}"

    @property
    def writers(self) -> tuple[str, ...]:
        """The participants in which it writes."""
        if self.way is Way.READER:
            return (LEDGER,)
        return (ACCOUNTS,) if self.way in (Way.ALONE, Way.ONE_PHASE) else PARTICIPANTS

    @property
    def is_always_run(self) -> bool:
        """By every `make test`. Where two ways differ only in who writes or asks, that is seen by
        kills and lost messages; their other faults are left to `python -m tests.crash --all`.
        """
        alike = self.way in (Way.THREAD, Way.EXAMINED, Way.KEYED)
        return not alike or self.fault in (Fault.KILLED, Fault.LOST, Fault.CUT)

    @property
    def has_key(self) -> bool:
        return self.way in (Way.KEYED, Way.KEYED_ABORT)

    @property
    def is_recorded(self) -> bool:
        """Its commit stands in the log, if it commits."""
        return self.way is not Way.ONE_PHASE

    @property
    def outcomes(self) -> frozenset[str]:
        """What may have become of it in the end."""
        if self.way in (Way.ABORT, Way.KEYED_ABORT, Way.VOTE_NO):
            return _ONLY_ABORTED
        if self.fault in NETWORK_FAULTS:
            return self._outcomes_on_the_network()
        if _is_decided(self.point):
            return _ONLY_COMMITTED
        last_vote = ("prepare:after", 1 if self.way is Way.ALONE else 2)
        all_voted = (self.point, self.occurrence) in (last_vote, ("decide:before", 1))
        if self.fault is Fault.KILLED:
            return _ONLY_ABORTED
        if self.fault is Fault.PAUSED:
            # Another process ends what it finds prepared, and finds nothing else.
            found = all_voted or (self.point == "prepare:after" and self.way is not Way.READER)
            return _ONLY_ABORTED if found else _EITHER
        if all_voted:
            return _ONLY_COMMITTED
        # Who was asked first may have voted before its server was gone.
        first = self.way is Way.READER or self.fault in (Fault.FIRST_KILLED, Fault.FIRST_PAUSED)
        voted_one = self.point == "prepare:after" or (first and self.occurrence == 2)
        return _EITHER if voted_one else _ONLY_ABORTED

    def _outcomes_on_the_network(self) -> frozenset[str]:
        if self.point in ("decide", "forget"):
            return _ONLY_COMMITTED
        if self.way is Way.ONE_PHASE:
            came = self.fault is Fault.LOST or self.point.endswith(" + FATE")
            return _ONLY_COMMITTED if came and _is_decided(self.point) else _ONLY_ABORTED
        return _ONLY_COMMITTED if _is_decided(self.point) else _ONLY_ABORTED

    @property
    def told(self) -> frozenset[str]:
        """What its caller may have been told, beside what really happened."""
        if self.fault is Fault.KILLED:
            return frozenset({NOTHING})
        # Its deadline passes: only the database knows how one phase ended, and where the decision
        # is on its way just then the log is given a second and no more.
        return frozenset({UNKNOWN}) if self.fault in PAUSES else frozenset()


_ONLY_COMMITTED = frozenset({COMMITTED})
_ONLY_ABORTED = frozenset({ABORTED})
_EITHER = _ONLY_COMMITTED | _ONLY_ABORTED


def _is_decided(point: str) -> bool:
    """Whether the commit stands at a boundary of a way that is to commit."""
    effect, _, when = point.partition(" + ")[0].partition(":")
    if effect in ("decide", "one-phase"):
        return when in ("after", "durable")
    return effect in ("commit", "forget") or effect.endswith((" COMMIT PREPARED", " COMMIT"))


def all_cases() -> Iterator[Case]:
    """The whole matrix, in an order in which neighbours can share a fault."""
    for fault in (Fault.KILLED, Fault.PAUSED, *SERVER_FAULTS):
        for way, boundaries in BOUNDARIES.items():
            if SERVER_FAULTS.get(fault) == 1 and way in (Way.ALONE, Way.ONE_PHASE):
                continue
            for point, occurrence in boundaries:
                yield Case(way, point, occurrence, fault)
    for way in Way:
        yield from _finer(way)
    yield from _on_the_network()


def _finer(way: Way) -> Iterator[Case]:
    """Kills between the statements of a participant, and inside the log."""
    for participant, verb in STATEMENTS[way]:
        for when in ("sent", "answered"):
            yield Case(way, f"{participant} {verb}:{when}", 1, Fault.KILLED)
    effects = {point.partition(":")[0] for point, _ in BOUNDARIES[way]}
    for effect in ("decide", "forget"):
        if effect in effects:
            for when in ("written", "durable"):
                yield Case(way, f"{effect}:{when}", 1, Fault.KILLED)


def _on_the_network() -> Iterator[Case]:
    for fault in NETWORK_FAULTS:
        for way, statements in STATEMENTS.items():
            for participant, verb in statements:
                yield Case(way, f"{participant} {verb}", 1, fault)
    for fault in (Fault.LOST, Fault.CUT):
        # The answer to a COMMIT is lost, then the question what became of it meets the fault.
        yield Case(Way.COMMIT, f"{ACCOUNTS} COMMIT PREPARED + FATE", 1, fault)
        yield Case(Way.COMMIT, f"{LEDGER} COMMIT PREPARED + FATE", 1, fault)
        yield Case(Way.ONE_PHASE, f"{ACCOUNTS} COMMIT + FATE", 1, fault)
        for way, boundaries in BOUNDARIES.items():
            for effect in ("decide", "forget"):
                if (f"{effect}:before", 1) in boundaries:
                    yield Case(way, effect, 1, fault)
