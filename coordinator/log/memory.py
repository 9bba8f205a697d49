"""A decision log in this process's memory: the reference, for tests and for trying things out.

It is the `Register` behind the port, each call one atomic step. Nothing survives the process.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from coordinator.config import Settings
from coordinator.errors import LogUnavailable
from coordinator.log.base import (
    Answer,
    Attempt,
    Incident,
    KeyState,
    LogIdentity,
    Mark,
    Page,
    Proposal,
    Reading,
    Resource,
    Word,
)
from coordinator.log.register import Register
from coordinator.model import Claim, LogId, TransactionId, Verdict
from coordinator.participant import Finding, Level, LogCheck


def new_register() -> Register:
    """An empty register with an identity of its own, created now."""
    return Register(LogIdentity(LogId(secrets.token_hex(8)), time.time_ns() // 1_000_000))


class MemoryLog:
    """The port `Log` over a register, which several logs of the process may share."""

    def __init__(self, register: Register | None = None) -> None:
        self.state = register if register is not None else new_register()
        self._open = False

    def __repr__(self) -> str:
        return f"<MemoryLog {self.state.identity.id} {'open' if self._open else 'closed'}>"

    async def open(self) -> LogIdentity:
        self._open = True
        return self.state.identity

    async def close(self) -> None:
        self._open = False

    async def check(self, settings: Settings) -> LogCheck:
        """There is nothing to look at, and one thing to say."""
        message = "it is in memory: nothing survives the process, and branches in doubt stay so"
        fix = "for more than trials name a file: sqlite:///syncpoint.db"
        return LogCheck(None, [Finding("place", Level.NOTE, message, fix)])

    async def propose(self, proposal: Proposal) -> Answer:
        return self._ready().propose(proposal)

    async def record_answer(self, transaction: TransactionId, answer: Verdict) -> Verdict | None:
        return self._ready().record_answer(transaction, answer)

    async def read(self, transaction: TransactionId) -> Reading:
        return self._ready().read(transaction)

    async def read_key(self, claim: Claim) -> KeyState:
        return self._ready().read_key(claim)

    async def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        return self._ready().name_attempt(claim, attempt, expected)

    async def scan(
        self, after: TransactionId | None, limit: int, *, unfinished_only: bool = True
    ) -> Page:
        return self._ready().scan(after, limit, unfinished_only=unfinished_only)

    async def finish(self, marks: Sequence[Mark]) -> None:
        self._ready().finish(marks)

    async def raise_horizon(self, to: TransactionId) -> TransactionId:
        return self._ready().raise_horizon(to)

    async def forget(self, limit: int, *, claims_before_ms: int) -> int:
        return self._ready().forget(limit, claims_before_ms=claims_before_ms)

    async def register(self, name: str, identity: str, now_ms: int) -> Resource:
        return self._ready().register(name, identity, now_ms)

    async def swept(self, name: str, clear: TransactionId, swept_ms: int) -> None:
        self._ready().swept(name, clear, swept_ms)

    async def resources(self) -> Sequence[Resource]:
        return self._ready().resources()

    async def report(self, incident: Incident) -> None:
        self._ready().report(incident)

    async def incidents(self) -> Sequence[Incident]:
        return self._ready().incidents()

    async def acknowledge(self, gid: str) -> bool:
        return self._ready().acknowledge(gid)

    async def give_word(self, word: Word) -> Word:
        return self._ready().give_word(word)

    async def words(self) -> Sequence[Word]:
        return self._ready().words()

    def _ready(self) -> Register:
        if not self._open:
            raise LogUnavailable("the decision log in memory is not open")
        return self.state
