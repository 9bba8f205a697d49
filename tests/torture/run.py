"""A whole run: start everything, torture it, heal it, recover, look at what is there, judge it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psycopg

from tests.torture.checker import GAP_SECONDS_MAX, Violation, check
from tests.torture.evidence import Observer, collect, load, recovered_by_sweeps
from tests.torture.faults import KINDS, log_held
from tests.torture.history import Tail
from tests.torture.nemesis import Nemesis
from tests.torture.stage import Stage
from tests.torture.values import DATABASES, Asked, Evidence, Invoked, Options, Told

PROGRESS_SECONDS = 5.0
CALM_SECONDS_MAX = 20.0
CALM_COMMITS_EACH = 5
"""So many commits a process are waited for when the faults are over, before it is stopped."""
RECOVERY_SECONDS_MAX = 30
WAITING_SECONDS_MAX = 4.0

Say = Callable[[str], None]


async def torture(
    options: Options,
    folder: Path,
    say: Say,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    stop: asyncio.Event | None = None,
) -> None:
    """Leaves everything that `judge` needs in the folder. `stop` ends the faults early."""
    stop = stop or asyncio.Event()
    async with Stage(options, folder) as stage:
        observer = Observer(stage)
        await observer.start()
        try:
            nemesis = Nemesis(stage, kinds)
            tail = Tail(folder / "history")
            telling = asyncio.create_task(_keep_telling(stage, nemesis, tail, say))
            try:
                await _commits(stage, tail, each=1)
                await nemesis.run(options.seconds, stop)
            finally:
                telling.cancel()
            await _end(stage, observer, tail, say)
        finally:
            await observer.close()


async def _end(stage: Stage, observer: Observer, tail: Tail, say: Say) -> None:
    say("the faults are over: the clients go on for a while")
    calm = await _commits(stage, tail, each=CALM_COMMITS_EACH)
    say(f"{calm} commits in calm; half of the processes are stopped, then the others killed")
    close_seconds = await _end_clients(stage)
    code, output = await stage.command("recover", "--wait", str(RECOVERY_SECONDS_MAX), "--json")
    report = json.loads(output)
    last = report["committed"] + report["rolled_back"]
    by_sweeps = recovered_by_sweeps(stage.folder / "clients")
    await observer.stop()
    await collect(
        stage,
        observer,
        recover_exit=code,
        recovered_by_sweeps=by_sweeps,
        recovered_by_command=last,
        calm_commits=calm,
        close_seconds=close_seconds,
    )


async def _commits(stage: Stage, tail: Tail, *, each: int) -> int:
    """Wait until so many more commits a process were told; returns how many were, in a while."""
    before = tail.look().get("committed", 0)
    give_up = time.monotonic() + CALM_SECONDS_MAX
    while True:
        done = tail.look().get("committed", 0) - before
        if done >= each * len(stage.slots) or time.monotonic() > give_up:
            return done
        await asyncio.sleep(0.1)


async def _end_clients(stage: Stage) -> float:
    """Stop half of the processes in order; then kill the others while their branches wait.

    So `syncpoint recover` has something to do for certain. Returns how many seconds the slowest of
    the first took to end.
    """
    half = random.Random(f"{stage.options.seed} end").sample(stage.slots, len(stage.slots) // 2)
    began = time.monotonic()
    await asyncio.gather(*(slot.end(signal.SIGTERM) for slot in half))
    close_seconds = time.monotonic() - began
    async with log_held(stage):
        give_up = time.monotonic() + WAITING_SECONDS_MAX
        while await _prepared(stage) < len(stage.slots) and time.monotonic() < give_up:
            await asyncio.sleep(0.1)
        await asyncio.gather(*(slot.end(signal.SIGKILL) for slot in stage.slots))
    return close_seconds


async def _prepared(stage: Stage) -> int:
    """How many branches are prepared, but for those of strangers."""
    count = -len(stage.planted)
    for number in range(len(DATABASES)):
        url = stage.direct(number)
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as session:
            cursor = await session.execute("SELECT count(*) FROM pg_prepared_xacts")
            count += (await cursor.fetchone() or (0,))[0]
    return count


async def _keep_telling(stage: Stage, nemesis: Nemesis, tail: Tail, say: Say) -> None:
    while True:
        await asyncio.sleep(PROGRESS_SECONDS)
        counts = await asyncio.to_thread(tail.look)
        since = round(time.monotonic() - stage.epoch)
        faults = nemesis.counts()
        say(
            f"{since // 60:02}:{since % 60:02}  {counts.get('invoked', 0)} operations: "
            f"{_outcomes(counts)}; {faults.total()} faults of {len(faults)} kinds"
        )


def _outcomes(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[each]} {each}" for each in sorted(counts) if each != "invoked")


class Judgement(msgspec.Struct, frozen=True):
    """What the checker found, and what the run consisted of."""

    violations: tuple[Violation, ...]
    operations: int
    outcomes: dict[str, int]
    faults: dict[str, int]
    recovered_by_sweeps: int
    recovered_by_command: int
    statuses: int
    records: int
    longest_gap: float
    close_seconds: float

    @property
    def seen(self) -> str:
        """In a few lines."""
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        long = " (too long: I5 was not checked)" if self.longest_gap > GAP_SECONDS_MAX else ""
        return (
            f"{self.operations} operations: {_outcomes(self.outcomes)}\n"
            f"{sum(self.faults.values())} faults: {faults or 'none'}\n"
            f"{self.recovered_by_sweeps} transactions recovered by sweeps, "
            f"{self.recovered_by_command} by `syncpoint recover` at the end\n"
            f"{self.records} decisions and {self.statuses} statuses seen; longest pause between "
            f"two looks at the log {self.longest_gap:.1f} s{long}; the slowest client process "
            f"took {self.close_seconds:.1f} s to end"
        )


def judge(folder: Path) -> Judgement:
    """Check the folder of a run, now or later."""
    evidence = load(folder)
    outcomes = outcomes_of(evidence)
    return Judgement(
        violations=tuple(check(evidence)),
        operations=sum(outcomes.values()),
        outcomes=dict(outcomes),
        faults=dict(Counter(fault.kind for fault in evidence.faults)),
        recovered_by_sweeps=evidence.found.recovered_by_sweeps,
        recovered_by_command=evidence.found.recovered_by_command,
        statuses=sum(
            isinstance(line, Asked) for history in evidence.histories for line in history.lines
        ),
        records=len(evidence.found.records),
        longest_gap=evidence.found.longest_gap,
        close_seconds=evidence.found.close_seconds,
    )


def outcomes_of(evidence: Evidence) -> Counter[str]:
    """What callers were told; who was killed before it was told anything counts as `cut off`."""
    outcomes: Counter[str] = Counter()
    for history in evidence.histories:
        asked = {line.op for line in history.lines if isinstance(line, Invoked)}
        told = {line.op: line.outcome for line in history.lines if isinstance(line, Told)}
        outcomes.update(told.values())
        outcomes["cut off"] += len(asked - told.keys())
    return outcomes
