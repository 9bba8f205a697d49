"""`syncpoint resolve` on real servers: what a person may end, and what the log forbids."""

from __future__ import annotations

import asyncio
import getpass
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator import Status, TransactionAborted
from coordinator.cli import main
from coordinator.commands.demo.stage import Stage
from coordinator.commands.demo.transfer import MOVE
from coordinator.coordinator import Coordinator
from coordinator.log.base import Word
from participants.postgres import PostgreSQL
from tests.support.left import end, leave
from tests.support.stage import ACCOUNT

WHY = ("--reason", "the other side says so")


def resolve(config: Path, *arguments: str) -> int:
    return main(["resolve", *arguments, "--config", str(config)])


def told(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What a command tells with --json; nothing but one line on stdout."""
    capsys.readouterr()
    main([*arguments, "--config", str(config), "--json"])
    output, _ = capsys.readouterr()
    assert output.count("\n") == 1
    plain: dict[str, Any] = json.loads(output)
    return plain


def words(config: Path) -> list[Word]:
    async def read() -> list[Word]:
        coordinator = Coordinator.from_config(config)
        await coordinator.open(sweep=False, tolerate_unreachable=True)
        try:
            return list(await coordinator.engine().log.words())
        finally:
            await coordinator.close()

    return asyncio.run(read())


def test_abort_of_what_nobody_decided(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    total = stage.total()
    transaction = leave(config, *stage.databases, account=ACCOUNT)[0].transaction
    assert resolve(config, transaction, "abort", *WHY, "--dry-run") == 0
    output = capsys.readouterr().out
    assert output.startswith("dry run, nothing was changed: ")
    assert "abort would be proposed; to be rolled back in accounts, ledger" in output
    assert len(stage.prepared()) == 2 and words(config) == []
    resolution = told(config, capsys, "resolve", transaction, "abort", *WHY)
    assert resolution["said"].endswith("abort stands; rolled back in accounts, ledger")
    assert (resolution["exit_code"], resolution["refused"], resolution["left"]) == (0, "", "")
    assert stage.prepared() == [] and stage.total() == total
    (word,) = words(config)
    assert (word.subject, word.reason) == (transaction, WHY[1])
    assert word.by.startswith(f"{getpass.getuser()}@")
    assert resolution["word"]["by"] == word.by
    assert main(["show", transaction, "--config", str(config)]) == 0
    page = capsys.readouterr().out
    assert "the log says  abort\n" in page
    assert f"a person said roll back, by {word.by}" in page and page.count(WHY[1]) == 1
    assert resolve(config, transaction, "abort", *WHY) == 0, "repeating it changes nothing"
    assert "abort stands; nothing of it is prepared" in capsys.readouterr().out


def test_abort_where_a_commit_stands(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    (xid,) = leave(config, stage.ledger, account=ACCOUNT, amount=7, commit=True)
    before = stage.ledger.balance(ACCOUNT)
    for options in ((), ("--dry-run",)):
        assert resolve(config, xid.transaction, "abort", *WHY, *options) == 4
        output, errors = capsys.readouterr()
        assert output == "" and errors.count("\n") == 1
        assert f"a commit stands for {xid.transaction}" in errors and "recover` does it" in errors
    assert stage.prepared() == [str(xid)] and words(config) == []
    assert main(["recover", "--config", str(config)]) == 0
    assert stage.ledger.balance(ACCOUNT) == before + 7


def test_abort_with_a_server_down_leaves_the_rest_to_the_sweep(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    transaction = leave(config, *stage.databases, account=ACCOUNT)[0].transaction
    stage.ledger.server.stop()
    try:
        assert resolve(config, transaction, "abort", *WHY) == 3
    finally:
        stage.ledger.server.start()
    output, errors = capsys.readouterr()
    assert "abort stands; to be rolled back in accounts" in output
    assert errors.startswith("syncpoint: participant ledger cannot be reached: ")
    assert errors.count("\n") == 1 and "syncpoint recover" in errors
    assert stage.accounts.prepared() == [] and len(stage.ledger.prepared()) == 1
    assert main(["recover", "--config", str(config)]) == 0
    assert stage.prepared() == []


def test_below_the_horizon_a_person_ends_each_branch(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [each.balance(ACCOUNT) for each in stage.databases]
    accounts, ledger = leave(config, *stage.databases, account=ACCOUNT, amount=5, forgotten=True)
    transaction = accounts.transaction
    assert resolve(config, transaction, "abort", *WHY) == 4
    errors = capsys.readouterr().err
    assert "the log has forgotten" in errors and "--branch B" in errors
    assert words(config) == []
    assert resolve(config, transaction, "--branch", ledger.branch, "commit", *WHY) == 4
    assert "is not quarantined" in capsys.readouterr().err, "only after a sweep has looked twice"

    recovered = told(config, capsys, "recover")
    assert recovered["exit_code"] == 4 and recovered["quarantined"] == 2
    shown = told(config, capsys, "show", transaction)
    commands = [f"syncpoint resolve {transaction} --branch {each.branch} {verb} --reason TEXT"
                for each in (accounts, ledger) for verb in ("commit", "rollback")]  # fmt: skip
    assert shown["commands"] == commands and shown["acts"] == "person"
    assert [c for each in recovered["incidents"] for c in each["commands"]] == commands
    assert {each["kind"] for each in recovered["incidents"]} == {"quarantined"}

    assert main([*commands[0].split()[1:-1], "why", "--config", str(config), "--dry-run"]) == 0
    assert "would be ended by commit" in capsys.readouterr().out
    assert len(stage.prepared()) == 2 and words(config) == []
    assert main([*commands[0].split()[1:-1], "why", "--config", str(config)]) == 0
    assert f"branch {accounts.branch} of accounts: ended by commit" in capsys.readouterr().out
    assert stage.prepared() == [str(ledger)]
    assert stage.accounts.balance(ACCOUNT) == before[0] + 5
    assert [word.subject for word in words(config)] == [str(accounts)]

    arguments = ("resolve", transaction, "--branch", ledger.branch, "rollback", *WHY)
    resolution = told(config, capsys, *arguments)
    assert resolution["exit_code"] == 0 and resolution["ending"]["kind"] == "finished"
    assert "it disagrees with what a person said before: commit" in resolution["said"]
    assert stage.prepared() == [] and stage.ledger.balance(ACCOUNT) == before[1]
    assert main(["recover", "--config", str(config)]) == 0
    shown = told(config, capsys, "show", transaction)
    assert (shown["state"], shown["phase"], shown["acts"]) == ("finished", "forgotten", "nobody")
    assert [word["reason"] for word in shown["words"]] == ["why", WHY[1]]
    (listed,) = told(config, capsys, "list", "--all")["transactions"]
    assert listed["transaction"] == transaction
    assert told(config, capsys, "list")["transactions"] == []


def test_a_quarantined_branch_that_is_gone_is_not_resolved(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    (xid,) = leave(config, stage.ledger, account=ACCOUNT, forgotten=True)
    assert main(["recover", "--config", str(config)]) == 4
    end(stage.ledger.url, "ROLLBACK", xid)
    capsys.readouterr()
    assert resolve(config, xid.transaction, "--branch", xid.branch, "rollback", *WHY) == 4
    errors = capsys.readouterr().err
    assert "is not prepared in ledger any more" in errors and "syncpoint forget" in errors
    assert words(config) == []
    shown = told(config, capsys, "show", xid.transaction)
    assert shown["commands"] == [f"syncpoint forget {xid.transaction} --reason TEXT"]


def test_a_branch_whose_server_is_down_is_not_resolved(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    (xid,) = leave(config, stage.ledger, account=ACCOUNT, forgotten=True)
    assert main(["recover", "--config", str(config)]) == 4
    capsys.readouterr()
    stage.ledger.server.stop()
    try:
        assert resolve(config, xid.transaction, "--branch", xid.branch, "commit", *WHY) == 1
    finally:
        stage.ledger.server.start()
    errors = capsys.readouterr().err
    assert errors.startswith("syncpoint: participant ledger cannot be reached: ")
    assert errors.count("\n") == 1 and "nothing was recorded" in errors
    assert words(config) == []
    assert resolve(config, xid.transaction, "--branch", xid.branch, "rollback", *WHY) == 0
    assert stage.prepared() == []


async def beside(config: Path, *arguments: str) -> tuple[int, str]:
    """What another process answers while this one is a service: its exit code and all its text."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "coordinator", *arguments, "--config", str(config)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_beside_a_service_that_sweeps_and_works(config: Path, stage: Stage) -> None:
    (left,) = await asyncio.to_thread(
        lambda: leave(config, stage.ledger, account=ACCOUNT, amount=3, forgotten=True)
    )
    balance = stage.ledger.balance(ACCOUNT)
    coordinator = Coordinator.from_config(config)
    accounts = coordinator.participants[0]
    assert isinstance(accounts, PostgreSQL)
    async with coordinator:
        async with asyncio.timeout(20):
            while not await coordinator.engine().log.incidents():
                await asyncio.sleep(0.05)
        arguments = (left.transaction, "--branch", left.branch, "commit", *WHY)
        code, text = await beside(config, "resolve", *arguments)
        assert code == 0 and "ended by commit" in text, text
        assert stage.ledger.balance(ACCOUNT) == balance + 3
        with pytest.raises(TransactionAborted, match="abort"):
            async with coordinator.transaction(timeout=30) as transaction:
                connection = await accounts.connection()
                await connection.execute(MOVE, (1, ACCOUNT))
                code, text = await beside(config, "resolve", transaction.id, "abort", *WHY)
                assert code == 0 and "nothing of it is prepared" in text, text
        assert await coordinator.status(transaction.id) is Status.ABORTED
        assert (await coordinator.recover()).incidents == []


def test_the_coordinator_of_an_application(
    config: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (xid,) = leave(config, stage.ledger, account=ACCOUNT)
    (config.parent / "resolved_of_test.py").write_text(
        "from coordinator import Coordinator\n"
        f"coordinator = Coordinator.from_config({str(config)!r})\n"
    )
    monkeypatch.chdir(config.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    application = ("--app", "resolved_of_test:coordinator")
    assert main(["show", xid.transaction, *application]) == 0
    assert main(["resolve", xid.transaction, "abort", *WHY, *application]) == 0
    assert "rolled back in ledger" in capsys.readouterr().out and stage.prepared() == []
    assert main(["forget", xid.transaction, *WHY, *application]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ID", "commit", "--reason", "x"], "can only be proposed for abort"),
        (["ID", "rollback", "--reason", "x"], "can only be proposed for abort"),
        (["ID", "--branch", "B", "abort", "--reason", "x"], "write commit or rollback"),
        (["ID", "--branch", "ledger", "commit", "--reason", "x"], "sixteen hexadecimal digits"),
        (["ID", "abort"], "Missing option '--reason'"),
        (["ID", "abort", "--reason", " \n "], "--reason is empty"),
        (["order-1", "abort", "--reason", "x"], "'order-1' is not a transaction id"),
        (["ID"], "see `syncpoint resolve --help`"),
    ],
)
def test_what_cannot_be_meant_exits_2(
    arguments: list[str], said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replaced = {"ID": "0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11", "B": "0" * 16}
    assert resolve(config, *(replaced.get(each, each) for each in arguments)) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and said in errors
