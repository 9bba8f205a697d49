"""`syncpoint drain` on real servers: what it ends, what it waits for, and what it names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from coordinator.cli import main
from coordinator.commands.demo.crash import kill_at, stopped_at
from coordinator.commands.demo.stage import Stage
from coordinator.commands.demo.transfer import BEFORE_DECISION, BETWEEN_COMMITS
from coordinator.model import Xid
from tests.support.stage import ACCOUNT, AMOUNT, service


def drain(config: Path, *options: str) -> int:
    return main(["drain", "--config", str(config), *options])


def test_with_nothing_left_it_ends_at_once(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drain(config, "--timeout", "0") == 0
    said = "Nothing is prepared anywhere, and nothing is unfinished.\n"
    assert capsys.readouterr() == (said, "")


@pytest.mark.parametrize(("point", "moved"), [(BETWEEN_COMMITS, AMOUNT), (BEFORE_DECISION, 0)])
def test_it_ends_what_a_crash_left(
    point: str, moved: int, config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stage.ledger.balance(ACCOUNT)
    total = stage.total()
    kill_at(*service(config, point))
    assert len(stage.prepared()) >= 1
    assert drain(config, "--json") == 0
    output, errors = capsys.readouterr()
    told = json.loads(output)
    assert errors == "" and output.count("\n") == 1
    assert (told["drained"], told["left"], told["exit_code"]) == (True, [], 0)
    assert stage.prepared() == [] and stage.total() == total
    assert stage.ledger.balance(ACCOUNT) == before + moved


def test_what_a_living_service_works_on_is_waited_for_and_named(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopped_at(*service(config, BEFORE_DECISION)):
        gids = stage.prepared()
        assert drain(config, "--timeout", "0.5") == 3
        output, errors = capsys.readouterr()
        xid = Xid.parse(gids[0])
        assert xid is not None and output == "" and errors.count("\n") == 1
        assert f"transaction {xid.transaction} is left, " in errors
        assert "accounts prepared, ledger prepared" in errors and "--timeout" in errors
        assert stage.prepared() == gids
        waiting = subprocess.Popen(
            [sys.executable, "-m", "coordinator", "-v", "drain", "--config", str(config)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert waiting.stderr is not None
        assert any("open:" in line for line in waiting.stderr)
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0 and output.startswith("Nothing is prepared anywhere")
    assert stage.prepared() == []


def test_a_server_that_is_down_is_named(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(*service(config, BEFORE_DECISION))
    stage.ledger.server.stop()
    try:
        assert drain(config, "--timeout", "0") == 3
    finally:
        stage.ledger.server.start()
    errors = capsys.readouterr().err
    assert errors.startswith("syncpoint: participant ledger cannot be reached: ")
    assert stage.accounts.prepared() == [] and len(stage.ledger.prepared()) == 1
    assert drain(config) == 0
    assert stage.prepared() == []


def test_it_waits_until_a_server_is_back(config: Path, stage: Stage) -> None:
    kill_at(*service(config, BETWEEN_COMMITS))
    stage.ledger.server.stop()
    waiting = subprocess.Popen(
        [sys.executable, "-m", "coordinator", "-v", "drain", "--config", str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert waiting.stderr is not None
        # Its log says that it has opened once, without the ledger.
        assert any("open:" in line for line in waiting.stderr)
    finally:
        stage.ledger.server.start()
    waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert stage.prepared() == []


def test_what_needs_a_person_is_named(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(*service(config, BETWEEN_COMMITS))
    (left,) = stage.ledger.prepared()
    with psycopg.connect(stage.ledger.url, autocommit=True) as connection:
        connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(left))
    assert drain(config, "--timeout", "0.5") == 3
    errors = capsys.readouterr().err
    assert "ledger heuristic rollback" in errors and "it needs a person" in errors
    assert errors.count("\n") == 1
