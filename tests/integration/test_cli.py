"""The command line: its help, its errors, its exit codes, and `syncpoint recover`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
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

COMMANDS = (
    "demo", "recover", "list", "show", "resolve", "forget", "drain", "check", "log", "bench",
)  # fmt: skip


def crash(config: Path, point: str) -> None:
    """Kill a service in the middle of one transfer."""
    kill_at(*service(config, point))


def test_help_names_the_commands_and_nothing_that_is_not_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"│ {command} " in shown
    for not_built in ("│ serve", "│ worker"):
        assert not_built not in shown
    assert main([]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: syncpoint {command}" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("syncpoint ")


def test_python_m_coordinator_is_the_same_program() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "coordinator", "recover", "--nope"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == (
        "syncpoint: No such option: --nope; see `syncpoint recover --help`\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "see `syncpoint --help`"),
        (["demo", "--transfers", "none"], "see `syncpoint demo --help`"),
        (["bench", "--clients", "1,x"], "write numbers, such as 1,8,32"),
        (["bench", "--clients", "0"], "each is 1 to"),
        (["recover", "--config", "absent.toml"], "absent.toml: no such file. Create it"),
        (["recover"], "syncpoint.toml: no such file. Create it"),
        (["recover", "--app", "shop"], "write it as shop.db:coordinator"),
        (["recover", "--app", "no_such:thing"], "there is no module 'no_such'; name one that can"),
        (["recover", "--app", "json.nowhere:thing"], "there is no module 'json.nowhere'"),
        (["recover", "--app", "json:nothing"], "there is no 'nothing' in json; name the"),
        (["recover", "--app", "json:dumps"], "name a Coordinator object"),
        (["recover", "--app", "a:b", "--config", "c.toml"], "give one of them"),
        (["check", "--app", "shop"], "write it as shop.db:coordinator"),
        (["check", "--config", "absent.toml"], "absent.toml: no such file. Create it"),
        (["check", "--nope"], "see `syncpoint check --help`"),
    ],
)
def test_a_wrong_option_or_file_exits_2_with_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SYNCPOINT_CONFIG", raising=False)
    assert main(arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("syncpoint: ") and errors.count("\n") == 1
    assert said in errors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cluster = ", "bad.toml: Invalid value"),
        ('cluster = "shop"\n', "log is None"),
        ('cluster = "shop"\nlog = "memory:"\nlogs = 1\n', "unknown key 'logs'"),
        ('cluster = "shop"\nlog = "carrier:pigeon"\n', "carrier:"),
        ('cluster = "s"\nlog = "memory:"\n[participants.a]\nkind = "oracle"\n', "unknown kind"),
    ],
)
def test_a_bad_file_is_answered_in_one_line(
    text: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.toml").write_text(text)
    monkeypatch.setenv("SYNCPOINT_CONFIG", str(tmp_path / "bad.toml"))
    assert main(["recover"]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert said in errors


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("import os; os.environ['NO_SUCH_VARIABLE']", "KeyError: 'NO_SUCH_VARIABLE'"),
        ("coordinator = (", "SyntaxError: '(' was never closed"),
    ],
)
def test_an_application_that_cannot_be_imported_says_why(
    code: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken_of_test.py").write_text(code + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["check", "--app", "broken_of_test:coordinator"]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert f"importing broken_of_test raised {said}" in errors


class TestRecover:
    def test_healthy_databases_have_nothing_in_doubt(
        self, config: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["recover", "--config", str(config)]) == 0
        assert capsys.readouterr() == ("Nothing is in doubt.\n", "")

    def test_a_transfer_killed_between_its_commits_is_completed(
        self, config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = stage.total()
        crash(config, BETWEEN_COMMITS)
        assert stage.total() == before - AMOUNT
        assert main(["recover", "--config", str(config), "--json"]) == 0
        output, errors = capsys.readouterr()
        told = json.loads(output)
        assert errors == "" and output.count("\n") == 1
        assert (told["committed"], told["rolled_back"], told["in_doubt"]) == (1, 0, [])
        assert [each["result"] for each in told["transactions"]] == ["committed"]
        assert stage.total() == before and stage.prepared() == []

    def test_a_transfer_killed_before_its_decision_is_rolled_back(
        self, config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = [stage.accounts.balance(ACCOUNT), stage.ledger.balance(ACCOUNT)]
        crash(config, BEFORE_DECISION)
        assert len(stage.prepared()) == 2
        assert main(["recover", "--config", str(config)]) == 0
        output = capsys.readouterr().out
        assert "0 committed, 1 rolled back, 0 still in doubt, 0 for a person." in output
        assert [stage.accounts.balance(ACCOUNT), stage.ledger.balance(ACCOUNT)] == before
        assert stage.prepared() == []

    def test_a_dry_run_only_tells(
        self, config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        crash(config, BETWEEN_COMMITS)
        in_doubt = stage.prepared()
        assert main(["recover", "--config", str(config), "--dry-run", "--json"]) == 3
        told = json.loads(capsys.readouterr().out)
        assert [each["result"] for each in told["transactions"]] == ["would commit"]
        assert told["dry_run"] is True and told["committed"] == 0
        assert stage.prepared() == in_doubt
        assert main(["recover", "--config", str(config)]) == 0

    def test_a_server_that_is_down_is_named_and_stops_nobody_else(
        self, config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = stage.total()
        crash(config, BEFORE_DECISION)
        stage.ledger.server.stop()
        try:
            assert main(["recover", "--config", str(config)]) == 3
        finally:
            stage.ledger.server.start()
        errors = capsys.readouterr().err
        assert errors.startswith("syncpoint: participant ledger cannot be reached: ")
        assert "syncpoint recover" in errors and errors.count("\n") == 1
        assert stage.accounts.prepared() == [] and len(stage.ledger.prepared()) == 1
        assert main(["recover", "--config", str(config)]) == 0
        assert stage.total() == before and stage.prepared() == []

    def test_a_decided_transfer_waits_for_the_server_that_is_down(
        self, config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = stage.total()
        crash(config, BETWEEN_COMMITS)
        (left,) = stage.ledger.prepared()
        stage.ledger.server.stop()
        try:
            assert main(["recover", "--config", str(config), "--json"]) == 3
        finally:
            stage.ledger.server.start()
        told = json.loads(capsys.readouterr().out)
        xid = Xid.parse(left)
        assert xid is not None and told["in_doubt"] == [xid.transaction]
        assert told["transactions"][0]["result"] == "in doubt: waits for ledger"
        assert list(told["unreachable"]) == ["ledger"]
        assert main(["recover", "--config", str(config)]) == 0
        assert stage.total() == before and stage.prepared() == []

    def test_wait_goes_on_until_the_server_is_back(self, config: Path, stage: Stage) -> None:
        before = stage.total()
        crash(config, BETWEEN_COMMITS)
        stage.ledger.server.stop()
        recovery = subprocess.Popen(
            [sys.executable, "-m", "coordinator", "-v", "recover", "--wait", "60",
             "--config", str(config)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert recovery.stderr is not None
            # Its log says that one whole run is over, without the ledger.
            assert any("coordinator" in line and "open:" in line for line in recovery.stderr)
        finally:
            stage.ledger.server.start()
        output, _ = recovery.communicate(timeout=60)
        assert recovery.returncode == 0
        assert "1 committed" in output
        assert stage.total() == before and stage.prepared() == []

    def test_what_a_living_process_works_on_is_left_alone(
        self, config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with stopped_at(*service(config, BEFORE_DECISION)):
            assert main(["recover", "--config", str(config)]) == 3
            output, errors = capsys.readouterr()
            assert "left alone" in output
            assert "1 transaction still in doubt; run `syncpoint recover --wait 60`" in errors
            assert len(stage.prepared()) == 2
        assert main(["recover", "--config", str(config)]) == 0
        assert stage.prepared() == []

    def test_wait_ends_what_a_process_that_hangs_has_left(
        self, config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It lives and does not beat: nobody can tell it from a slow one before its time is up."""
        with config.open("a") as file:
            file.write("\n[settings]\ntimeout = 0.5\ntimeout_max = 1.0\n")
        with stopped_at(*service(config, BEFORE_DECISION)):
            began = time.monotonic()
            assert main(["recover", "--config", str(config), "--wait", "30"]) == 0
            assert 1.0 < time.monotonic() - began < 15
            assert "1 rolled back, 0 still in doubt" in capsys.readouterr().out
            assert stage.prepared() == []

    def test_a_branch_ended_against_the_decision_needs_a_person(
        self, config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        crash(config, BETWEEN_COMMITS)
        (left,) = stage.ledger.prepared()
        with psycopg.connect(stage.ledger.url, autocommit=True) as connection:
            connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(left))
        for _ in range(2):
            assert main(["recover", "--config", str(config)]) == 4
            output, errors = capsys.readouterr()
            assert "1 for a person." in output
            assert errors.count("\n") == 1 and "mend them by hand" in errors
            assert "ledger: heuristic rollback, branch " in output
            assert "somebody rolled it back" in output and "type: syncpoint forget " in output

    def test_an_application_can_name_its_coordinator(
        self,
        config: Path,
        stage: Stage,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        crash(config, BETWEEN_COMMITS)
        (config.parent / "shop_of_test.py").write_text(
            "from coordinator import Coordinator\n"
            f"coordinator = Coordinator.from_config({str(config)!r})\n"
        )
        monkeypatch.chdir(config.parent)
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert main(["recover", "--app", "shop_of_test:coordinator"]) == 0
        assert "1 committed" in capsys.readouterr().out
        assert stage.prepared() == []
