"""A decision log in one SQLite file, shared by the processes of one machine.

An answer is given after the fsync of its transaction (write-ahead log, synchronous = FULL); what
several callers ask at the same time shares one. SQLite keeps `-wal` and `-shm` beside the file, and
we keep `.lock`: none of them may be deleted, copied or opened by another library while a process
has the log open. What a full disk, a failing disk and a damaged file do is said in `writer`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from coordinator.codec import pack_transaction, unpack_transaction
from coordinator.config import Settings
from coordinator.errors import LogUnavailable, ProtocolError
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
    Record,
    RecordUnreadable,
    Resource,
    Stands,
    Unreadable,
    Word,
)
from coordinator.log.sqlite import inspection
from coordinator.log.sqlite.rows import Row, decoded
from coordinator.log.sqlite.store import Store, check_text, insertion
from coordinator.log.sqlite.writer import Statistics, Writer
from coordinator.model import Claim, TransactionId, Verdict
from coordinator.participant import LogCheck

_Result = TypeVar("_Result")


class SQLiteLog:
    """The port `Log` over one file. Every method raises `LogUnavailable` when it is not open.

    A copy of it that came into a child process by a fork raises `ConfigurationError` until it is
    opened there.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(os.path.realpath(path))
        self._writer: Writer | None = None
        self._identity: LogIdentity | None = None
        self._statistics = Statistics()

    def __repr__(self) -> str:
        return f"<SQLiteLog {self.path} {'open' if self._writer else 'closed'}>"

    @property
    def statistics(self) -> Statistics:
        """What this process did with the file since it was opened, by all its users together."""
        return self._statistics

    async def open(self) -> LogIdentity:
        if self._writer is not None and self._identity is not None and not self._writer.forked:
            return self._identity
        writer = Writer.acquire(self.path)
        try:
            identity: LogIdentity = await writer.submit(None, writes=False)
        except BaseException:
            await writer.release()
            raise
        self._writer, self._identity, self._statistics = writer, identity, writer.statistics
        return identity

    async def check(self, settings: Settings) -> LogCheck:
        """See `CheckableLog`; it need not be open."""
        return await asyncio.to_thread(inspection.inspect, self.path, settings)

    async def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.release()

    async def propose(self, proposal: Proposal) -> Answer:
        writer, identity = self._ready()
        try:
            new = insertion(proposal, identity.id)
        except ValueError as error:
            raise ProtocolError(f"the log cannot record this decision: {error}") from error
        found = await writer.submit(new, writes=True)
        if found is None:
            return Stands(_recorded(proposal), ours=True)
        if isinstance(found, Row):
            return Stands(self._record(found, identity), ours=False)
        answer: Answer = found
        return answer

    async def record_answer(self, transaction: TransactionId, answer: Verdict) -> Verdict | None:
        if answer is Verdict.DELEGATED:
            raise ProtocolError("a last resource answers commit or abort")
        key = _key(transaction)
        return await self._write(lambda store: store.record_answer(key, answer))

    async def read(self, transaction: TransactionId) -> Reading:
        _, identity = self._ready()
        key = _key(transaction)
        row, horizon = await self._read(lambda store: (store.read(key), store.horizon))
        return Reading(None if row is None else self._record(row, identity), horizon)

    async def read_key(self, claim: Claim) -> KeyState:
        _check(claim)
        return await self._read(lambda store: store.read_key(claim))

    async def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        _check(claim)
        _key(attempt.transaction)
        return await self._write(lambda store: store.name_attempt(claim, attempt, expected))

    async def scan(
        self, after: TransactionId | None, limit: int, *, unfinished_only: bool = True
    ) -> Page:
        _, identity = self._ready()
        start = b"" if after is None else _key(after)
        rows = await self._read(
            lambda store: store.scan(start, limit + 1, unfinished_only=unfinished_only)
        )
        records: list[Record | Unreadable] = []
        for row in rows[:limit]:
            try:
                records.append(decoded(row, identity.id))
            except ValueError as error:
                records.append(Unreadable(unpack_transaction(row.id), str(error)))
        more = len(rows) > limit and bool(records)
        return Page(tuple(records), unpack_transaction(rows[limit - 1].id) if more else None)

    async def finish(self, marks: Sequence[Mark]) -> None:
        marks = tuple(marks)
        if marks:
            await self._write(lambda store: store.finish(marks))

    async def raise_horizon(self, to: TransactionId) -> TransactionId:
        key = _key(to)
        return await self._write(lambda store: store.raise_horizon(key))

    async def forget(self, limit: int, *, claims_before_ms: int) -> int:
        return await self._write(
            lambda store: store.forget(limit, claims_before_ms=claims_before_ms)
        )

    async def register(self, name: str, identity: str, now_ms: int) -> Resource:
        return await self._write(lambda store: store.register(name, identity, now_ms))

    async def swept(self, name: str, clear: TransactionId, swept_ms: int) -> None:
        key = _key(clear)
        await self._write(lambda store: store.swept(name, key, swept_ms))

    async def resources(self) -> Sequence[Resource]:
        return await self._read(lambda store: store.resources())

    async def report(self, incident: Incident) -> None:
        await self._write(lambda store: store.report(incident))

    async def incidents(self) -> Sequence[Incident]:
        return await self._read(lambda store: store.incidents())

    async def acknowledge(self, gid: str) -> bool:
        return await self._write(lambda store: store.acknowledge(gid))

    async def give_word(self, word: Word) -> Word:
        try:
            f"{word.subject}{word.reason}{word.by}".encode()
        except ValueError as error:
            raise ProtocolError(f"the log cannot keep the word {word!r}: {error}") from error
        return await self._write(lambda store: store.give_word(word))

    async def words(self) -> Sequence[Word]:
        return await self._read(lambda store: store.words())

    def _ready(self) -> tuple[Writer, LogIdentity]:
        if self._writer is None or self._identity is None:
            raise LogUnavailable(f"the decision log {self.path} is not open")
        return self._writer, self._identity

    async def _write(self, work: Callable[[Store], _Result]) -> _Result:
        writer, _ = self._ready()
        result: _Result = await writer.submit(work, writes=True)
        return result

    async def _read(self, work: Callable[[Store], _Result]) -> _Result:
        writer, _ = self._ready()
        result: _Result = await writer.submit(work, writes=False)
        return result

    def _record(self, row: Row, identity: LogIdentity) -> Record:
        """A record that cannot be read parks its own transaction: it is never taken for absent."""
        try:
            return decoded(row, identity.id)
        except ValueError as error:
            raise RecordUnreadable(
                f"a record stands in {self.path} that cannot be read: {error}"
            ) from error


def _recorded(proposal: Proposal) -> Record:
    commits = proposal.decision.verdict is not Verdict.ABORT
    attachment = proposal.attachment if commits else b""
    return Record(proposal.transaction, proposal.decision, attachment)


def _check(claim: Claim) -> None:
    try:
        check_text(claim)
    except ValueError as error:
        raise ProtocolError(f"the log cannot keep the key {claim.key!r}: {error}") from error


def _key(transaction: TransactionId) -> bytes:
    try:
        return pack_transaction(transaction)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
