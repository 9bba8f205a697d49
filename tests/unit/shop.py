"""A service with two stores in memory, for the tests of `coordinator.testing`."""

from __future__ import annotations

from coordinator import Settings
from coordinator.testing import QUICK, Memory
from coordinator.testing import coordinator as make_coordinator


class Shop:
    """Two stores and what a service does with them, on either face."""

    def __init__(self, ledger: Memory | None = None, *, settings: Settings = QUICK) -> None:
        self.stock, self.ledger = Memory("stock"), ledger or Memory("ledger")
        self.coordinator = make_coordinator(self.stock, self.ledger, settings=settings)

    async def sell(self, timeout: float = 5.0) -> None:
        async with self.coordinator.transaction(timeout=timeout):
            await self.stock.put("sold", 1)
            await self.ledger.put("paid", 1)

    def sell_blocking(self) -> None:
        with self.coordinator.blocking.transaction(timeout=5):
            self.stock.blocking.put("sold", 1)
            self.ledger.blocking.put("paid", 1)

    @property
    def sold(self) -> bool:
        """Whether both stores have it; fails when only one has."""
        done = [self.stock.committed == {"sold": 1}, self.ledger.committed == {"paid": 1}]
        assert len(set(done)) == 1, (self.stock.committed, self.ledger.committed)
        return done[0]
