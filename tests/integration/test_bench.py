"""`syncpoint bench` as a user runs it, with measurements so short that they mean nothing.

No figure of speed is asserted: only what is there, what was counted, and that nothing is believed
when money was lost.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

from coordinator.cli import main
from coordinator.commands.bench import cases, run
from coordinator.commands.bench.handwritten import BestEffort, OneDatabase, TwoPhase
from coordinator.commands.bench.one_process import Order, measure_apart
from coordinator.commands.bench.syncpoint import Syncpoint
from coordinator.commands.bench.workload import MOVE, Case, Databases, measure
from coordinator.errors import TransactionError
from participants.postgres.embedded import EmbeddedServer

SECONDS = 0.05


@pytest.fixture(scope="module")
def databases(postgres_servers: tuple[EmbeddedServer, EmbeddedServer]) -> Databases:
    servers = [server.start() for server in postgres_servers]
    return Databases(
        tuple(server.create_database("bench") for server in servers),
        tuple(server.process_id or 0 for server in servers),
    )


def bench(*arguments: str) -> int:
    return main(["bench", "--rounds", "1", "--seconds", str(SECONDS), *arguments])


@pytest.fixture
def on_servers_of_tests(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that run already, to save the seconds that it takes to start some."""
    monkeypatch.setattr(run, "_databases", lambda stack, clients: databases)


