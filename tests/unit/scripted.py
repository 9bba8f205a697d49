"""A participant that does what the test tells it, and a log whose answers can be held back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from coordinator.config import Settings
from coordinator.decorating import F, How, decorate
from coordinator.engine import Engine, draw_member_id
from coordinator.errors import LogUnavailable
from coordinator.log.base import Answer, Log, Proposal
from coordinator.log.memory import MemoryLog
from coordinator.members.base import Beat
from coordinator.members.local import LocalMembers
from coordinator.model import (
    FINISHED,
    Branch,
    Ending,
    MemberId,
    Verdict,
    Vote,
    VoteKind,
    Xid,
)
from coordinator.participant import Binding
from coordinator.scope import Options, Scope

PREPARED = Vote(VoteKind.PREPARED)
QUICK = Settings(
    timeout=5,
    timeout_max=20,
    retention=60,
    sweep_interval=0.01,
    beat_interval=0.02,
    retry_first=0.001,
    retry_most=0.01,
    drain_timeout=2,
)


class Scripted:
    """Votes, ends and recovers as told; `calls` is what was asked, in order."""

    def __init__(self, name: str, vote: Vote = PREPARED) -> None:
        self.name = name
        self.vote = vote
        self.calls: list[str] = []
        self.prepared: dict[str, Branch] = {}
        self.failures: dict[str, int] = {}
        self.endings: dict[str, Ending] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.opened = False

    def hold(self, verb: str) -> asyncio.Event:
        """Make the verb wait until the returned event is set."""
        self.gates[verb] = asyncio.Event()
        return self.gates[verb]

    async def open(self, binding: Binding) -> str:
        self.opened = True
        return f"scripted:{self.name}"

    async def close(self) -> None:
        self.opened = False

    async def _did(self, verb: str) -> None:
        self.calls.append(verb)
        if verb in self.gates:
            await self.gates[verb].wait()
        if self.failures.get(verb, 0) > 0:
            self.failures[verb] -= 1
            raise ConnectionError(f"{self.name} does not answer {verb}")

    async def prepare(self, xid: Xid) -> Vote:
        await self._did("prepare")
        if self.vote.kind is VoteKind.PREPARED:
            self.prepared[str(xid)] = Branch(xid, self.name, self.vote.token)
        return self.vote

    async def commit(self, branch: Branch) -> Ending:
        await self._did("commit")
        self.prepared.pop(str(branch.xid), None)
        return self.endings.get("commit", FINISHED)

    async def rollback(self, branch: Branch) -> Ending:
        await self._did("rollback")
        self.prepared.pop(str(branch.xid), None)
        return self.endings.get("rollback", FINISHED)

    async def recover(self) -> Collection[Branch]:
        await self._did("recover")
        return list(self.prepared.values())


class OnePhaseScripted(Scripted):
    async def commit_one_phase(self, branch: Branch) -> tuple[Verdict, str, bool]:
        await self._did("commit_one_phase")
        return Verdict.COMMIT, "", False


class SlowLog(MemoryLog):
    """A memory log that can lose answers, hold them back, or not answer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.lose_answers = 0
        self.gate: asyncio.Event | None = None
        self.proposals: list[Proposal] = []

    async def propose(self, proposal: Proposal) -> Answer:
        self.proposals.append(proposal)
        if self.gate is not None:
            await self.gate.wait()
        answer = await super().propose(proposal)
        if self.lose_answers > 0:
            self.lose_answers -= 1
            raise LogUnavailable("the answer was lost")
        return answer


class Bench:
    """An engine without a facade, and scopes on it."""

    def __init__(self, engine: Engine, log: Log, table: dict[MemberId, Beat]) -> None:
        self.engine = engine
        self.log = log
        self._table = table

    def other_member_beats(self, member: MemberId, beat: Beat) -> None:
        """Another coordinator of the cluster says that it lives."""
        self._table[member] = beat

    def scope(self, timeout: float = 5.0) -> Scope:
        return Scope(lambda: self.engine, Options(timeout=timeout))

    def transactional(self, function: F, **how: Any) -> F:
        """The function, decorated for this engine."""
        home: Any = self  # a coroutine function needs no home
        return decorate(function, How(timeout=5.0, **how), lambda: self.engine, home)


@asynccontextmanager
async def engine_with(
    *participants: Scripted, log: MemoryLog | None = None, settings: Settings = QUICK
) -> AsyncIterator[Bench]:
    log = log or MemoryLog()
    identity = await log.open()
    named = {participant.name: participant for participant in participants}
    table: dict[MemberId, Beat] = {}
    engine = Engine(log, identity, LocalMembers(table), draw_member_id(), named, settings)
    for name in named:
        await log.register(name, f"scripted:{name}", 0)
    await engine.start()
    try:
        yield Bench(engine, log, table)
    finally:
        await engine.stop()
        await log.close()


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0)
