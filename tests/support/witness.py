"""A service on two stores in memory that keep what they were asked and what they answered."""

from __future__ import annotations

import asyncio

from coordinator import testing
from coordinator.model import (
    Branch,
    BranchId,
    Ending,
    TransactionId,
    Vote,
    VoteKind,
    Xid,
)
from coordinator.transactional import GlobalTransaction
from participants.memory import Memory
from tests.support.told import Told


class Witnessed(Memory):
    """Keeps which transactions it took part in, what it voted and how it ended each."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.refuses = False
        self.ending: Ending | None = None
        """What it says instead of the truth."""
        self.took_part: list[str] = []
        self.votes: dict[str, str] = {}
        self.ended: dict[str, str] = {}

    async def _enlist(self, transaction: GlobalTransaction) -> BranchId:
        known = transaction in self._xids
        branch = await super()._enlist(transaction)
        if not known:
            self.took_part.append(self._xids[transaction].transaction)
        return branch

    async def prepare(self, xid: Xid) -> Vote:
        vote = await super().prepare(xid)
        if self.refuses:
            vote = Vote(VoteKind.ABORTED, reason="refused", retryable=True)
        self.votes[xid.transaction] = str(vote.kind)
        return vote

    async def commit(self, branch: Branch) -> Ending:
        ending = self.ending or await super().commit(branch)
        self.ended[branch.xid.transaction] = str(ending.kind)
        return ending

    async def rollback(self, branch: Branch) -> Ending:
        ending = await super().rollback(branch)
        self.ended[branch.xid.transaction] = str(ending.kind)
        return ending


class WitnessedShop:
    """Two stores, a coordinator, and one transaction over both."""

    def __init__(self) -> None:
        self.stock, self.ledger = Witnessed("stock"), Witnessed("ledger")
        self.coordinator = testing.coordinator(self.stock, self.ledger)
        self.id = ""

    async def sell(self, timeout: float = 5.0, work: float = 0.0) -> None:
        async with self.coordinator.transaction(timeout=timeout) as transaction:
            self.id = transaction.id
            await self.stock.put("sold", 1)
            await self.ledger.put("paid", 1)
            await asyncio.sleep(work)

    async def verdict(self) -> str | None:
        """What really stands in the log."""
        record = (await self.coordinator.engine().log.read(TransactionId(self.id))).record
        return None if record is None else str(record.decision.verdict)

    def truth(
        self,
        proposed: list[str],
        decided: list[tuple[str, bool | None]],
        outcome: str | None,
        heard: tuple[str, str | None] | None,
    ) -> Told:
        """With what the participants themselves have kept."""
        stores = (self.stock, self.ledger)
        return Told(
            {each.name for each in stores if self.id in each.took_part},
            {each.name: each.votes[self.id] for each in stores if self.id in each.votes},
            proposed,
            decided,
            {each.name: each.ended[self.id] for each in stores if self.id in each.ended},
            outcome,
            heard,
        )
