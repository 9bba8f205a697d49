"""What a coordinator that is gone left behind: branches prepared by hand, and records."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psycopg
from psycopg import sql

from coordinator.commands.demo.stage import Database
from coordinator.commands.demo.transfer import MOVE
from coordinator.coordinator import Coordinator
from coordinator.engine import now_ms
from coordinator.log.base import Proposal
from coordinator.model import (
    Branch,
    BranchId,
    Decision,
    MemberId,
    TransactionId,
    Verdict,
    Xid,
    id_floor,
)

DEAD = MemberId("d" * 16)
OLD_MS = 3_600_000


def leave(
    config: Path,
    *databases: Database,
    account: int,
    amount: int = 1,
    commit: bool = False,
    forgotten: bool = False,
) -> list[Xid]:
    """Prepare a branch in each database, all of one transaction of the log of `config`.

    With `commit` the decision is recorded; with `forgotten` it is older than the log, which is as
    far as its horizon reaches.
    """
    return asyncio.run(_leave(config, databases, account, amount, commit, forgotten))


async def _leave(
    config: Path,
    databases: tuple[Database, ...],
    account: int,
    amount: int,
    commit: bool,
    forgotten: bool,
) -> list[Xid]:
    coordinator = Coordinator.from_config(config)
    await coordinator.open(sweep=False, tolerate_unreachable=True)
    try:
        engine = coordinator.engine()
        drawn = engine.draw()
        ago_ms = OLD_MS if forgotten else 0
        transaction = TransactionId(id_floor(now_ms() - ago_ms)[:13] + drawn[13:])
        xids = [
            Xid(engine.identity.id, DEAD, transaction, BranchId(f"{transaction[-12:]}{number:04x}"))
            for number in range(len(databases))
        ]
        for xid, database in zip(xids, databases, strict=True):
            prepare(database.url, xid, account, amount)
        if commit:
            named = zip(xids, databases, strict=True)
            branches = tuple(Branch(xid, database.name) for xid, database in named)
            await engine.log.propose(Proposal(transaction, Decision(Verdict.COMMIT, branches)))
        return xids
    finally:
        await coordinator.close()


def prepare(url: str, xid: Xid, account: int, amount: int) -> None:
    """A branch that has changed one account, in a savepoint as code of users does."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("BEGIN")
        with connection.transaction():
            connection.execute(MOVE, (amount, account))
        connection.execute(sql.SQL("PREPARE TRANSACTION {}").format(str(xid)))


def end(url: str, verb: str, xid: Xid) -> None:
    """What somebody types in psql: COMMIT or ROLLBACK."""
    with psycopg.connect(url, autocommit=True) as connection:
        statement = sql.SQL(verb + " PREPARED {}")  # type: ignore[arg-type]
        connection.execute(statement.format(str(xid)))
