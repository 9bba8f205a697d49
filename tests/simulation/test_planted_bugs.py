"""Every planted bug is found, so every checker is known to see; and the finding can be replayed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.simulation.__main__ import find_bug
from tests.simulation.bugs import BUGS, BY_NAME, Bug
from tests.simulation.checkers import INVARIANTS
from tests.simulation.faults import Options
from tests.simulation.runner import replay, run_seeds
from tests.simulation.shrink import shrink

EXPECTED_MOST = 2_000


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_bug_is_found(bug: Bug, record_property: Callable[[str, object], None]) -> None:
    found = find_bug(bug, EXPECTED_MOST)
    assert found is not None, f"{bug.name} is not found in {EXPECTED_MOST} seeds: {bug.rule}"
    seeds, invariant = found
    assert invariant in INVARIANTS
    record_property("seeds", seeds)
    record_property("invariant", invariant)


def test_a_failing_world_shrinks_and_replays() -> None:
    bug = BY_NAME["commit-all-prepared"]
    summary = run_seeds(range(EXPECTED_MOST), bug.parts, stop_at_failure=True)
    seed, invariant, _ = summary.failures[0]
    small = shrink(Options(seed), invariant, bug.parts)
    failure = replay(small, bug.parts)
    assert failure is not None
    assert failure.violation.name == invariant
    assert small.only is not None
    assert len(small.only) <= 3
    assert f"--seed {seed} --bug {bug.name}" in small.command(bug.name)
