"""A proxy that notes what clients send, and keeps a request back until it is told to deliver it.

    async with Holding(port) as proxy:
        proxy.hold(b"PREPARE TRANSACTION")
        ...
        await proxy.held.wait()
        proxy.deliver.set()

What is kept back is delivered even if the client is gone by then, as a slow network does it.
"""

from __future__ import annotations

import asyncio

from tests.support.proxy import Proxy, _Link, _read


class Holding(Proxy):
    """Listens on 127.0.0.1 for one server port there."""

    def __init__(self, server_port: int) -> None:
        super().__init__(server_port)
        self.requests: list[bytes] = []
        self.held = asyncio.Event()
        self.deliver = asyncio.Event()
        self.delivered = asyncio.Event()
        self._hold: bytes | None = None

    def hold(self, request: bytes) -> None:
        """Keep the next request that contains these bytes, and all that follow on its link."""
        self._hold = request

    def count(self, part: bytes) -> int:
        """How many requests contained it."""
        return sum(part in request for request in self.requests)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        link = _HoldingLink(self, reader, writer, task)
        self._links.add(link)
        try:
            await link.run(self._server_port)
        finally:
            self._links.discard(link)

    async def _let_pass(self, data: bytes) -> None:
        self.requests.append(data)
        if self._hold is not None and self._hold in data:
            self._hold = None
            self.held.set()
            await self.deliver.wait()
            self.delivered.set()


class _HoldingLink(_Link):
    async def _pass_requests(self) -> None:
        assert isinstance(self._proxy, Holding) and self._server is not None
        while data := await _read(self._client[0]):
            await self._proxy._let_pass(data)
            self._server[1].write(data)
