"""Members that live in one process, beside a log in memory.

They share a table; nobody but the member itself can end its membership, as all die together.
"""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.errors import ProtocolError
from coordinator.members.base import Beat
from coordinator.model import MemberId


class LocalMembers:
    """The port `Members` over a table that several coordinators of the process may share."""

    def __init__(self, table: dict[MemberId, Beat] | None = None) -> None:
        self._table = table if table is not None else {}
        self._member: MemberId | None = None

    async def join(self, member: MemberId, beat: Beat) -> None:
        if self._member is not None:
            raise ProtocolError(f"member {self._member} has joined already")
        self._member = member
        self._table[member] = beat

    async def beat(self, beat: Beat) -> None:
        if self._member is None:
            raise ProtocolError("a beat of who has not joined")
        self._table[self._member] = beat

    async def alive(self) -> Mapping[MemberId, Beat]:
        return dict(self._table)

    async def leave(self) -> None:
        if self._member is not None:
            self._table.pop(self._member, None)
            self._member = None
