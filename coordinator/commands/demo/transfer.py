"""The same transfer with Syncpoint: the service of the story, and the program that is killed.

As a program it reads `syncpoint.toml`, makes one transfer, and stops where it is told to: between
the two commits, or before the decision. The crash points are those of `coordinator.failpoint`; for
a crash between the two commits the second one is held back until the first has been answered,
as a slow network does. Without that both are on their way at once.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from coordinator import Coordinator, config, failpoint
from coordinator.commands.demo.crash import wait_to_be_killed
from coordinator.model import Branch, Ending
from participants.postgres import PostgreSQL

BETWEEN_COMMITS = "commit:after"
BEFORE_DECISION = "decide:before"
LOCK_TIMEOUT_SECONDS = 5.0

MOVE = "UPDATE account SET balance = balance + %s WHERE id = %s"

Transfer = Callable[[int, int, int], Awaitable[None]]


class SlowPostgreSQL(PostgreSQL):
    """A database whose COMMIT PREPARED never gets there."""

    async def commit(self, branch: Branch) -> Ending:
        await asyncio.Event().wait()
        return await super().commit(branch)

    def commit_at_once(self, branch: Branch) -> None:
        """By `commit`, always."""


def make_service(coordinator: Coordinator, accounts: PostgreSQL, ledger: PostgreSQL) -> Transfer:
    """The whole of what a service author writes."""

    @coordinator.transactional(timeout=10)
    async def transfer(source: int, target: int, amount: int) -> None:
        connection = await accounts.connection()
        await connection.execute(MOVE, (-amount, source))
        connection = await ledger.connection()
        await connection.execute(MOVE, (amount, target))

    return transfer


def open_service(
    path: Path, ledger_kind: type[PostgreSQL] = PostgreSQL
) -> tuple[Coordinator, Transfer]:
    """Build the service from the configuration file that `syncpoint recover` reads too."""
    read = config.load(path)
    urls = {each.name: str(each.options["url"]) for each in read.participants}
    accounts = PostgreSQL("accounts", urls["accounts"], lock_timeout=LOCK_TIMEOUT_SECONDS)
    ledger = ledger_kind("ledger", urls["ledger"], lock_timeout=LOCK_TIMEOUT_SECONDS)
    coordinator = Coordinator(read.log, cluster=read.cluster, participants=[accounts, ledger])
    return coordinator, make_service(coordinator, accounts, ledger)


async def _transfer_and_stop(path: Path, point: str, account: int, amount: int) -> None:
    def stop(reached: str) -> None:
        if reached == point:
            wait_to_be_killed()

    ledger_kind = SlowPostgreSQL if point == BETWEEN_COMMITS else PostgreSQL
    coordinator, transfer = open_service(path, ledger_kind)
    async with coordinator:
        failpoint.install(stop)
        await transfer(account, account, amount)


if __name__ == "__main__":
    asyncio.run(
        _transfer_and_stop(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    )
