"""A coordinator over two databases, of which the first is moved, lost or restored meanwhile."""

from __future__ import annotations

from pathlib import Path

from coordinator import Coordinator, Settings
from coordinator.log.base import Incident
from coordinator.model import TransactionId
from participants.postgres import PostgreSQL
from tests.support.postgres import gids, query

QUICK = Settings(timeout=20, timeout_max=20, retention=60, sweep_interval=0.05, beat_interval=0.05)
BALANCE = "SELECT balance FROM account WHERE id = 'alice'"


class LastingBank:
    """`accounts` and `ledger` are urls; the log is a file in `folder`, the same for all."""

    def __init__(self, folder: Path, accounts: str, ledger: str) -> None:
        self.urls = accounts, ledger
        self.participants = PostgreSQL("accounts", accounts), PostgreSQL("ledger", ledger)
        self.coordinator = Coordinator(
            f"sqlite:///{folder / 'log.db'}",
            cluster="bank",
            participants=self.participants,
            settings=QUICK,
        )

    async def transfer(self) -> TransactionId:
        """Move 30 from the one to the other."""
        async with self.coordinator.transaction() as transaction:
            for participant, amount in zip(self.participants, (-30, 30), strict=True):
                connection = await participant.connection()
                await connection.execute(
                    "UPDATE account SET balance = balance + %s WHERE id = 'alice'", (amount,)
                )
            return transaction.id

    async def incidents(self) -> list[Incident]:
        return list(await self.coordinator.engine().log.incidents())

    def balances(self) -> tuple[object, ...]:
        return tuple(query(url, BALANCE)[0][0] for url in self.urls)

    def in_doubt(self) -> list[str]:
        return [gid for url in self.urls for gid in gids(url)]
