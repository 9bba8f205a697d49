"""PORT: who is alive, and what it is working on.

Membership saves duplicate work and makes recovery quick. It never decides anything: whoever acts on
it proposes to the log and obeys what stands, so a wrong answer here costs time only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from coordinator.model import MemberId, TransactionId


class InFlight(msgspec.Struct, frozen=True):
    """A transaction that its member still drives, older than a second when it is published."""

    transaction: TransactionId
    seconds_left: float
    phase: str
    branches: tuple[str, ...] = ()


class Beat(msgspec.Struct, frozen=True):
    """What a member says of itself: its wall clock, a counter that grows, what it drives."""

    clock_ms: int
    count: int
    in_flight: Sequence[InFlight] = ()


class Members(Protocol):
    """Raises `LogUnavailable` when the store behind it does not answer."""

    async def join(self, member: MemberId, beat: Beat) -> None:
        """Become visible to the others as alive, until `leave` or the end of the process."""

    async def beat(self, beat: Beat) -> None:
        """Replace what the others read of this member."""

    async def alive(self) -> Mapping[MemberId, Beat]:
        """Every living member, this one too, with its last beat. A dead member is absent."""

    async def leave(self) -> None:
        """Stop being a member. Harmless when not joined."""
