"""Every state that can be reached, breadth first, and whether each can still come to its end.

The first state that breaks an invariant has the shortest trace. When none does, the graph is walked
backwards from the states in which all has ended, without faults: a state that is not met there is
one that no healing ends (I6).
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.exhaustive.moves import Searched
from tests.exhaustive.state import State
from tests.simulation.checkers import Violation


class Found(NamedTuple):
    """What a search came to. When it is `complete` without a violation, there are no bad states."""

    states: int
    moves: int
    complete: bool
    violation: Violation | None
    trace: list[str]

    def story(self) -> str:
        """The shortest way to the violation, and the violation."""
        return "\n".join([*self.trace, str(self.violation)])


def search(
    world: Searched,
    states_most: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """Search a world's states, all of them or until an invariant breaks.

    `progress` is told now and then how many states were met and how many wait.
    """
    collected = gc.isenabled()
    gc.disable()  # nothing here is garbage, and there are millions of it
    try:
        return _Search(world).run(states_most, progress)
    finally:
        if collected:
            gc.enable()


def reached(world: Searched) -> list[State]:
    """All states of a world that breaks no invariant."""
    states = _Search(world)
    states.run(None, None)
    return states.states


class _Search:
    def __init__(self, world: Searched) -> None:
        self.world = world
        start = world.start()
        self.states = [start]
        self.numbers = {start: 0}
        self.parents = array("i", [-1])
        self.labels: list[Any] = [("begins",)]
        self.healing_from = array("i")
        self.healing_to = array("i")
        self.moves = 0

    def run(self, states_most: int | None, progress: Callable[[int, int], None] | None) -> Found:
        number = 0
        while number < len(self.states):
            if states_most is not None and number >= states_most:
                break
            violation = self._expand(number)
            if violation is not None:
                return self._found(violation, self._trace(number))
            number += 1
            if progress is not None and number % 20_000 == 0:
                progress(number, len(self.states) - number)
        complete = number == len(self.states)
        stuck = self._first_without_end() if complete else None
        if stuck is None:
            return Found(len(self.states), self.moves, complete, None, [])
        violation = Violation("I6", "from here on nothing leads to an end")
        return self._found(violation, self._trace(stuck))

    def _expand(self, number: int) -> Violation | None:
        numbers, states = self.numbers, self.states
        try:
            for label, fault, following in self.world.moves(states[number]):
                self.moves += 1
                known = numbers.setdefault(following, len(states))
                if known == len(states):
                    states.append(following)
                    self.parents.append(number)
                    self.labels.append(label)
                if not fault and known != number:
                    self.healing_from.append(number)
                    self.healing_to.append(known)
        except Violation as violation:
            return violation
        return None

    def _first_without_end(self) -> int | None:
        before: list[list[int]] = [[] for _ in self.states]
        for source, target in zip(self.healing_from, self.healing_to, strict=True):
            before[target].append(source)
        ends = bytearray(len(self.states))
        waiting = [n for n, state in enumerate(self.states) if self.world.is_end(state)]
        for number in waiting:
            ends[number] = 1
        while waiting:
            for source in before[waiting.pop()]:
                if not ends[source]:
                    ends[source] = 1
                    waiting.append(source)
        stuck = ends.find(0)
        return None if stuck < 0 else stuck

    def _trace(self, number: int) -> list[str]:
        lines = []
        last = number
        while number >= 0:
            lines.append(self.world.say(self.labels[number]))
            number = self.parents[number]
        return [*reversed(lines), *self.world.describe(self.states[last])]

    def _found(self, violation: Violation, trace: list[str]) -> Found:
        if violation.name != "I6":
            trace = [*trace, f"then: {self.world.say(self.world.last)}"]
        return Found(len(self.states), self.moves, True, violation, trace)
