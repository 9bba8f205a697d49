"""Thousands of short random walks against the naive twin; the first failing seed prints its trace.

To replay one: `Walk(seed).run(STEPS)`. That a late vote is rolled back at once is not visible here,
since the sweep of the healing world would find the branch too; the transcripts pin it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs

from coordinator import protocol
from coordinator.events import AbortRequested, Action, Decide, Decided, Finished, Refused
from coordinator.model import Outcome
from coordinator.protocol import Phase, Transaction
from tests.protocol.walk import Walk

STEPS = 40
SEEDS_A_BLOCK = 500


def first_violation(seeds: range) -> str | None:
    """The story of the first seed that goes wrong."""
    return next((story for seed in seeds if (story := Walk(seed).run(STEPS))), None)


@pytest.mark.parametrize("block", range(8))
def test_walks_agree_with_the_specification(block: int) -> None:
    outcomes: Counter[Outcome | None] = Counter()
    for seed in range(block * SEEDS_A_BLOCK, (block + 1) * SEEDS_A_BLOCK):
        walk = Walk(seed)
        violation = walk.run(STEPS)
        if violation is not None:
            pytest.fail(violation, pytrace=False)
        outcomes.update(driver.transaction.outcome for driver in walk.drivers)
    # A mix that lacks one of the ends would prove little.
    assert outcomes[Outcome.COMMITTED] > SEEDS_A_BLOCK / 10
    assert outcomes[Outcome.ABORTED] > SEEDS_A_BLOCK / 10


def _roll_back_at_once(transaction: Any, event: Any) -> Any:
    return transaction._roll_back()


def _say_nothing(transaction: Any, event: Any) -> Any:
    return []


BUGS: dict[str, tuple[Phase, type, Callable[[Any, Any], Any]]] = {
    "rolls back while its commit is proposed": (
        Phase.COMMIT_PROPOSED,
        AbortRequested,
        _roll_back_at_once,
    ),
    "recovery presumes abort": (Phase.IN_DOUBT, AbortRequested, _roll_back_at_once),
    "reads refused as aborted": (Phase.COMMIT_PROPOSED, Refused, _roll_back_at_once),
    "recovery reads refused as aborted": (Phase.ABORT_PROPOSED, Refused, _roll_back_at_once),
    "disobeys what stands": (Phase.ABORT_PROPOSED, Decided, _roll_back_at_once),
    "never ends": (Phase.COMMITTING, Finished, _say_nothing),
}


@pytest.mark.parametrize("bug", BUGS)
def test_walks_find_planted_bugs(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    phase, event, rule = BUGS[bug]
    monkeypatch.setitem(protocol.RULES, (phase, event), rule)
    assert first_violation(range(2 * SEEDS_A_BLOCK)) is not None


def test_walks_find_a_commit_that_names_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Transaction._all_voted

    def names_too_little(transaction: Transaction) -> list[Action]:
        return [
            structs.replace(
                action,
                decision=structs.replace(action.decision, branches=action.decision.branches[1:]),
            )
            if isinstance(action, Decide)
            else action
            for action in original(transaction)
        ]

    monkeypatch.setattr(Transaction, "_all_voted", names_too_little)
    assert first_violation(range(SEEDS_A_BLOCK)) is not None
