"""A restored log and real databases: what was decided after the backup is shown, and not undone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator import Coordinator, Settings, config
from coordinator.cli import main
from coordinator.commands.demo.stage import Stage
from coordinator.commands.demo.transfer import MOVE, SlowPostgreSQL
from coordinator.model import Xid
from participants.postgres import PostgreSQL
from tests.support.copies import once_at

AMOUNT = 100
EARLY, LATE = 5, 6
ROOT = Path(__file__).parents[2]


class Service:
    """Its transfers commit in `accounts` and stay prepared in `ledger`; nothing sweeps here."""

    def __init__(self, path: Path) -> None:
        read = config.load(path)
        urls = {each.name: str(each.options["url"]) for each in read.participants}
        self.accounts = PostgreSQL("accounts", urls["accounts"])
        self.ledger = SlowPostgreSQL("ledger", urls["ledger"])
        self.coordinator = Coordinator(
            read.log,
            cluster=read.cluster,
            participants=[self.accounts, self.ledger],
            settings=Settings(drain_timeout=0.01),
        )

    async def transfer(self, account: int) -> None:
        async with self.coordinator.transaction():
            for participant, amount in ((self.accounts, -AMOUNT), (self.ledger, AMOUNT)):
                connection = await participant.connection()
                await connection.execute(MOVE, (amount, account))

    async def leave_half(self, account: int, *command: str) -> subprocess.CompletedProcess[str]:
        """Go away in the middle of a second phase; before that, run a command beside it."""
        await self.coordinator.open(sweep=False)
        reached = asyncio.Event()
        with once_at("commit:after", reached.set):
            transfer = asyncio.create_task(self.transfer(account))
            await reached.wait()
        transfer.cancel()
        await asyncio.gather(transfer, return_exceptions=True)
        program = [sys.executable, "-m", "coordinator", *command]
        finished = await asyncio.to_thread(
            subprocess.run, program, capture_output=True, text=True, cwd=ROOT, check=False
        )
        await self.coordinator.close()
        return finished


def test_unfinished_commits_are_finished_and_later_ones_are_quarantined(
    stage: Stage, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backup, for_log = str(tmp_path / "kept.db"), ("--config", str(config))
    money = stage.total()

    def run(*arguments: str) -> tuple[int, str]:
        code = main([*arguments, *for_log])
        told = capsys.readouterr()
        return code, told.out + told.err

    service = Service(config)
    beside = asyncio.run(service.leave_half(EARLY, "log", "backup", backup, *for_log))
    assert beside.returncode == 0 and "Of its commits 1 are unfinished" in beside.stdout
    restore = ("log", "restore", backup, "--force")
    beside = asyncio.run(service.leave_half(LATE, *restore, *for_log))
    assert beside.returncode == 2 and "has living members" in beside.stderr
    assert beside.stderr.count("\n") == 1
    _, late = sorted(stage.ledger.prepared(), key=lambda gid: gid.split(":")[3])

    code, told = run(*restore[:3])
    assert code == 2 and "--force" in told
    code, told = run(*restore)
    assert code == 0, told
    for part in ("syncpoint.db.replaced-", "never presumed aborted", "1 are unfinished", "keys"):
        assert part in told

    for _ in range(2):
        code, _ = run("recover", "--wait", "20", "--json")
        assert code == 4, "a person is needed"
        assert stage.ledger.prepared() == [late], "it has committed in the other database"
    assert stage.accounts.prepared() == []
    assert stage.ledger.balance(EARLY) - stage.ledger.balance(1) == AMOUNT
    assert stage.accounts.balance(LATE) - stage.accounts.balance(1) == -AMOUNT
    code, told = run("list", "--json")
    (shown,) = json.loads(told)["transactions"]
    xid = Xid.parse(late)
    assert xid is not None and shown["transaction"] == xid.transaction
    assert shown["state"] == "needs-person"
    assert [branch["state"] for branch in shown["branches"]] == ["quarantined"]

    stage.ledger.commit_prepared(late)  # a person has compared both sides
    assert stage.total() == money and stage.prepared() == []
