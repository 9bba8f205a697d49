"""5,000 simulated worlds, none of which breaks an invariant, and what they must have reached.

`SYNCPOINT_SEED` (a number, for instance of a CI run) chooses other worlds; without it they are the
same in every run. A million: `make simulate SEEDS=1000000`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.model import Outcome
from tests.simulation.faults import Options
from tests.simulation.runner import Summary
from tests.simulation.scenarios import FLOOR_SEEDS, SCENARIOS, missed
from tests.simulation.world import World

ROOT = Path(__file__).parents[2]
START = 1_000_000 * int(os.environ.get("SYNCPOINT_SEED", "0"))


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.simulation", *map(str, arguments)]


@pytest.mark.timeout(400)
def test_no_invariant_breaks_and_all_is_reached() -> None:
    command = _command("--seeds", FLOOR_SEEDS, "--start", START, "--jobs", 2)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


def test_what_is_reached_too_rarely_is_said() -> None:
    summary = Summary()
    summary.seeds = 2 * FLOOR_SEEDS
    summary.counts = dict.fromkeys(SCENARIOS, 200)
    summary.outcomes = {"committed": 60, "aborted": 38, "unknown": 1, "heuristic": 1}
    assert missed(summary) == []
    summary.counts["S03 a crash with all votes in hand"] = 199
    summary.outcomes["heuristic"] = 0
    assert missed(summary) == [
        "S03 a crash with all votes in hand: 199 times in 10000 worlds, expected 200",
        "heuristic told: 0.0%, expected 0.2%",
    ]


def test_a_bad_world_is_named_with_the_command_that_replays_it() -> None:
    command = _command("--seeds", 20, "--jobs", 1, "--bug", "last-writer-wins", "--no-shrink")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    replay = re.search(r"^replay: python -m (tests.simulation --seed .*)$", done.stdout, re.M)
    assert replay is not None
    again = [sys.executable, "-m", *replay[1].split(), "--no-shrink"]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "I3 (irrevocability" in done.stdout


def test_an_interrupted_run_says_how_far_it_came() -> None:
    process = subprocess.Popen(
        _command("--seeds", 1_000_000, "--start", 7_000, "--jobs", 2),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.readline()  # the first progress
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    worlds = re.search(r"^(\d+) worlds in ", output, re.M)
    assert worlds is not None
    done = int(worlds[1])
    assert f"--start {7_000 + done} --seeds {1_000_000 - done}" in output


def _history(seed: int) -> str:
    trace: list[str] = []
    World(Options(seed), trace=trace).run()
    return "\n".join(trace)


def test_the_same_seed_gives_the_same_history() -> None:
    assert _history(7) == _history(7)
    assert _history(7) != _history(8)


def test_the_trace_changes_nothing() -> None:
    seen, unseen = World(Options(11), trace=[]), World(Options(11))
    seen.run()
    unseen.run()
    assert seen.sequence == unseen.sequence
    assert seen.counts == unseen.counts
    assert Outcome.COMMITTED.value in unseen.outcomes


def test_the_history_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "import hashlib\n"
        "from tests.simulation.test_seeds import _history\n"
        "text = ''.join(_history(seed) for seed in (3, 5, 9, 12))\n"
        "print(hashlib.sha256(text.encode()).hexdigest())\n"
    )
    digests = []
    for hash_seed in ("0", "1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.append(done.stdout)
    assert len(set(digests)) == 1
