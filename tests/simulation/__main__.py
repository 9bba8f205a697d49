"""Run, replay and shrink simulated worlds: `python -m tests.simulation --help`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Generator

from tests.simulation.bugs import BUGS, BY_NAME, Bug
from tests.simulation.faults import KINDS, Options
from tests.simulation.runner import Failure, Summary, replay, run_seeds
from tests.simulation.scenarios import FLOOR_SEEDS, missed
from tests.simulation.shrink import shrink
from tests.simulation.world import REAL, Parts

BUG_SEEDS_MOST = 2_000
COMMAND = "python -m tests.simulation"
FAILURES_MOST = 10
"""A run goes on behind bad worlds, but not behind more than so many."""

QUIET_SECONDS = 10.0
_BLOCK = 100


def main() -> int:
    arguments = _parse()
    if arguments.list_bugs:
        for bug in BUGS:
            print(f"{bug.name:28} {bug.rule}")
        return 0
    if arguments.bug_table:
        return bug_table()
    if arguments.seed is not None:
        return replay_one(arguments)
    return run_many(arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many worlds to run")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that share the seeds, unless it is said one for each core",
    )
    parser.add_argument("--seed", type=int, help="replay this one world with its trace")
    parser.add_argument("--bug", choices=sorted(BY_NAME), help="plant this bug")
    parser.add_argument("--drop", default="", help="kinds of faults to leave out")
    parser.add_argument("--only", help="numbers of the transactions to keep, or none")
    parser.add_argument("--safety", type=float, help="seconds of faults")
    parser.add_argument("--salt", type=int, default=0, help="another order of events")
    parser.add_argument("--no-shrink", action="store_true", help="show the failing world as it is")
    parser.add_argument("--trace", action="store_true", help="print the trace of a passing world")
    parser.add_argument("--list-bugs", action="store_true", help="name the planted bugs")
    parser.add_argument(
        "--bug-table", action="store_true", help="find every planted bug and say how soon"
    )
    return parser.parse_args()


# Many seeds.


def run_many(arguments: argparse.Namespace) -> int:
    """0 when every world was good and all was reached, 1 when not, 130 when interrupted."""
    bug = arguments.bug or ""
    total, done = Summary(), 0
    began = time.perf_counter()
    interrupted = False
    work = _work(arguments.start, arguments.seeds, bug, arguments.jobs)
    try:
        for summary in work:
            total.add(summary)
            done += summary.seeds
            _progress(done, arguments.seeds, began, len(total.failures))
            _show_failures(summary.failures, bug)
            if total.failures and (bug or len(total.failures) >= FAILURES_MOST):
                break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        work.close()
    total.seconds = time.perf_counter() - began
    if done:
        print_summary(total)
    if interrupted:
        left = arguments.seeds - done
        print(f"interrupted; go on with: {COMMAND} --start {arguments.start + done} --seeds {left}")
    return _verdict(total, bug, interrupted=interrupted, shrunk=not arguments.no_shrink)


def _work(start: int, seeds: int, bug: str, jobs: int) -> Generator[Summary, None, None]:
    """Summaries of blocks of worlds, in the order of their seeds."""
    end = start + seeds
    blocks = [(each, min(each + _BLOCK, end), bug) for each in range(start, end, _BLOCK)]
    if jobs <= 1:
        yield from map(_run_block, blocks)
        return
    with multiprocessing.get_context("fork").Pool(jobs, _ignore_interrupts) as pool:
        yield from pool.imap(_run_block, blocks)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the others


def _run_block(block: tuple[int, int, str]) -> Summary:
    start, end, bug = block
    parts = BY_NAME[bug].parts if bug else REAL
    return run_seeds(range(start, end), parts, stop_at_failure=bool(bug))


def _progress(done: int, of: int, began: float, failures: int) -> None:
    seconds = time.perf_counter() - began
    rate = done / seconds
    line = f"{done} of {of} worlds, {rate:.0f} a second, {_clock((of - done) / rate)} left"
    if failures:
        line += f", {failures} bad"
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    elif seconds >= _progress_due[0] or done >= of:
        _progress_due[0] = seconds + QUIET_SECONDS
        print(line, file=sys.stderr, flush=True)


_progress_due = [0.0]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}"


def _show_failures(failures: list[tuple[int, str, str]], bug: str) -> None:
    for seed, name, detail in failures:
        print(f"\nseed {seed}: {name}: {detail}\nreplay: {Options(seed).command(bug)}", flush=True)


def _verdict(total: Summary, bug: str, *, interrupted: bool, shrunk: bool) -> int:
    if total.failures:
        seed = min(total.failures)[0]
        parts = BY_NAME[bug].parts if bug else REAL
        failure = replay(Options(seed), parts)
        if failure is None:
            print(f"seed {seed} failed once and passes now: the simulation is not deterministic")
        else:
            print_failure(failure, parts, bug, shrunk=shrunk and not interrupted)
        print(f"bad worlds: {', '.join(str(seed) for seed, _, _ in sorted(total.failures))}")
        return 1
    lines = [] if bug or total.seeds < FLOOR_SEEDS else missed(total)
    for line in lines:
        print(f"reached too rarely: {line}")
    if interrupted:
        return 130
    print(f"{total.seeds} worlds, and none of them broke an invariant")
    return 1 if lines else 0


def print_summary(summary: Summary) -> None:
    print(
        f"\n{summary.seeds} worlds in {summary.seconds:.1f} s: "
        f"{summary.seeds / summary.seconds:.0f} a second, "
        f"{summary.events / max(summary.seeds, 1):.0f} events each"
    )
    told = ", ".join(f"{name} {summary.share(name):.1%}" for name in sorted(summary.outcomes))
    print(f"clients were told: {told}")
    for name in sorted(summary.counts):
        print(f"{summary.counts[name]:10}  {name}")


# One seed.


def replay_one(arguments: argparse.Namespace) -> int:
    dropped = tuple(kind for kind in arguments.drop.split(",") if kind)
    unknown = [kind for kind in dropped if kind not in KINDS]
    if unknown:
        print(f"unknown kind of fault {unknown[0]!r}: there are {', '.join(KINDS)}")
        return 2
    only = None
    if arguments.only is not None:
        only = tuple(int(n) for n in arguments.only.split(",") if n and n != "none")
    options = Options(
        arguments.seed, dropped=dropped, only=only, safety=arguments.safety, salt=arguments.salt
    )
    parts = BY_NAME[arguments.bug].parts if arguments.bug else REAL
    failure = replay(options, parts)
    if failure is not None:
        shrinks = not arguments.no_shrink and only is None and not dropped
        print_failure(failure, parts, arguments.bug or "", shrunk=shrinks)
        return 1
    if arguments.trace:
        _print_trace(options, parts)
    print(f"seed {arguments.seed} passes: {options.describe()}")
    return 0


def _print_trace(options: Options, parts: Parts) -> None:
    from tests.simulation.world import World

    trace: list[str] = []
    World(options, parts, trace).run()
    print("\n".join(trace))


def print_failure(failure: Failure, parts: Parts, bug: str, *, shrunk: bool) -> None:
    options = failure.options
    if shrunk:
        print(f"seed {options.seed}: {failure.violation}")
        print(f"replay: {options.command(bug)} --no-shrink")
        smaller = replay(shrink(options, failure.violation.name, parts), parts)
        failure = smaller or failure
        options = failure.options
    print(f"\n{options.describe()}")
    print("\n".join(failure.trace))
    print(f"\n{failure.violation}")
    print(f"replay: {options.command(bug)}")


# Planted bugs.


def find_bug(bug: Bug, most: int = BUG_SEEDS_MOST) -> tuple[int, str] | None:
    """The seeds from the first one until the bug is found, and the invariant that found it."""
    summary = run_seeds(
        range(bug.first_seed, bug.first_seed + most), bug.parts, stop_at_failure=True
    )
    if not summary.failures:
        return None
    return summary.seeds, summary.failures[0][1]


def bug_table() -> int:
    print("| planted bug | rule that it breaks | found by | after seeds |\n|---|---|---|---|")
    missed = 0
    for bug in BUGS:
        found = find_bug(bug)
        missed += found is None
        seeds, name = found or (BUG_SEEDS_MOST, "**nothing**")
        print(f"| {bug.name} | {bug.rule} | {name} | {bug.first_seed + seeds} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
