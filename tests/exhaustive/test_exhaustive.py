"""Every state of the real core, log and horizon within bounds; and bugs that the search must find.

Larger bounds: `make exhaustive`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.exhaustive.bounds import LOCAL, SMALL, Bounds, Place
from tests.exhaustive.moves import Searched
from tests.exhaustive.planted import PLANTED, Planted
from tests.exhaustive.search import reached, search
from tests.exhaustive.state import Draft, State
from tests.exhaustive.sweeping import IDLE, Stage
from tests.simulation.checkers import INVARIANTS

Record = Callable[[str, object], None]


@pytest.mark.parametrize("name", SMALL)
def test_no_state_breaks_an_invariant(name: str, record_property: Record) -> None:
    found = search(Searched(SMALL[name]))
    assert found.violation is None, found.story()
    assert found.states > 1_000
    record_property("states", found.states)
    print(f"{name}: {found.states} states")


@pytest.mark.parametrize("planted", PLANTED, ids=[planted.name for planted in PLANTED])
def test_planted_bug_is_found(planted: Planted, record_property: Record) -> None:
    found = planted.find()
    assert found.violation is not None, f"{planted.name} is not found: {planted.rule}"
    assert found.violation.name in INVARIANTS
    assert found.trace[0] == "begins"
    record_property("states", found.states)
    record_property("invariant", found.violation.name)


class Unreduced(Searched):
    """Without all that the search leaves out because it can make no difference.

    Answers are messages, nothing is over before it was received, the horizon rises and records go
    in steps of their own, and a sweep scans resource by resource.
    """

    def tidy(self, draft: Draft) -> None:
        """Nothing is put away."""

    def forgets(self, state: State, to: Any = None) -> Iterator[tuple[Any, bool, Draft]]:
        for name, operation in (
            (("raise", to), lambda log: log.raise_horizon(to)),
            ("forget", lambda log: log.forget(1000, claims_before_ms=0)),
        ):
            draft = Draft(state)
            self.change_log(draft, name, operation)
            if draft.log != state.log:
                yield self.note("the log changes"), False, draft

    def sweep_steps(
        self, state: State, stage: Stage, sender: int
    ) -> Iterator[tuple[Stage, str, Draft]]:
        if stage.kind != "idle":
            steps = list(super().sweep_steps(state, stage, sender))
            yield from steps or [(IDLE, "rests", Draft(state))]
            return
        yield from self.scans(state, stage, sender)


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds((Place("A"),), faults=1, crashes=0),
        Bounds((Place("A"),), faults=0, crashes=1),
        Bounds(LOCAL, faults=0, crashes=0, sweep_crashes=0),
    ],
    ids=["one branch, a fault", "one branch, crashes", "two branches"],
)
def test_what_is_left_out_makes_no_difference(bounds: Bounds) -> None:
    """The branches, the log and what clients hear take the same values in all combinations.

    But for clients that have not heard yet: who hears later has heard nothing before.
    """
    whole = _visible(Unreduced(bounds._replace(slow_answers=True)))
    quick = _visible(Searched(bounds))
    assert quick <= whole
    assert {seen[:2] for seen in whole} == {seen[:2] for seen in quick}
    assert {seen for seen in whole if any(seen[2])} <= quick


def _visible(world: Searched) -> set[tuple[Any, ...]]:
    states = reached(world)
    return {(state.branches, world.logs.views[state.log].statuses, state.told) for state in states}
