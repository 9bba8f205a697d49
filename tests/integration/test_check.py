"""The command `syncpoint check`: what it prints, its exit codes, and the role that it proposes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from coordinator.cli import main
from coordinator.commands.demo.crash import kill_at, stopped_at
from coordinator.commands.demo.stage import Stage
from coordinator.commands.demo.transfer import BEFORE_DECISION, BETWEEN_COMMITS
from coordinator.log.sqlite import SQLiteLog
from participants.postgres import PostgreSQL
from tests.support.postgres import query
from tests.support.stage import service

EVERYBODYS_FUNCTIONS = (
    "pg_control_system, pg_backend_pid, pg_is_in_recovery, pg_current_wal_lsn, pg_walfile_name, "
    "pg_prepared_xact, pg_current_xact_id, pg_current_xact_id_if_assigned, pg_xact_status, "
    "pg_stat_get_activity, pg_terminate_backend"
)


def told(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The object on stdout, and in it each one's findings by subject; nothing is on stderr."""
    output, errors = capsys.readouterr()
    assert errors == "" and output.count("\n") == 1
    report = json.loads(output)
    checked = [report["log"], *report["participants"]]
    return report, {
        each["name"]: {finding["subject"]: finding for finding in each["findings"]}
        for each in checked
    }


def test_servers_that_are_as_they_must_be(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", str(config)]) == 0
    output, errors = capsys.readouterr()
    assert errors == "" and "Nothing must change, " in output
    for shown in ("decision log", "accounts", "ledger", "✓   durability", "!   role", "Fix: make"):
        assert shown in output
    assert "✗" not in output
    assert os.listdir(config.parent) == [config.name]


def test_a_server_that_is_down_stops_no_other_check(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.ledger.server.stop()
    try:
        assert main(["check", "--config", str(config)]) == 2
        output = capsys.readouterr().out
        assert main(["check", "--config", str(config), "--json"]) == 2
    finally:
        stage.ledger.server.start()
    assert "✗   connection" in output and "Fix: start the server" in output
    assert "1 must change, " in output
    report, found = told(capsys)
    assert report["exit_code"] == 2 and report["must_change"] == 1 and report["cluster"] == "demo"
    assert found["ledger"]["connection"]["level"] == "must-change"
    assert found["accounts"]["connection"]["level"] == "ok" and "slots" in found["accounts"]


def test_it_runs_beside_a_service_and_changes_nothing(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopped_at(*service(config, BEFORE_DECISION)):
        members = os.listdir(config.parent / "syncpoint.db.members")
        prepared = stage.prepared()
        assert len(prepared) == 2
        assert main(["check", "--config", str(config), "--json"]) == 0
        _, found = told(capsys)
        assert os.listdir(config.parent / "syncpoint.db.members") == members
        assert stage.prepared() == prepared
    assert ": 1 ours; the oldest for" in found["accounts"]["branches"]["message"]
    assert "syncpoint.db" in found["decision log"]["place"]["message"]
    assert main(["recover", "--config", str(config)]) == 0


def test_a_crashed_service_left_a_decision_unfinished(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(*service(config, BETWEEN_COMMITS))
    assert main(["check", "--config", str(config), "--json"]) == 0
    _, found = told(capsys)
    assert "1 decisions are recorded" in found["decision log"]["unfinished"]["message"]
    assert main(["recover", "--config", str(config)]) == 0
    assert stage.prepared() == []


APPLICATION = """
from coordinator import Coordinator
from participants.memory import Memory

class Broken(Memory):
    async def check(self, log, settings):
        raise KeyError("[bold]nothing[/]")
    def role_sql(self):
        return "SELECT 1;\\n"

quiet = Coordinator("memory:", cluster="shop", participants=[Memory("stock")])
broken = Coordinator("memory:", cluster="shop", participants=[Broken("bins"), Memory("stock")])
"""


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory, with coordinators in it."""
    name = f"application_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(APPLICATION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_a_log_in_memory_and_a_kind_without_checks(
    application: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--app", f"{application}:quiet", "--json"]) == 0
    _, found = told(capsys)
    assert found["decision log"]["place"]["level"] == "note"
    assert "nothing survives" in found["decision log"]["place"]["message"]
    assert found["stock"]["check"]["level"] == "note"


def test_a_check_that_fails_is_a_finding(
    application: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--app", f"{application}:broken"]) == 2
    output = capsys.readouterr().out
    assert "KeyError: '[bold]nothing[/]'" in output and "stock" in output


def test_role_sql_of_those_that_have_some(
    application: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--app", f"{application}:broken", "--role-sql"]) == 0
    assert capsys.readouterr().out == "SELECT 1;\n"
    assert main(["check", "--app", f"{application}:broken", "--role-sql", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"bins": "SELECT 1;\n"}


def test_role_sql_never_shows_a_password_and_quotes_names() -> None:
    sql = PostgreSQL("a", 'postgresql://odd"user:hidden@127.0.0.1/data%22base').role_sql()
    assert "hidden" not in sql
    assert 'CREATE ROLE "odd""user" LOGIN' in sql and 'ON DATABASE "data""base" TO' in sql
    assert 'CREATE ROLE "app"' in PostgreSQL("a", "postgresql://postgres@127.0.0.1/x").role_sql()


def test_the_proposed_role_can_commit_and_recover_and_no_more(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    """On servers where nobody has any right that was not given to him."""
    text = config.read_text()
    for database in stage.databases:
        query(database.url, f"REVOKE EXECUTE ON FUNCTION {EVERYBODYS_FUNCTIONS} FROM PUBLIC")
        query(database.url, "REVOKE SELECT ON pg_prepared_xacts, pg_stat_activity FROM PUBLIC")
        query(database.url, f"REVOKE ALL ON DATABASE check_{database.name} FROM PUBLIC")
        query(database.url, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
        text = text.replace(f"postgres:{database.server.password}@", "shop_service:secret@")
    config.write_text(text)
    assert main(["check", "--config", str(config), "--json"]) == 2
    _, found = told(capsys)
    assert found["ledger"]["connection"]["message"].endswith('for user "shop_service"')
    assert main(["check", "--config", str(config), "--role-sql", "--json"]) == 0
    proposed = json.loads(capsys.readouterr().out)
    for database in stage.databases:
        query(database.url, proposed[database.name])
        query(database.url, "ALTER ROLE shop_service PASSWORD 'secret'")
    try:
        assert main(["check", "--config", str(config), "--json"]) == 0
        _, found = told(capsys)
        assert found["accounts"]["role"]["level"] == found["ledger"]["role"]["level"] == "ok"
        before = stage.total()
        kill_at(*service(config, BETWEEN_COMMITS))
        owners = query(stage.ledger.url, "SELECT DISTINCT owner FROM pg_prepared_xacts")
        assert owners == [("shop_service",)]
        assert main(["recover", "--config", str(config)]) == 0
        assert stage.total() == before and stage.prepared() == []
        as_role = stage.ledger.url.replace(
            f"postgres:{stage.ledger.server.password}", "shop_service:secret"
        )
        for refused in ("CREATE TABLE more ()", "CREATE DATABASE more", "CREATE ROLE more"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                query(as_role, refused)
    finally:
        for database in stage.databases:
            query(database.url, "DROP OWNED BY shop_service")
            query(database.url, "DROP ROLE shop_service")


def test_the_log_is_not_opened(config: Path) -> None:
    """Not even the identity of a new log is drawn, which would be another service's log then."""
    path = config.parent / "syncpoint.db"
    path.touch()
    assert main(["check", "--config", str(config)]) == 0
    assert path.stat().st_size == 0

    async def create() -> None:
        log = SQLiteLog(path)
        await log.open()
        await log.close()

    asyncio.run(create())
    before = path.read_bytes()
    assert main(["check", "--config", str(config)]) == 0
    assert path.read_bytes() == before
