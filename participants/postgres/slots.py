"""This process's share of a server's `max_prepared_transactions`.

A slot is taken before PREPARE is sent and given back when the branch has ended. What is kept below
the share by every member leaves a reserve, so that recovery and a mistaken count find a slot as
well. Nobody but the server counts exactly: when it has none left all the same it answers 53200,
which is a retryable no.

A transaction asks several servers at once. So that two never hold what the other waits for, let the
gate's `most` be at most the smallest share; then nobody waits here but when a share has shrunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from coordinator.gate import Line, describe
from coordinator.model import BranchId

RESERVE_SHARE = 0.1


class Slots:
    """The prepared branches of one process on one server, on one event loop.

    `sharers` tells how many share the server just now: the live members, each as often as it has
    databases there. A share that shrank below what is held only makes the next ones wait.
    """

    def __init__(
        self, max_prepared_transactions: int, sharers: Callable[[], int] = lambda: 1
    ) -> None:
        self._all = max_prepared_transactions
        self._reserve = max(1, round(max_prepared_transactions * RESERVE_SHARE))
        self._sharers = sharers
        self._holders: dict[BranchId, float] = {}
        self._line: Line[BranchId] = Line(undo=self.give)

    @property
    def share(self) -> int:
        """How many branches this process may have prepared at a time; at least one."""
        return max(1, (self._all - self._reserve) // max(1, self._sharers()))

    def holders(self) -> list[tuple[BranchId, float]]:
        """Which branches hold a slot and for how many seconds, oldest first."""
        now = asyncio.get_running_loop().time()
        return [(branch, now - since) for branch, since in self._holders.items()]

    def try_take(self, branch: BranchId) -> bool:
        """Take a slot if one is free that nobody waits for; True if the branch has one already."""
        if branch in self._holders:
            return True
        self._serve()
        if len(self._holders) >= self.share:
            return False
        self._hold(branch)
        return True

    async def take(self, branch: BranchId, until: float) -> None:
        """Take a slot, first come first served; without suspending if one is free.

        `until` is in seconds of the loop's clock: then `TimeoutError` is raised, naming the setting
        and the holders. Nothing is held in that case, so PREPARE must not be sent.
        """
        if not self.try_take(branch):
            await self._line.wait(branch, until, self._refusal)

    def give(self, branch: BranchId) -> None:
        """The branch has ended, or was never prepared. Harmless when repeated."""
        if self._holders.pop(branch, None) is not None:
            self._serve()

    def _hold(self, branch: BranchId) -> None:
        self._holders[branch] = asyncio.get_running_loop().time()

    def _serve(self) -> None:
        while len(self._holders) < self.share and (branch := self._line.serve()) is not None:
            self._hold(branch)

    def _refusal(self) -> str:
        return (
            f"no slot for a prepared branch became free: of max_prepared_transactions = "
            f"{self._all} the share of this process is {self.share}, held by "
            f"{describe(self.holders())}. Raise max_prepared_transactions, or run fewer processes"
        )
