"""How a bug is planted: a world in which some part of the real code, or around it, is replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from coordinator.protocol import RULES, Phase, Transaction
from tests.simulation.world import Parts


class Bug(NamedTuple):
    """A planted bug: the rule that it breaks, in words, and the world that has it."""

    name: str
    rule: str
    parts: Parts
    first_seed: int = 0
    """Where the search begins; beyond the first worlds for what takes a rare coincidence."""


def mutant(
    rules: dict[tuple[Phase, type], Callable[..., Any]] | None = None, **methods: Any
) -> type[Transaction]:
    """The real transaction with some rules replaced, by name or by place in the table."""
    planted = type("Mutant", (Transaction,), {"__slots__": (), **methods})
    table = {pair: methods.get(rule.__name__, rule) for pair, rule in RULES.items()}
    table.update(rules or {})

    def step(self: Any, event: Any) -> Any:
        rule = table.get((self.phase, type(event)))
        if rule is None:
            raise self._refuse(event)
        return rule(self, event)

    planted.step = step  # type: ignore[assignment]
    return planted


def without(*pairs: tuple[Phase, type]) -> type[Transaction]:
    """The real transaction with holes in its table."""
    return mutant({pair: lambda transaction, event: _hole(transaction, event) for pair in pairs})


def _hole(transaction: Any, event: Any) -> Any:
    raise transaction._refuse(event)
