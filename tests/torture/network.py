"""The wire between the clients and one server, with everything that wires do.

Links can be reset; requests or answers can vanish while both ends believe to be connected; and a
rule waits for the next request that holds certain bytes: it is lost, or its answer is, or it
arrives late, after its sender has seen the connection break.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from enum import Enum
from urllib.parse import urlsplit, urlunsplit

_RESET = struct.pack("ii", 1, 0)


class OnRequest(Enum):
    LOSE_REQUEST = "lose the request"
    LOSE_ANSWER = "deliver it and drop the answer"
    DELIVER_LATE = "deliver it after the sender has lost the connection"


class Network:
    """Listens on 127.0.0.1 for one server port there; used on one event loop."""

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.port = 0
        self.links: list[Link] = []
        self.rules: list[Rule] = []
        self.loses_requests = False
        self.loses_answers = False
        self._listener: asyncio.Server | None = None

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: Link(self).client, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for link in list(self.links):
            link.cut()

    def url(self, direct: str) -> str:
        """The same database through this network."""
        parts = urlsplit(direct)
        who = parts.netloc.rpartition("@")[0]
        return urlunsplit(parts._replace(netloc=f"{who}@127.0.0.1:{self.port}"))

    def cut_broken(self) -> None:
        """Reset the links on which something was lost."""
        for link in list(self.links):
            if link.is_broken:
                link.cut()


class Rule:
    """Waits for one request that contains `part`; `late` is in seconds."""

    def __init__(self, part: bytes, what: OnRequest, late: float = 0.0) -> None:
        self.part = part
        self.what = what
        self.late = late
        self.fired = asyncio.Event()


class Link:
    """One connection of a client and the one to the server that belongs to it."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.client = _End(self, self._from_client)
        self.server = _End(self, self._from_server)
        self.is_broken = False
        """Something was lost on it: the one end does not learn that the other has gone."""
        self._is_awaited = False
        self._early: list[bytes] = []
        self._drops_answer = False
        self._opening: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self.network.links.append(self)
        self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: self.server, "127.0.0.1", self.network.server_port
            )
        except OSError:
            self.cut()
            return
        for data in self._early:
            self.server.write(data)
        self._early.clear()
        if self.client.is_lost:
            self.server.close()

    def cut(self) -> None:
        """Reset both connections."""
        self.client.reset()
        self.server.reset()

    def lost(self, end: _End) -> None:
        """One of the ends is gone: so is the other, unless nobody could tell it."""
        other = self.server if end is self.client else self.client
        if end is self.client and self._opening is not None and not self.server.is_open:
            self._opening.cancel()
        if not self.is_broken and not self._is_awaited:
            other.close()
        if not other.is_open and self in self.network.links:
            self.network.links.remove(self)

    def _from_client(self, data: bytes) -> None:
        if self.network.loses_requests:
            self.is_broken = True
            return
        for rule in self.network.rules:
            if rule.part in data:
                self.network.rules.remove(rule)
                rule.fired.set()
                self._obey(rule, data)
                return
        self._to_server(data)

    def _to_server(self, data: bytes) -> None:
        if self.server.is_open:
            self.server.write(data)
        else:
            self._early.append(data)

    def _obey(self, rule: Rule, data: bytes) -> None:
        if rule.what is OnRequest.LOSE_REQUEST:
            self.cut()
        elif rule.what is OnRequest.LOSE_ANSWER:
            self._drops_answer = True
            self._to_server(data)
        else:
            self._is_awaited = True  # the server waits for a client that has gone
            self.client.reset()
            loop = asyncio.get_running_loop()
            loop.call_later(rule.late, self.server.write, data)
            loop.call_later(rule.late + 1.0, self.server.close)

    def _from_server(self, data: bytes) -> None:
        if self._drops_answer:
            self.cut()
        elif self.network.loses_answers:
            self.is_broken = True
        else:
            self.client.write(data)


class _End(asyncio.Protocol):
    def __init__(self, link: Link, receive: object) -> None:
        self._link = link
        self._receive = receive
        self._transport: asyncio.Transport | None = None
        self.is_lost = False

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self.is_lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self is self._link.client:
            self._link.begin()

    def data_received(self, data: bytes) -> None:
        self._receive(data)  # type: ignore[operator]

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        self._link.lost(self)

    def write(self, data: bytes) -> None:
        if self.is_open and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        if self.is_open and self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        if self.is_open and self._transport is not None and not self._transport.is_closing():
            raw: socket.socket | None = self._transport.get_extra_info("socket")
            if raw is not None and raw.fileno() >= 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()
