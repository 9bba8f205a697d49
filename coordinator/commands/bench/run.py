"""The whole benchmark: servers, parts, a bar, and what came out."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from coordinator.commands.bench.cases import CASES, GROWTH, LOG, TRANSFERS, cases_for
from coordinator.commands.bench.growth import CLIENTS as GROWTH_CLIENTS
from coordinator.commands.bench.growth import Growth
from coordinator.commands.bench.log_alone import LogAlone
from coordinator.commands.bench.results import Result
from coordinator.commands.bench.steps import Part
from coordinator.commands.bench.tables import print_results
from coordinator.commands.bench.transfers import Transfers
from coordinator.commands.bench.workload import Databases
from coordinator.commands.output import messages, progress_bar
from coordinator.commands.servers import server_version, two_servers
from coordinator.errors import ConfigurationError

_FSYNCS = 50
_BLOCK = bytes(4096)


def run(
    *,
    clients: Sequence[int],
    rounds: int,
    seconds: float,
    only: Collection[str],
    finished: int,
    as_json: bool,
) -> int:
    """Measure what `only` names, on servers started for it, and tell what came out.

    Interrupted, it tells what had been measured until then, and raises `KeyboardInterrupt` again.
    """
    _check(clients, only)
    interrupted = False
    parts: list[Part] = []
    with ExitStack() as stack:
        name = tempfile.TemporaryDirectory(prefix="syncpoint-bench-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(name))
        machine = _machine(folder)
        if GROWTH in only or TRANSFERS in only or CASES.keys() & only:
            databases = _databases(stack, max(*clients, GROWTH_CLIENTS))
            machine += f", PostgreSQL {server_version(databases.urls[0])}"
            if any(cases_for(number, only) for number in clients):
                parts.append(Transfers(databases, clients, rounds, seconds, only))
        if LOG in only:
            parts.append(LogAlone(rounds, seconds, folder))
        if GROWTH in only:
            parts.append(Growth(databases, rounds, seconds, finished, folder))
        try:
            _measure(parts)
        except KeyboardInterrupt:
            interrupted = True
    found: list[Result] = [result for part in parts for result in part.results()]
    print_results(found, machine, as_json=as_json)
    if interrupted:
        raise KeyboardInterrupt
    return 0


def _check(clients: Sequence[int], only: Collection[str]) -> None:
    if not {LOG, GROWTH} & set(only) and not any(cases_for(number, only) for number in clients):
        raise ConfigurationError(
            f"--only {','.join(only)}: with so few clients these bounds bound nothing; give more "
            "--clients than the bound"
        )


def _databases(stack: ExitStack, clients: int) -> Databases:
    slots = 2 * clients + 16
    settings = {"max_connections": str(slots + 16)}
    servers = stack.enter_context(two_servers(slots, settings))
    processes = [server.process_id for server in servers]
    return Databases(
        tuple(server.create_database("bench") for server in servers),
        tuple(process for process in processes if process is not None),
    )


def _measure(parts: Sequence[Part]) -> None:
    steps = [step for part in parts for step in part.steps()]
    bar = progress_bar(messages())
    # Drawn between measurements only: a thread that draws it would take time from them.
    bar.live.auto_refresh = False
    with bar:
        task = bar.add_task("measuring", total=len(steps))
        for step in steps:
            bar.update(task, description=step.label, refresh=True)
            step.do()
            bar.advance(task)


def _machine(folder: Path) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cores} cores, {platform.system()} {platform.machine()}, {_fsync(folder)}, "
        f"{platform.python_implementation()} {platform.python_version()}"
    )


def _fsync(folder: Path) -> str:
    """What it takes where the logs are."""
    times = []
    with (folder / "probe").open("wb", buffering=0) as file:
        for _ in range(_FSYNCS):
            file.write(_BLOCK)
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return f"{statistics.median(times) * 1000:.2f} ms an fsync"
