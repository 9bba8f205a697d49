"""Names and values of atomic commitment.

Everything here is an immutable value; nothing reads a clock, draws a random number or does I/O. The
words are those of X/Open DTP and XA; `docs/glossary.md` lists them.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NewType

import msgspec

TransactionId = NewType("TransactionId", str)
"""A UUIDv7 in canonical lower-case form: ids sort, as text, by the time they were drawn."""

BranchId = NewType("BranchId", str)
"""Sixteen hexadecimal digits, drawn at random by the process that prepares the branch."""

LogId = NewType("LogId", str)
"""Sixteen hexadecimal digits that a log draws at its first opening and keeps for ever."""

MemberId = NewType("MemberId", str)
"""Sixteen hexadecimal digits that a coordinator draws each time it is opened."""

_HEX16 = "[0-9a-f]{16}"
_UUID7 = "[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
_GID = re.compile(rf"sp:({_HEX16}):({_HEX16}):({_UUID7}):({_HEX16})")
_TRANSACTION_ID = re.compile(_UUID7)


def parse_transaction_id(text: str) -> TransactionId:
    """The id that `text` names; raises `ValueError` with the expected form if it is none."""
    candidate = text.strip().lower()
    if not _TRANSACTION_ID.fullmatch(candidate):
        raise ValueError(
            f"{text!r} is not a transaction id: expected a UUIDv7 such as "
            "0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11"
        )
    return TransactionId(candidate)


def id_floor(unix_ms: int) -> TransactionId:
    """The smallest id that can be drawn in the given millisecond since the epoch."""
    digits = f"{max(unix_ms, 0):012x}"
    return TransactionId(f"{digits[:8]}-{digits[8:]}-7000-8000-000000000000")


def id_time_ms(transaction: TransactionId) -> int:
    """The millisecond since the epoch at which the id was drawn, by its drawer's clock."""
    return int(transaction[:8] + transaction[9:13], 16)


class Xid(msgspec.Struct, frozen=True, gc=False):
    """Names a branch everywhere: whose log decides, which member prepares, which transaction.

    As text it is a PostgreSQL gid: at most 199 bytes, no quotes, no wildcard of LIKE.
    """

    log: LogId
    member: MemberId
    transaction: TransactionId
    branch: BranchId

    def __str__(self) -> str:
        return f"sp:{self.log}:{self.member}:{self.transaction}:{self.branch}"

    @staticmethod
    def prefix(log: LogId) -> str:
        """What the text of every branch of this log begins with, and of no other log."""
        return f"sp:{log}:"

    @classmethod
    def parse(cls, text: str) -> Xid | None:
        """The name that `text` holds, or None when it is not one of ours."""
        match = _GID.fullmatch(text)
        if match is None:
            return None
        log, member, transaction, branch = match.groups()
        return cls(LogId(log), MemberId(member), TransactionId(transaction), BranchId(branch))


class Branch(msgspec.Struct, frozen=True, gc=False):
    """One participant's part of a transaction, with what a stranger needs to end it.

    `token` is written by the participant with its vote and is opaque to everybody else.
    """

    xid: Xid
    participant: str
    token: bytes = b""

    @property
    def id(self) -> BranchId:
        return self.xid.branch


class VoteKind(StrEnum):
    PREPARED = "prepared"
    READ_ONLY = "read-only"
    ABORTED = "aborted"


class Vote(msgspec.Struct, frozen=True, gc=False):
    """A participant's answer to prepare.

    `PREPARED` is a promise that survives a crash of the participant. `READ_ONLY` says that nothing
    was written, and that the branch is still open. `ABORTED` carries the reason for the caller, and
    whether running the transaction again may help.
    """

    kind: VoteKind
    token: bytes = b""
    reason: str = ""
    retryable: bool = False


class Verdict(StrEnum):
    """The three values of the write-once register of a transaction."""

    COMMIT = "commit"
    ABORT = "abort"
    DELEGATED = "delegated"


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What is proposed to the log, and what stands there.

    A commit covers exactly the branches it names. A delegated decision leaves the answer to the
    last resource, whose own commit is the decision; `branches` are those that then follow.
    """

    verdict: Verdict
    branches: tuple[Branch, ...] = ()
    last_resource: Branch | None = None

    @property
    def named(self) -> tuple[Branch, ...]:
        """Every branch that it names, the last resource among them."""
        last = self.last_resource
        return self.branches if last is None else (*self.branches, last)


ABORT = Decision(Verdict.ABORT)


class Claim(msgspec.Struct, frozen=True, order=True, gc=False):
    """A second write-once key, taken in the same log transaction as a decision.

    `space` says what kind of key it is (an idempotency key, a saga's step), `key` which one.
    """

    space: str
    key: str


class EndingKind(StrEnum):
    FINISHED = "finished"
    HEURISTIC_COMMIT = "heuristic commit"
    HEURISTIC_ROLLBACK = "heuristic rollback"
    HEURISTIC_HAZARD = "heuristic hazard"


class Ending(msgspec.Struct, frozen=True, gc=False):
    """How a branch ended; anything but `FINISHED` disagrees with the decision, or may."""

    kind: EndingKind = EndingKind.FINISHED
    evidence: str = ""


FINISHED = Ending()


class Outcome(StrEnum):
    """What a caller is told. `UNKNOWN` is always accompanied by the transaction's id."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


class Status(StrEnum):
    """What the log says of an id, read linearizably."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNDECIDED = "undecided"
    FORGOTTEN = "forgotten"