def test_json_has_an_object_a_line_for_every_case_of_every_part(
    on_servers_of_tests: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--json", "--clients", "1,12", "--finished", "40") == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    lines: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    plain = ["best-effort", "one-database"]
    assert [(line["clients"], line["case"]) for line in lines] == [
        *((1, name) for name in ("by-hand-unbounded", "syncpoint-sqlite", *plain)),
        *((12, name) for name in ("by-hand-unbounded", "by-hand-8")),
        *((12, name) for name in ("syncpoint-sqlite", "syncpoint-sqlite-8", *plain)),
        *((proposers, "log") for proposers in (1, 16, 64)),
        *((32, f"growth-{which}") for which in ("empty", "kept", "forgetting")),
        (None, "bars"),
    ]
    for line in lines:
        assert {"case", "clients", "per_second", "p50_ms", "p99_ms"} <= line.keys()
        assert "PostgreSQL" in line["machine"] and "an fsync" in line["machine"]
    *rows, bars = lines
    for row in rows:
        assert row["per_second"] > 0 and 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["per_second_lowest"] == row["per_second"] == row["per_second_highest"]
        assert row["rounds"] == 1 and row["cpu_ms"] > 0
    _check_transfers(rows)
    _check_growth([row for row in rows if row["case"].startswith("growth")])
    assert len(bars["bars"]) >= 5
    assert all(type(bar["met"]) is bool for bar in bars["bars"])


def _check_transfers(rows: list[dict[str, Any]]) -> None:
    by_name = {(row["case"], row["clients"]): row for row in rows}
    alone = by_name["syncpoint-sqlite", 1]
    assert alone["log_writes"] == by_name["log", 1]["log_writes"] == 1.0
    assert alone["lazy_writes"] >= 0 and alone["fsyncs"] >= 1.0
    assert alone["baseline"] == "by-hand-unbounded"
    for (name, _), row in by_name.items():
        if name.startswith("by-hand") or name in ("best-effort", "one-database"):
            assert "log_writes" not in row
        if row.get("baseline") == name:
            assert row["ratio_to_baseline"] == row["p50_to_baseline"] == 1
    assert by_name["by-hand-unbounded", 12]["ratio_to_unbounded"] == 1
    assert 0 < by_name["log", 64]["fsyncs"] < 1, "64 proposers shared nothing"


def _check_growth(rows: list[dict[str, Any]]) -> None:
    empty, *old = rows
    assert "baseline" not in empty
    for row in old:
        assert row["baseline"] == "growth-empty" and row["ratio_to_baseline"] > 0
        if "memory_mb" in row:
            more = row["memory_mb"] - empty["memory_mb"]
            assert row["memory_more_mb"] == pytest.approx(more, abs=0.01)


def test_tables_have_what_was_asked_for_and_the_bars(
    on_servers_of_tests: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--only", "by-hand-8,syncpoint-sqlite", "--clients", "2") == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert all(len(line) <= 100 and line == line.rstrip() for line in output.splitlines())
    # With two clients the bound bounds nothing: the loop without one stands in.
    rows = re.findall(r"^ (\S+) +\d", output, re.M)
    assert rows == ["by-hand-unbounded", "syncpoint-sqlite"]
    assert "The decision log alone" not in output and "long been in use" not in output


def test_the_log_alone_needs_no_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(EmbeddedServer, "start", lambda self: pytest.fail("a server was started"))
    assert bench("--only", "log") == 0
    output = capsys.readouterr().out
    assert re.findall(r"^ (\d+) ", output, re.M) == ["1", "16", "64"]
    assert re.search(r"fsyncs a decision, 64 proposers +≤ 0.05 +[0-9.]+ +(not )?met", output)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clients", "1,x"], "write numbers, such as 1,8,32"),
        (["--clients", "257"], "each is 1 to 256"),
        (["--only", "by-hand-9"], "there is no case 'by-hand-9'; the parts are transfers, log"),
        (["--only", "syncpoint-sqlite-8", "--clients", "1,8"], "give more --clients"),
        (["--rounds", "0"], "see `syncpoint bench --help`"),
        (["--seconds", "0"], "see `syncpoint bench --help`"),
        (["--finished", "0"], "see `syncpoint bench --help`"),
    ],
)
def test_a_wrong_option_is_one_line_and_starts_nothing(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(EmbeddedServer, "start", lambda self: pytest.fail("a server was started"))
    assert main(["bench", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert said in errors


class Interrupting(OneDatabase):
    """The person presses Ctrl-C in the third transfer of the second measurement."""

    def __init__(self, opened: Callable[[], int]) -> None:
        super().__init__(None)
        self._interrupts = opened() == 2
        self._transfers = itertools.count(1)

    async def transfer(self, source: int, target: int) -> None:
        await super().transfer(source, target)
        if self._interrupts and next(self._transfers) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            try:
                await asyncio.sleep(60)
            finally:
                raise OSError("a client that is interrupted may fail as well")


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Whoever starts the tests in the background may have had it ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_tells_what_was_measured_until_then(
    databases: Databases, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped: list[str] = []

    def servers(stack: ExitStack, clients: int) -> Databases:
        stack.callback(stopped.append, "the servers")
        return databases

    monkeypatch.setattr(run, "_databases", servers)
    opened = itertools.count(1).__next__
    monkeypatch.setitem(cases.CASES, "one-database", lambda: Interrupting(opened))
    only = ("--only", "one-database,best-effort", "--clients", "2", "--rounds", "3")
    assert bench(*only, "--json") == 130
    output, errors = capsys.readouterr()
    # The order turns: in the second round the interrupting one comes first.
    assert [(row["case"], row["rounds"]) for row in map(json.loads, output.splitlines())] == [
        ("best-effort", 1),
        ("one-database", 1),
    ]
    assert errors.startswith("syncpoint: interrupted") and errors.count("\n") == 1
    assert stopped == ["the servers"]


# Nothing is believed when money was lost.


class Planted(Case):
    """A case that is wrong in its second transfer, or never."""

    def __init__(self, wrong: str) -> None:
        self._wrong = wrong
        self._numbers = itertools.count(1)

    async def open(self, urls: Sequence[str], clients: int) -> None:
        self._urls = urls

    async def transfer(self, source: int, target: int) -> None:
        await asyncio.to_thread(self._transfer, source, target, next(self._numbers) == 2)

    async def close(self) -> None:
        pass

    def _transfer(self, source: int, target: int, goes_wrong: bool) -> None:
        wrong = self._wrong if goes_wrong else None
        if wrong == "raises":
            raise OSError("the cable was pulled")
        amounts = {"does nothing": (0, 0), "wins": (-1, 2), "moves back": (1, -1)}
        first, second = amounts.get(wrong or "", (-1, 1))
        with psycopg.connect(self._urls[0], autocommit=True) as connection:
            connection.execute(MOVE, (first, source))
        with psycopg.connect(self._urls[1], autocommit=True) as connection:
            connection.execute("BEGIN")
            connection.execute(MOVE, (second, target))
            connection.execute({"loses": "ROLLBACK"}.get(wrong or "", "COMMIT"))
            if wrong == "in doubt":
                connection.execute("BEGIN")
                connection.execute(MOVE, (0, target))
                connection.execute("PREPARE TRANSACTION 'left'")


@pytest.mark.parametrize(
    "wrong", ["loses", "wins", "does nothing", "moves back", "in doubt", "raises"]
)
def test_a_case_that_is_wrong_once_is_found(wrong: str, databases: Databases) -> None:
    said = "the cable was pulled" if wrong == "raises" else "the numbers mean nothing"
    try:
        with pytest.raises(TransactionError, match=said):
            measure(Planted(wrong), databases, 1, SECONDS)
    finally:
        if wrong == "in doubt":
            with psycopg.connect(databases.urls[1], autocommit=True) as connection:
                connection.execute("ROLLBACK PREPARED 'left'")


@pytest.mark.parametrize(
    "case",
    [Planted(""), TwoPhase(None), TwoPhase(2), BestEffort(2), OneDatabase(2), Syncpoint(2)],
    ids=lambda case: type(case).__name__,
)
def test_a_case_that_is_right_is_believed(case: Case, databases: Databases) -> None:
    found = measure(case, databases, 4, SECONDS)
    assert found.per_second > 0
    assert found.servers_cpu_ms is None or found.servers_cpu_ms > 0


def test_a_process_of_its_own_that_fails_is_told_in_one_line(databases: Databases) -> None:
    order = Order(databases, clients=1, seconds=SECONDS, log="/nowhere/log.db", retention=900)
    with pytest.raises(TransactionError, match="there is no directory /nowhere") as caught:
        measure_apart(order)
    assert "\n" not in str(caught.value)
