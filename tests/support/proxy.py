"""A TCP proxy that loses what it is told to lose, at the moment that a test names.

    async with Proxy(port) as proxy:
        proxy.on(b"PREPARE TRANSACTION", Fault.LOSE_ANSWER)

A rule watches what clients send and fires once, on the link that sent it: `LOSE_REQUEST` cuts the
link instead of passing it on, `LOSE_ANSWER` passes it on, waits for the server's answer and cuts
then, `BLACK_HOLE` passes nothing on any more, either way, while both ends believe to be connected.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from enum import Enum
from types import TracebackType
from urllib.parse import urlsplit, urlunsplit


class Fault(Enum):
    LOSE_REQUEST = "lose request"
    LOSE_ANSWER = "lose answer"
    BLACK_HOLE = "black hole"


class Proxy:
    """Listens on 127.0.0.1 for one server port there."""

    def __init__(self, server_port: int) -> None:
        self.fired: list[Fault] = []
        self.port = 0
        self._server_port = server_port
        self._rules: list[tuple[bytes, Fault]] = []
        self._links: set[_Link] = set()
        self._black = False
        self._listener: asyncio.Server | None = None

    def on(self, request: bytes, fault: Fault) -> None:
        """The next request that contains these bytes meets the fault."""
        self._rules.append((request, fault))

    def black_hole(self) -> None:
        """From now on nothing passes, on no link, old or new."""
        self._black = True

    def heal(self) -> None:
        """New links pass everything again; the old ones are cut."""
        self._black = False
        self._rules.clear()
        self.cut()

    def cut(self) -> None:
        """Close all links now."""
        for link in list(self._links):
            link.close()

    def url(self, direct: str) -> str:
        """The same database through this proxy."""
        parts = urlsplit(direct)
        credentials = (parts.netloc.rpartition("@")[0] + "@") if "@" in parts.netloc else ""
        return urlunsplit(parts._replace(netloc=f"{credentials}127.0.0.1:{self.port}"))

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._listener is not None
        self._listener.close()
        tasks = [link.task for link in self._links]
        self.cut()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._listener.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        link = _Link(self, reader, writer, task)
        self._links.add(link)
        try:
            await link.run(self._server_port)
        finally:
            self._links.discard(link)

    def _fault_of(self, data: bytes) -> Fault | None:
        for rule in self._rules:
            if rule[0] in data:
                self._rules.remove(rule)
                self.fired.append(rule[1])
                return rule[1]
        return None


class _Link:
    def __init__(
        self,
        proxy: Proxy,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        task: asyncio.Task[None],
    ) -> None:
        self.task = task
        self._proxy = proxy
        self._client = (reader, writer)
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._losing_answer = False
        self._black = False
        self._cut = asyncio.Event()

    async def run(self, port: int) -> None:
        try:
            self._server = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            self.close()
            return
        requests = asyncio.create_task(self._pass_requests())
        answers = asyncio.create_task(self._pass_answers())
        await asyncio.wait({requests, answers}, return_when=asyncio.FIRST_COMPLETED)
        if self._black or self._proxy._black:
            await self._cut.wait()  # the other end learns nothing of this one's death
        self.close()
        await asyncio.gather(requests, answers, return_exceptions=True)
        for _, writer in (self._client, self._server):
            with suppress(OSError):
                await writer.wait_closed()

    def close(self) -> None:
        self._cut.set()
        for end in (self._client, self._server):
            if end is not None:
                end[1].transport.abort()

    async def _pass_requests(self) -> None:
        assert self._server is not None
        while data := await _read(self._client[0]):
            fault = self._proxy._fault_of(data)
            if fault is Fault.LOSE_REQUEST:
                return
            if fault is Fault.BLACK_HOLE:
                self._black = True
            if fault is Fault.LOSE_ANSWER:
                self._losing_answer = True
            if not self._black and not self._proxy._black:
                self._server[1].write(data)

    async def _pass_answers(self) -> None:
        assert self._server is not None
        while data := await _read(self._server[0]):
            if self._losing_answer:
                return
            if not self._black and not self._proxy._black:
                self._client[1].write(data)


async def _read(reader: asyncio.StreamReader) -> bytes:
    with suppress(OSError):
        return await reader.read(65536)
    return b""
