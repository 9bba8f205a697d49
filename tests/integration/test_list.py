"""`syncpoint list` on real servers, beside services that run and after crashes."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from coordinator.cli import main
from coordinator.commands.demo.crash import kill_at, stopped_at
from coordinator.commands.demo.stage import Stage
from coordinator.commands.demo.transfer import BEFORE_DECISION, BETWEEN_COMMITS
from coordinator.coordinator import Coordinator
from coordinator.engine import now_ms
from coordinator.model import BranchId, Xid, id_floor
from participants.postgres import PostgreSQL
from tests.support.stage import service


def listed(config: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    """What `list --json` shows; nothing but one line on stdout."""
    assert main(["list", "--config", str(config), "--json", *options]) == 0
    output, errors = capsys.readouterr()
    assert errors == "" and output.count("\n") == 1
    shown: list[dict[str, Any]] = json.loads(output)["transactions"]
    return shown


def states(view: dict[str, Any]) -> dict[str, str]:
    return {branch["participant"]: branch["state"] for branch in view["branches"]}


def recovered(config: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    ended = main(["recover", "--config", str(config)]) == 0
    capsys.readouterr()
    return ended


def xid_of(gid: str) -> Xid:
    xid = Xid.parse(gid)
    assert xid is not None
    return xid


def test_nothing_to_show(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--config", str(config)]) == 0
    output, errors = capsys.readouterr()
    assert output.startswith("No transaction is in flight") and errors == ""
    assert listed(config, capsys) == []


def test_after_a_crash_between_the_commits(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(*service(config, BETWEEN_COMMITS))
    (left,) = stage.ledger.prepared()
    (view,) = listed(config, capsys)
    assert view["transaction"] == xid_of(left).transaction
    assert (view["state"], view["phase"]) == ("in-doubt", "committing")
    assert states(view) in (
        {"accounts": "gone", "ledger": "prepared"},
        {"accounts": "ended", "ledger": "prepared"},
    )
    assert view["ended"] == 1
    assert (view["owner"], view["owner_alive"]) == (xid_of(left).member, False)
    assert stage.ledger.prepared() == [left], "a list changes nothing"
    assert main(["list", "--config", str(config)]) == 0
    table = capsys.readouterr().out
    for cell in (view["transaction"], f"{view['owner']} dead", "in-doubt", "ledger prepared"):
        assert cell in table
    assert recovered(config, capsys)
    assert listed(config, capsys) == []
    (kept,) = listed(config, capsys, "--all")
    assert (kept["state"], kept["phase"], kept["ended"]) == ("finished", "committed", 2)
    (same,) = listed(config, capsys, "--state", "finished")
    assert same["transaction"] == kept["transaction"] == view["transaction"]


def test_what_nobody_decided_is_prepared_and_its_owner_dead(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(*service(config, BEFORE_DECISION))
    (view,) = listed(config, capsys, "--state", "in-doubt")
    assert (view["state"], view["phase"], view["ended"]) == ("in-doubt", "prepared", 0)
    assert states(view) == {"accounts": "prepared", "ledger": "prepared"}
    assert listed(config, capsys, "--state", "in-flight") == []
    assert len(stage.prepared()) == 2
    assert recovered(config, capsys)


def test_what_a_living_service_works_on_is_in_flight(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopped_at(*service(config, BEFORE_DECISION)):
        (view,) = listed(config, capsys, "--all")
        assert (view["state"], view["owner_alive"]) == ("in-flight", True)
        assert states(view) == {"accounts": "prepared", "ledger": "prepared"}
        assert len(stage.prepared()) == 2
    assert recovered(config, capsys)


async def listed_beside(config: Path, *options: str) -> list[dict[str, Any]]:
    """What another process lists while this one is a service."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "coordinator", "list", "--config", str(config), "--json"),
        *options,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    shown: list[dict[str, Any]] = json.loads(output)["transactions"]
    return shown


async def test_what_works_for_more_than_a_second_is_shown_before_it_prepares(
    config: Path, stage: Stage
) -> None:
    coordinator = Coordinator.from_config(config)
    accounts = coordinator.participants[0]
    assert isinstance(accounts, PostgreSQL)
    async with coordinator, coordinator.transaction(timeout=30) as transaction:
        await accounts.connection()
        async with asyncio.timeout(20):
            while not (views := await listed_beside(config)):
                pass
        (view,) = views
        assert view["transaction"] == transaction.id
        assert (view["state"], view["phase"]) == ("in-flight", "active")
        assert states(view) == {"accounts": "working"} and view["age_seconds"] >= 1
        assert view["owner"] == coordinator.engine().member and view["owner_alive"]
        assert 0 < view["seconds_left"] < 30
        assert stage.prepared() == []


async def test_what_a_living_service_prepared_a_moment_ago_is_shown_with_all_only(
    config: Path, stage: Stage
) -> None:
    coordinator = Coordinator.from_config(config)
    await coordinator.open(sweep=False)
    engine = coordinator.engine()
    in_an_hour = id_floor(now_ms() + 3_600_000)
    xid = Xid(engine.identity.id, engine.member, in_an_hour, BranchId("0" * 16))
    with psycopg.connect(stage.ledger.url, autocommit=True) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT pg_current_xact_id()")
        connection.execute(sql.SQL("PREPARE TRANSACTION {}").format(str(xid)))
        try:
            assert await listed_beside(config) == []
            (view,) = await listed_beside(config, "--all")
        finally:
            connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(str(xid)))
            await coordinator.close()
    assert view["transaction"] == in_an_hour and states(view) == {"ledger": "prepared"}


def test_a_participant_that_is_down_is_named_and_stops_nothing(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(*service(config, BETWEEN_COMMITS))
    stage.ledger.server.stop()
    try:
        assert main(["list", "--config", str(config), "--json"]) == 0
    finally:
        stage.ledger.server.start()
    output, errors = capsys.readouterr()
    told = json.loads(output)
    assert list(told["unreachable"]) == ["ledger"]
    assert errors.startswith("syncpoint: participant ledger cannot be reached")
    assert errors.count("\n") == 1
    assert states(told["transactions"][0])["ledger"] == "unreachable"
    assert told["transactions"][0]["ended"] == 1
    assert recovered(config, capsys)


def test_a_branch_ended_against_the_decision_needs_a_person(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(*service(config, BETWEEN_COMMITS))
    (left,) = stage.ledger.prepared()
    with psycopg.connect(stage.ledger.url, autocommit=True) as connection:
        connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(left))
    assert main(["recover", "--config", str(config)]) == 4
    capsys.readouterr()
    (view,) = listed(config, capsys, "--state", "needs-person")
    assert view["transaction"] == xid_of(left).transaction
    assert states(view)["ledger"] == "heuristic rollback"
    assert view["ended"] == 1
    assert main(["list", "--config", str(config)]) == 0
    assert "`syncpoint show ID` says why, and what to type." in capsys.readouterr().out


def test_a_wrong_state_exits_2_with_those_that_there_are(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", "--config", str(config), "--state", "lost"]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert "use one of in-flight, in-doubt, needs-person, finished" in errors
