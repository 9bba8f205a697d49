"""A part of the benchmark as steps, so that one bar shows all of them and any may be the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import msgspec

from coordinator.commands.bench.results import Result

_T = TypeVar("_T")


class Step(msgspec.Struct, frozen=True):
    """Some seconds of work, most often one measurement."""

    label: str
    do: Callable[[], None]


class Part(Protocol):
    """What belongs together and is compared with each other."""

    def steps(self) -> Iterator[Step]:
        """What there is to do, in order."""

    def results(self) -> list[Result]:
        """Of all that has been measured so far."""


def turned(items: Sequence[_T], by: int) -> list[_T]:
    """The same, beginning with another one: whatever one leaves to the next falls on all."""
    places = by % len(items) if items else 0
    return [*items[places:], *items[:places]]
