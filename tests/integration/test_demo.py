"""The demonstration and the README's example, run as a user runs them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from participants.postgres.embedded import EmbeddedServer

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(REPOSITORY),
    "PYTHONUNBUFFERED": "1",
    "COLUMNS": "100",
    "NO_COLOR": "1",
}


def run(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=cwd, timeout=100,
    )  # fmt: skip


@pytest.fixture(scope="module")
def told() -> str:
    """What the demonstration prints."""
    finished = run("-m", "coordinator", "demo", "--transfers", "40")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stderr == ""
    return finished.stdout


class TestDemo:
    def test_the_crash_by_hand_loses_money_and_leaves_a_nameless_lock(self, told: str) -> None:
        by_hand = told[told.index("written by hand") : told.index("The same crash")]
        assert "39,900. 100 are gone" in by_hand
        assert re.search(r"Left behind in ledger: _sa_[0-9a-f]{32}", by_hand)
        assert "canceling statement due to lock timeout" in by_hand

    def test_the_same_crash_with_syncpoint_is_recovered(self, told: str) -> None:
        between = told[told.index("The same crash") : told.index("Killed a little earlier")]
        assert "39,900. 100 are gone for the moment" in between
        assert re.search(r"In doubt in ledger:\s+sp:[0-9a-f]{16}:", between)
        assert "1 committed, 0 rolled back, 0 still in doubt" in between
        assert re.search(r"Recovered in [0-9.]+ s\. All the money together: 40,000", between)

    def test_before_the_decision_it_is_rolled_back(self, told: str) -> None:
        earlier = told[told.index("Killed a little earlier") : told.index("What was found")]
        assert len(re.findall(r"In doubt in \w+:\s+sp:", earlier)) == 2
        assert "0 committed, 1 rolled back, 0 still in doubt" in earlier

    def test_the_table_at_the_end_compares_what_was_measured(self, told: str) -> None:
        table = told[told.index("What was found") :]
        rows = {cells[0]: cells[1:] for cells in re.findall(r"^  (\w.*?)   +(.*)$", table, re.M)}
        assert rows["branches in doubt then"][0].split() == ["1", "0", "0"]
        assert rows["money before the crash"][0].split() == ["40,000"] * 3
        assert rows["money after the crash"][0].split() == ["39,900", "39,900", "40,000"]
        assert rows["locks left then"][0].split()[1:] == ["0", "0"]
        assert "never by itself" in rows["seconds to recover"][0]

    def test_without_a_terminal_there_is_neither_colour_nor_a_bar(self, told: str) -> None:
        assert "\x1b" not in told
        assert all(len(line) <= 100 for line in told.splitlines())


@pytest.fixture
def running_demo() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "coordinator", "demo", "--transfers", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=REPOSITORY,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "syncpoint: interrupted"), (signal.SIGTERM, 143, "")],
)
def test_an_interrupted_demo_stops_its_servers(
    running_demo: subprocess.Popen[str], number: signal.Signals, code: int, said: str
) -> None:
    assert running_demo.stdout is not None
    ports: list[int] = []
    for line in running_demo.stdout:
        ports += [int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", line)]
        if "transfers with Syncpoint" in line:
            break
    assert len(ports) == 2
    running_demo.send_signal(number)
    _, errors = running_demo.communicate(timeout=30)
    assert (running_demo.returncode, errors.count("\n")) == (code, 1 if said else 0)
    assert errors.startswith(said)
    for port in ports:
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0


def test_the_example_of_the_readme_runs(
    tmp_path: Path, postgres_servers: tuple[EmbeddedServer, EmbeddedServer]
) -> None:
    urls = [server.start().create_database("example") for server in postgres_servers]
    finished = run(str(REPOSITORY / "examples" / "transfer.py"), *urls, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == ["account: [('alice', 70)]", "entry: [('bob', 30)]"]
