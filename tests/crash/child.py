"""A service process that runs one transfer and meets its fate at a named point.

Started by the crash tests as `python -m tests.crash.child PLAN`. At the n-th time that the point is
reached it kills itself, or says `reached` and waits for a line on its standard input. If it
lives, it prints what its caller was told.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import msgspec

from coordinator import (
    AlreadyDecided,
    Coordinator,
    OutcomeUnknown,
    Settings,
    TransactionAborted,
    failpoint,
)
from participants.postgres import PostgreSQL


class Plan(msgspec.Struct, frozen=True):
    """What to do, and where to stop. `mode` names the way the transaction is to go."""

    log: str
    accounts: str
    ledger: str
    mode: str = "commit"
    point: str = ""
    occurrence: int = 1
    fate: str = "kill"
    key: str | None = None
    blocking: bool = False
    timeout: float = 20.0
    timeout_max: float = 20.0


class Unwanted(Exception):
    """The work's own reason to abort."""


def settings(plan: Plan) -> Settings:
    return Settings(
        timeout=plan.timeout,
        timeout_max=plan.timeout_max,
        retention=3 * plan.timeout_max,
        sweep_interval=0.1,
        beat_interval=0.1,
    )


def meet_fate(plan: Plan) -> None:
    reached = 0

    def handler(point: str) -> None:
        nonlocal reached
        if point != plan.point:
            return
        reached += 1
        if reached != plan.occurrence:
            return
        if plan.fate == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        print("reached", flush=True)
        sys.stdin.readline()

    failpoint.install(handler)


async def work(plan: Plan, accounts: PostgreSQL, ledger: PostgreSQL) -> None:
    connection = await accounts.connection()
    if plan.mode == "read only":
        await connection.execute("SELECT balance FROM account")
    else:
        await connection.execute("UPDATE account SET balance = balance - 30 WHERE id = 'alice'")
    if plan.mode == "one phase":
        return
    connection = await ledger.connection()
    await connection.execute("UPDATE account SET balance = balance + 30 WHERE id = 'alice'")
    if plan.mode == "vote no":
        await connection.execute("INSERT INTO entry (note) VALUES ('twice'), ('twice')")
    if plan.mode == "abort":
        raise Unwanted


def work_blocking(accounts: PostgreSQL, ledger: PostgreSQL) -> None:
    connection = accounts.blocking.connection()
    connection.execute("UPDATE account SET balance = balance - 30 WHERE id = 'alice'")
    connection = ledger.blocking.connection()
    connection.execute("UPDATE account SET balance = balance + 30 WHERE id = 'alice'")


async def told_by(
    plan: Plan, coordinator: Coordinator, accounts: PostgreSQL, ledger: PostgreSQL
) -> str:
    """Run the transfer and say what its caller was told."""

    def in_a_thread() -> None:
        with coordinator.blocking.transaction(key=plan.key):
            work_blocking(accounts, ledger)

    try:
        if plan.blocking:
            await asyncio.to_thread(in_a_thread)
        else:
            async with coordinator.transaction(key=plan.key):
                await work(plan, accounts, ledger)
    except (TransactionAborted, Unwanted):
        return "aborted"
    except OutcomeUnknown:
        return "unknown"
    except AlreadyDecided:
        return "committed before"
    return "committed"


async def main(plan: Plan) -> None:
    accounts = PostgreSQL("accounts", plan.accounts, pool_size=2)
    ledger = PostgreSQL("ledger", plan.ledger, pool_size=2)
    coordinator = Coordinator(
        plan.log, cluster="crash", participants=[accounts, ledger], settings=settings(plan)
    )
    await coordinator.open(sweep=False)
    meet_fate(plan)
    print(await told_by(plan, coordinator, accounts, ledger), flush=True)
    await coordinator.close()


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Plan)))
