"""The example of the README, to run: `python examples/transfer.py [ACCOUNTS_URL LEDGER_URL]`.

Without urls it starts two PostgreSQL servers of its own, which need no root and no Docker
(`pip install 'syncpoint[demo]'`), and stops them at the end. The log `syncpoint.db` is written into
the working directory. `test_transfer.py` beside it is how such a service is tested.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from coordinator import Coordinator
from participants.postgres import PostgreSQL
from participants.postgres.embedded import EmbeddedServer


@dataclass(frozen=True)
class Bank:
    """The service: two databases, and money that moves from one into the other."""

    coordinator: Coordinator
    accounts: PostgreSQL
    ledger: PostgreSQL
    transfer: Callable[[str, str, int], Awaitable[None]]


def make_bank(log: str, accounts_url: str, ledger_url: str) -> Bank:
    accounts = PostgreSQL("accounts", accounts_url)
    ledger = PostgreSQL("ledger", ledger_url)
    coordinator = Coordinator(log, cluster="shop", participants=[accounts, ledger])

    @coordinator.transactional(timeout=10)
    async def transfer(source: str, target: str, amount: int) -> None:
        conn = await accounts.connection()  # a psycopg.AsyncConnection, enlisted
        await conn.execute(
            "UPDATE account SET balance = balance - %s WHERE id = %s", (amount, source)
        )
        conn = await ledger.connection()
        await conn.execute("INSERT INTO entry (account, amount) VALUES (%s, %s)", (target, amount))

    return Bank(coordinator, accounts, ledger, transfer)


async def create_tables(bank: Bank) -> None:
    async with bank.coordinator.transaction():
        conn = await bank.accounts.connection()
        await conn.execute("CREATE TABLE account (id text PRIMARY KEY, balance integer)")
        await conn.execute("INSERT INTO account VALUES ('alice', 100)")
        conn = await bank.ledger.connection()
        await conn.execute("CREATE TABLE entry (account text, amount integer)")


async def tables(bank: Bank) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    """What is in the two databases; inside a transaction, what it sees there."""
    async with bank.coordinator.transaction():
        conn = await bank.accounts.connection()
        accounts = await (await conn.execute("TABLE account")).fetchall()
        conn = await bank.ledger.connection()
        return accounts, await (await conn.execute("TABLE entry")).fetchall()


async def run(accounts_url: str, ledger_url: str) -> None:
    bank = make_bank("sqlite:///syncpoint.db", accounts_url, ledger_url)
    async with bank.coordinator:  # opens the log, checks the databases, starts the sweep
        await create_tables(bank)
        await bank.transfer("alice", "bob", 30)
        accounts, entries = await tables(bank)
        print("account:", accounts)
        print("entry:", entries)


def main() -> None:
    if len(sys.argv) == 3:
        asyncio.run(run(sys.argv[1], sys.argv[2]))
        return
    with EmbeddedServer() as first, EmbeddedServer() as second:
        asyncio.run(run(first.url(), second.url()))


if __name__ == "__main__":
    main()
