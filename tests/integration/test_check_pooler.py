"""A pooler between the service and PostgreSQL, as `syncpoint check` tells it from none.

`Pooler` does to the wire what pgbouncer does: it greets every client itself, with a process id of
its own making, and lends it a session of the server, for the length of a transaction or of the
client's connection.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import psycopg
from psycopg.pq import PGconn

from coordinator.config import Settings
from coordinator.participant import Finding, Level
from participants.postgres.inspection import inspect
from participants.postgres.location import Location
from participants.postgres.statements import Begin
from tests.support.postgres import query

PROTOCOL_3 = 3 << 16
PARAMETERS = ("server_version", "client_encoding", "standard_conforming_strings", "TimeZone")
IDLE = b"I"


class Pooler:
    """Listens on 127.0.0.1 for one database."""

    def __init__(self, url: str, mode: str) -> None:
        self.port = 0
        self._conninfo = url.encode()
        self._shares = mode == "transaction"
        self._sessions: list[_Session] = []
        self._clients: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            await self._serve(reader, writer)
        writer.close()

    async def close(self) -> None:
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients)
        for session in self._sessions:
            session.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await _startup(reader) != PROTOCOL_3:
            writer.write(b"N")  # no encryption
        if not self._sessions or not self._shares:
            self._sessions.append(await _Session.open(self._conninfo))
        session = self._sessions[-1]
        writer.write(session.greeting(process_id=len(self._clients)))
        while (kind := await reader.readexactly(1)) != b"X":
            async with session.lock:
                while await session.answers(kind + await _rest(reader), writer) != IDLE:
                    kind = await reader.readexactly(1)


class _Session:
    """One connection of the pooler to the server."""

    def __init__(self, pgconn: PGconn) -> None:
        self.lock = asyncio.Lock()
        self._pgconn = pgconn
        self._parameters = {
            each: pgconn.parameter_status(each.encode()) or b"" for each in PARAMETERS
        }
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, conninfo: bytes) -> _Session:
        session = cls(PGconn.connect(conninfo))
        assert session._pgconn.error_message == b""
        wire = socket.socket(fileno=os.dup(session._pgconn.socket))
        session._reader, session._writer = await asyncio.open_connection(sock=wire)
        return session

    def greeting(self, process_id: int) -> bytes:
        told = [_message(b"R", struct.pack("!i", 0))]
        for name, value in self._parameters.items():
            told.append(_message(b"S", name.encode() + b"\0" + value + b"\0"))
        told.append(_message(b"K", struct.pack("!ii", process_id, 4711)))
        return b"".join([*told, _message(b"Z", IDLE)])

    async def answers(self, request: bytes, client: asyncio.StreamWriter) -> bytes:
        """Pass a request on, and back what the server says; the state of its transaction."""
        self._writer.write(request)
        if request[:1] not in b"QS":
            return b""  # the server answers at the Sync
        while True:
            kind, rest = await self._reader.readexactly(1), await _rest(self._reader)
            client.write(kind + rest)
            if kind == b"Z":
                return rest[-1:]

    def close(self) -> None:
        self._writer.close()
        self._pgconn.finish()


async def _startup(reader: asyncio.StreamReader) -> int:
    (length,) = struct.unpack("!i", await reader.readexactly(4))
    body = await reader.readexactly(length - 4)
    code: int = struct.unpack("!i", body[:4])[0]
    return code


async def _rest(reader: asyncio.StreamReader) -> bytes:
    """A message after its first byte, with its length."""
    head = await reader.readexactly(4)
    return head + await reader.readexactly(struct.unpack("!i", head)[0] - 4)


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


@asynccontextmanager
async def pooled(url: str, mode: str) -> AsyncIterator[str]:
    """The url of the database through a pooler."""
    pooler = Pooler(url, mode)
    listener = await asyncio.start_server(pooler.serve, "127.0.0.1", 0)
    parts = psycopg.conninfo.conninfo_to_dict(url)
    port = listener.sockets[0].getsockname()[1]
    try:
        yield f"postgresql://app@127.0.0.1:{port}/{parts['dbname']}"
    finally:
        listener.close()
        await pooler.close()


async def findings(url: str) -> dict[str, Finding]:
    found = await inspect(Location("accounts", url), 3, Begin(), None, Settings())
    return {each.subject: each for each in found}


async def test_the_pooler_is_like_one(database: str) -> None:
    """In transaction mode two idle clients see one process, which neither was greeted with."""
    async with (
        pooled(database, "transaction") as url,
        await psycopg.AsyncConnection.connect(url, autocommit=True) as first,
        await psycopg.AsyncConnection.connect(url, autocommit=True) as second,
    ):
        asked = [await each.execute("SELECT pg_backend_pid()") for each in (first, second)]
        assert await asked[0].fetchone() == await asked[1].fetchone()
        assert [each.info.backend_pid for each in (first, second)] == [1, 2]


async def test_no_pooler(database: str) -> None:
    assert "pooler" not in await findings(database)


async def test_a_pooler_in_session_mode_is_noted(database: str) -> None:
    async with pooled(database, "session") as url:
        found = (await findings(url))["pooler"]
    assert found.level is Level.NOTE and "pool_mode = session" in found.fix


async def test_a_pooler_in_transaction_mode_must_go(database: str) -> None:
    async with pooled(database, "transaction") as url:
        found = (await findings(url))["pooler"]
    assert found.level is Level.MUST_CHANGE and "pool_mode = transaction" in found.message
    assert "connect to the server itself" in found.fix
    assert query(database, "SELECT 1") == [(1,)]
