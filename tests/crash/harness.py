"""Starts the child process, recovers what it left, and counts money and branches."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from coordinator import Coordinator
from participants.postgres import PostgreSQL
from tests.crash.child import Plan, settings
from tests.support.postgres import gids, query

ROOT = Path(__file__).parents[2]
RECOVERY_SECONDS_MAX = 30.0


class Child:
    """The service process of one test."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.child", msgspec.json.encode(plan).decode()],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go on\n")
        self.process.stdin.flush()


async def recover(plan: Plan) -> float:
    """Recover until nothing is left; returns the seconds that it took."""
    participants = [PostgreSQL("accounts", plan.accounts), PostgreSQL("ledger", plan.ledger)]
    coordinator = Coordinator(
        plan.log, cluster="crash", participants=participants, settings=settings(plan)
    )
    await coordinator.open(sweep=False)
    started = time.monotonic()
    try:
        async with asyncio.timeout(RECOVERY_SECONDS_MAX):
            while not (round_ := await coordinator.recover()).clean:
                await asyncio.sleep(0.02)
        assert round_.incidents == 0
        return time.monotonic() - started
    finally:
        await coordinator.close()


def balances(plan: Plan) -> tuple[int, int]:
    """What alice has in the two databases; 100 and 100 at the beginning."""
    found = [
        int(str(query(url, "SELECT balance FROM account WHERE id = 'alice'")[0][0]))
        for url in (plan.accounts, plan.ledger)
    ]
    return found[0], found[1]


def check_ended(plan: Plan, expected: str) -> None:
    """Everything of it or nothing of it, as expected, and nothing left behind."""
    committed = {"one phase": (70, 100), "read only": (100, 130)}.get(plan.mode, (70, 130))
    assert balances(plan) == (committed if expected == "committed" else (100, 100))
    assert gids(plan.accounts) == gids(plan.ledger) == []
    # No lock is left either: the next transfer on the row goes through at once.
    for url in (plan.accounts, plan.ledger):
        query(url, "SET lock_timeout = '1s'; UPDATE account SET balance = balance")
