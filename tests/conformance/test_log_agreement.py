"""The log in a file answers as the register does, whatever is asked in whatever order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from coordinator.errors import ProtocolError
from coordinator.log.base import Attempt, Log, Mark, Proposal
from coordinator.log.memory import MemoryLog
from coordinator.log.register import Register
from coordinator.log.sqlite import SQLiteLog
from coordinator.model import ABORT, Claim, Verdict, id_time_ms
from tests.conformance.log_suite import MEMBER, Place

CALLS = 400


class Asker:
    """Draws calls about a few transactions and keys, so that they meet."""

    def __init__(self, place: Place, draw: Random) -> None:
        self.draw = draw
        self.ids = [place.draw() for _ in range(24)]
        self.decisions = {
            each: (ABORT, place.commit(each, "orders", "stock"), place.delegated(each, "orders"))
            for each in self.ids
        }
        self.strangers = {each: place.branch(each, "orders") for each in self.ids}
        self.claims = [Claim(space, key) for space in ("key", "step") for key in "éa\U0001f600"]
        self.passed = 0

    def call(self) -> Callable[[Log], Any]:
        """One call, the same for every log; the transactions in use become later ones slowly."""
        draw = self.draw
        self.passed += 1
        first = self.passed * (len(self.ids) - 6) // CALLS
        transaction, other = draw.choices(self.ids[first : first + 6], k=2)
        claims = tuple(draw.choices(self.claims, k=draw.randrange(3)))
        claim = draw.choice(self.claims)
        decision = draw.choice(self.decisions[transaction])
        proposal = Proposal(transaction, decision, claims, draw.choice((b"", b"result")))
        answer = draw.choice((Verdict.COMMIT, Verdict.ABORT))
        attempt = Attempt(transaction, draw.randrange(3), MEMBER)
        expected = draw.choice((None, other))
        named = [*self.decisions[transaction][1].named, *self.decisions[transaction][2].named]
        marks = [
            Mark(transaction, each.id)
            for each in (*named, self.strangers[transaction])
            if draw.random() < 0.5
        ]
        limit, before_ms = draw.randrange(1, 4), id_time_ms(draw.choice(self.ids)) + 1
        horizon = self.ids[draw.randrange(first + 3)]
        calls: list[Callable[[Log], Any]] = [
            lambda log: log.propose(proposal),
            lambda log: log.propose(proposal),
            lambda log: log.record_answer(transaction, answer),
            lambda log: log.name_attempt(claim, attempt, expected),
            lambda log: log.name_attempt(claim, attempt, expected),
            lambda log: log.finish(marks),
            lambda log: log.raise_horizon(horizon),
            lambda log: log.forget(limit, claims_before_ms=before_ms),
            lambda log: log.scan(other, limit, unfinished_only=transaction < other),
        ]
        return draw.choice(calls)


async def answered(call: Callable[[Log], Any], log: Log) -> object:
    try:
        return await call(log)
    except ProtocolError:
        return ProtocolError


async def all_of(log: Log, asker: Asker) -> list[object]:
    """What stands under every id and every key."""
    return await asyncio.gather(
        *(log.read(transaction) for transaction in asker.ids),
        *(log.read_key(claim) for claim in asker.claims),
    )


@pytest.mark.parametrize("seed", range(3))
async def test_a_file_answers_as_the_register_does(seed: int, tmp_path: Path) -> None:
    place = Place(lambda: SQLiteLog(tmp_path / "log.db"))
    log = await place.open()
    assert place.identity is not None
    reference: Log = MemoryLog(Register(place.identity))
    await reference.open()
    asker = Asker(place, Random(seed))
    answers: set[object] = set()
    for number in range(CALLS):
        call = asker.call()
        expected = await answered(call, reference)
        assert await answered(call, log) == expected, number
        answers.add(type(expected).__name__)
        assert await all_of(log, asker) == await all_of(reference, asker), number
    assert answers >= {"Stands", "BelowHorizon", "ClaimHeld", "KeyState", "Verdict", "Page"}
    await place.close()
