"""The example of the README, to run: `python examples/transfer.py [ACCOUNTS_URL LEDGER_URL]`.

Without urls it starts two PostgreSQL servers of its own, which need no root and no Docker
(`pip install 'syncpoint[demo]'`), and stops them at the end. The log `syncpoint.db` is written into
the working directory.
"""

from __future__ import annotations

import asyncio
import sys

from coordinator import Coordinator
from participants.postgres import PostgreSQL
from participants.postgres.embedded import EmbeddedServer


async def run(accounts_url: str, ledger_url: str) -> None:
    accounts = PostgreSQL("accounts", accounts_url)
    ledger = PostgreSQL("ledger", ledger_url)
    coordinator = Coordinator(
        "sqlite:///syncpoint.db", cluster="shop", participants=[accounts, ledger]
    )

    @coordinator.transactional(timeout=10)
    async def transfer(source: str, target: str, amount: int) -> None:
        conn = await accounts.connection()  # a psycopg.AsyncConnection, enlisted
        await conn.execute(
            "UPDATE account SET balance = balance - %s WHERE id = %s", (amount, source)
        )
        conn = await ledger.connection()
        await conn.execute("INSERT INTO entry (account, amount) VALUES (%s, %s)", (target, amount))

    @coordinator.transactional
    async def show() -> None:
        conn = await accounts.connection()
        print("account:", await (await conn.execute("TABLE account")).fetchall())
        conn = await ledger.connection()
        print("entry:", await (await conn.execute("TABLE entry")).fetchall())

    @coordinator.transactional
    async def create_tables() -> None:
        conn = await accounts.connection()
        await conn.execute("CREATE TABLE account (id text PRIMARY KEY, balance integer)")
        await conn.execute("INSERT INTO account VALUES ('alice', 100)")
        conn = await ledger.connection()
        await conn.execute("CREATE TABLE entry (account text, amount integer)")

    async with coordinator:  # opens the log, checks the databases, starts the sweep
        await create_tables()
        await transfer("alice", "bob", 30)
        await show()


def main() -> None:
    if len(sys.argv) == 3:
        asyncio.run(run(sys.argv[1], sys.argv[2]))
        return
    with EmbeddedServer() as first, EmbeddedServer() as second:
        asyncio.run(run(first.url(), second.url()))


if __name__ == "__main__":
    main()
