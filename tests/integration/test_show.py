"""`syncpoint show ID` on real servers: what stands in the log beside what the databases hold."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from coordinator.cli import main
from coordinator.commands.demo.crash import kill_at, stopped_at
from coordinator.commands.demo.stage import Stage
from coordinator.commands.demo.transfer import BEFORE_DECISION, BETWEEN_COMMITS, MOVE
from coordinator.coordinator import Coordinator
from coordinator.model import Xid
from participants.postgres import PostgreSQL
from tests.support.stage import ACCOUNT, service

YOUNGEST = "ffffffff-ffff-7fff-bfff-ffffffffffff"
OLDEST = "00000000-0000-7000-8000-000000000000"


def xid_of(gid: str) -> Xid:
    xid = Xid.parse(gid)
    assert xid is not None
    return xid


def shown(config: Path, transaction: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `show --json` tells; nothing but one line on stdout."""
    capsys.readouterr()
    assert main(["show", transaction, "--config", str(config), "--json"]) == 0
    output, _ = capsys.readouterr()
    assert output.count("\n") == 1
    told: dict[str, Any] = json.loads(output)
    return told


def branches(told: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """By participant: what is recorded, and what it holds."""
    return {each["participant"]: (each["recorded"], each["holds"]) for each in told["branches"]}


def test_a_commit_that_is_half_done(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(*service(config, BETWEEN_COMMITS))
    (left,) = stage.ledger.prepared()
    transaction = xid_of(left).transaction
    told = shown(config, transaction, capsys)
    assert (told["decision"], told["attachment_bytes"]) == ("commit", 0)
    assert branches(told)["ledger"] == ("to be ended", "prepared")
    assert branches(told)["accounts"][1] == "nothing prepared"
    assert told["next"].startswith("no service runs: with `syncpoint recover`, ")
    assert told["next"].endswith(" it is committed")
    assert (told["acts"], told["commands"]) == ("person", ["syncpoint recover"])
    assert main(["show", transaction, "--config", str(config)]) == 0
    page = capsys.readouterr().out
    facts = (f"transaction   {transaction}\n", "the log says  commit\n", told["next"])
    for line in (*facts, "type          syncpoint recover\n"):
        assert line in page
    assert stage.prepared() == [left], "showing changes nothing"
    with Running(config):
        told = shown(config, transaction, capsys)
    assert told["next"] == "with a sweep of a service, every 1 s, it is committed"
    assert (told["acts"], told["within_seconds"], told["commands"]) == ("sweep", 1.0, [])
    assert main(["recover", "--config", str(config)]) == 0
    told = shown(config, transaction, capsys)
    assert (told["state"], told["phase"], told["ended"]) == ("finished", "committed", 2)
    assert branches(told)["ledger"] == ("ended", "nothing prepared")
    assert told["next"].startswith("nothing: it has committed everywhere")


class Running:
    """A member that does nothing, for as long as the block runs."""

    def __init__(self, config: Path) -> None:
        self._runner = asyncio.Runner()
        self._coordinator = Coordinator.from_config(config)

    def __enter__(self) -> None:
        self._runner.run(self._coordinator.open(sweep=False))

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._coordinator.close())
        self._runner.close()


def test_what_nobody_decided(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopped_at(*service(config, BEFORE_DECISION)):
        transaction = xid_of(stage.prepared()[0]).transaction
        told = shown(config, transaction, capsys)
        assert (told["state"], told["owner_alive"]) == ("in-flight", True)
        assert told["next"].startswith("its owner goes on with it")
        assert told["acts"] == "owner" and 0 < told["within_seconds"] <= 10
        assert told["commands"] == [f"syncpoint resolve {transaction} abort --reason TEXT"]
    told = shown(config, transaction, capsys)
    assert (told["state"], told["owner_alive"]) == ("in-doubt", False)
    assert told["decision"] == "nothing"
    assert set(branches(told).values()) == {("nothing", "prepared")}
    assert "is rolled back, unless a commit is recorded first" in told["next"]
    assert len(stage.prepared()) == 2
    assert main(["recover", "--config", str(config)]) == 0


def test_a_server_that_is_down_is_what_it_waits_for(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(*service(config, BETWEEN_COMMITS))
    (left,) = stage.ledger.prepared()
    stage.ledger.server.stop()
    try:
        told = shown(config, xid_of(left).transaction, capsys)
    finally:
        stage.ledger.server.start()
    assert branches(told)["ledger"] == ("to be ended", "unknown: unreachable")
    assert told["next"].endswith(", once ledger can be reached")
    assert told["commands"] == ["syncpoint recover --wait 60"]
    assert list(told["unreachable"]) == ["ledger"]
    assert main(["recover", "--config", str(config)]) == 0


def test_a_branch_ended_against_the_decision(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(*service(config, BETWEEN_COMMITS))
    (left,) = stage.ledger.prepared()
    with psycopg.connect(stage.ledger.url, autocommit=True) as connection:
        connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(left))
    assert main(["recover", "--config", str(config)]) == 4
    told = shown(config, xid_of(left).transaction, capsys)
    assert told["state"] == "needs-person"
    evidence = {each["participant"]: each["evidence"] for each in told["branches"]}
    assert evidence["accounts"] == "" and "somebody rolled it back" in evidence["ledger"]
    assert "mend them by hand" in told["next"] and told["acts"] == "person"
    assert told["commands"] == [f"syncpoint forget {told['transaction']} --reason TEXT"]


def test_a_record_that_cannot_be_read(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(*service(config, BETWEEN_COMMITS))
    (left,) = stage.ledger.prepared()
    transaction = xid_of(left).transaction
    (log,) = config.parent.glob("*.db")
    with closing(sqlite3.connect(log)) as database:
        (former,) = database.execute("SELECT decision FROM record").fetchone()
        database.execute("UPDATE record SET decision = x'02ff'")
        database.commit()
        told = shown(config, transaction, capsys)
        assert (told["state"], told["phase"]) == ("needs-person", "unreadable")
        assert branches(told) == {"ledger": ("unreadable", "prepared")}
        assert told["next"].startswith("nothing: its record cannot be read (")
        assert main(["drain", "--config", str(config), "--timeout", "0"]) == 3
        assert f"{transaction} is left, unreadable" in capsys.readouterr().err
        database.execute("UPDATE record SET decision = ?", (former,))
        database.commit()
    assert main(["drain", "--config", str(config)]) == 0


def test_the_attachment_of_a_key_is_measured(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    async def keep_result() -> str:
        coordinator = Coordinator.from_config(config)

        @coordinator.transactional(idempotency_key=lambda: "order-1", record_result=True)
        async def transfer() -> str:
            for participant in coordinator.participants:
                assert isinstance(participant, PostgreSQL)
                connection = await participant.connection()
                await connection.execute(MOVE, (0, ACCOUNT))
            return "x" * 1000

        async with coordinator:
            return await transfer()

    assert len(asyncio.run(keep_result())) == 1000
    assert main(["list", "--all", "--config", str(config), "--json"]) == 0
    (view,) = json.loads(capsys.readouterr().out)["transactions"]
    told = shown(config, view["transaction"], capsys)
    assert told["decision"] == "commit" and 1000 <= told["attachment_bytes"] < 1100


@pytest.mark.parametrize(
    ("transaction", "said"),
    [(YOUNGEST, "nothing is recorded and nothing prepared"), (OLDEST, "older than what the log")],
)
def test_no_such_transaction_exits_5(
    transaction: str, said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", transaction, "--config", str(config), "--json"]) == 5
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert errors.startswith(f"syncpoint: no transaction {transaction}: ") and said in errors


def test_what_is_no_id_exits_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "order-1", "--config", str(config)]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert "'order-1' is not a transaction id" in errors and "syncpoint list" in errors
