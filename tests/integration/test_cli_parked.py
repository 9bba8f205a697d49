"""What parks one transaction stops no other: a participant that was removed, a damaged record."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import main
from coordinator.codec import pack_transaction
from coordinator.commands.demo.stage import Stage
from coordinator.coordinator import Coordinator
from coordinator.log.base import Proposal
from coordinator.model import ABORT, TransactionId
from tests.support.left import leave
from tests.support.stage import ACCOUNT


def told(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What a command tells with --json, and its exit code if it does not tell it itself."""
    capsys.readouterr()
    code = main([*arguments, "--config", str(config), "--json"])
    plain: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {"exit_code": code} | plain


def results(recovered: dict[str, Any]) -> dict[str, str]:
    return {each["transaction"]: each["result"] for each in recovered["transactions"]}


def without_ledger(config: Path) -> Path:
    """The same service after somebody has removed a participant from its file."""
    head, _, _ = config.read_text().partition("[participants.ledger]")
    path = config.with_name("without-ledger.toml")
    path.touch(mode=0o600)
    path.write_text(head)
    return path


def test_a_removed_participant_parks_its_own_transactions_only(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [each.balance(ACCOUNT) for each in stage.databases]
    decided = leave(config, *stage.databases, account=ACCOUNT, commit=True)[0].transaction
    undecided = leave(config, *stage.databases, account=ACCOUNT + 1)[0].transaction
    other = leave(config, stage.accounts, account=ACCOUNT + 2)[0].transaction
    removed = without_ledger(config)

    recovered = told(removed, capsys, "recover")
    assert recovered["exit_code"] == 3 and recovered["in_doubt"] == [decided]
    assert results(recovered) == {
        decided: "parked: not configured here: ledger",
        undecided: "rolled back",
        other: "rolled back",
    }
    assert stage.accounts.prepared() == [] and len(stage.ledger.prepared()) == 2
    assert stage.accounts.balance(ACCOUNT) == before[0] + 1
    assert main(["recover", "--config", str(removed)]) == 3
    output, errors = capsys.readouterr()
    assert decided in output and "parked: " in output
    assert errors.startswith(f"syncpoint: transaction {decided} is parked: ledger is not ")
    assert errors.count("\n") == 1 and "back into the configuration" in errors

    (listed,) = told(removed, capsys, "list")["transactions"]
    states = {each["participant"]: each["state"] for each in listed["branches"]}
    assert (listed["transaction"], listed["state"]) == (decided, "in-doubt")
    assert states == {"accounts": "ended", "ledger": "not configured"}
    shown = told(removed, capsys, "show", decided)
    assert "by a process that has ledger, which is not configured here" in shown["next"]
    (holds,) = (each["holds"] for each in shown["branches"] if each["participant"] == "ledger")
    assert holds == "unknown: not configured"
    assert main(["drain", "--timeout", "0", "--config", str(removed)]) == 3
    assert "ledger not configured" in capsys.readouterr().err

    assert told(config, capsys, "recover")["exit_code"] == 0
    assert stage.prepared() == []
    assert [each.balance(ACCOUNT) for each in stage.databases] == [each + 1 for each in before]


def damage(config: Path, *transactions: TransactionId) -> None:
    (log,) = config.parent.glob("*.db")
    with closing(sqlite3.connect(log)) as database:
        for each in transactions:
            changed = database.execute(
                "UPDATE record SET decision = x'02ff' WHERE id = ?", (pack_transaction(each),)
            )
            assert changed.rowcount == 1
        database.commit()


def test_a_damaged_record_parks_its_own_transaction_only(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is unfinished, and one that no scan of the unfinished shows."""
    (first,) = leave(config, stage.ledger, account=ACCOUNT, commit=True)
    (aborted,) = leave(config, stage.accounts, account=ACCOUNT)
    (sound,) = leave(config, stage.ledger, account=ACCOUNT + 1, commit=True)
    (undecided,) = leave(config, stage.accounts, account=ACCOUNT + 1)
    damaged = {first.transaction, aborted.transaction}
    asyncio.run(abort_is_recorded(config, aborted.transaction))
    damage(config, *damaged)

    recovered = told(config, capsys, "recover", "--wait", "60")  # and there is no waiting
    assert recovered["exit_code"] == 4 and recovered["unreadable"].keys() == damaged
    found = results(recovered)
    assert found[sound.transaction] == "committed"
    assert found[undecided.transaction] == "rolled back"
    assert all(found[each].startswith("parked: its record cannot be read") for each in damaged)
    assert set(stage.prepared()) == {str(first), str(aborted)}

    views = told(config, capsys, "list", "--state", "needs-person")["transactions"]
    assert {view["transaction"] for view in views} == damaged
    assert {view["phase"] for view in views} == {"unreadable"}
    for each in damaged:
        shown = told(config, capsys, "show", each)
        assert (shown["decision"], shown["acts"]) == ("unreadable", "person")
        assert shown["next"].startswith("nothing: its record cannot be read (")
        refused = told(config, capsys, "resolve", each, "abort", "--reason", "x")
        assert refused["exit_code"] == 4 and "cannot be read" in refused["refused"]
    assert set(stage.prepared()) == {str(first), str(aborted)}
    asyncio.run(a_service_sweeps_on(config, stage))

    for xid, database in ((first, stage.ledger), (aborted, stage.accounts)):
        database.commit_prepared(str(xid))


async def abort_is_recorded(config: Path, transaction: TransactionId) -> None:
    coordinator = Coordinator.from_config(config)
    await coordinator.open(sweep=False)
    await coordinator.engine().log.propose(Proposal(transaction, ABORT))
    await coordinator.close()


async def a_service_sweeps_on(config: Path, stage: Stage) -> None:
    """Beside the damaged records, what a crash leaves now is ended by the sweep of a service."""
    async with Coordinator.from_config(config):
        (left,) = await asyncio.to_thread(
            lambda: leave(config, stage.ledger, account=ACCOUNT + 1, commit=True)
        )
        async with asyncio.timeout(20):
            while str(left) in stage.ledger.prepared():
                await asyncio.sleep(0.05)
