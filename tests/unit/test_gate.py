"""The gate, in virtual time: order, deadlines, cancellation, lent places, a random walk."""

from __future__ import annotations

import asyncio
import random

import pytest

from coordinator.gate import PATIENCE_LEAST, Gate, Line, Token
from tests.support.virtual import virtual

FOR_EVER = 1e6


def now() -> float:
    return asyncio.get_running_loop().time()


def names(gate: Gate) -> list[str]:
    return [name for name, _ in gate.holders()]


def taken(gate: Gate, name: str) -> Token:
    token = gate.try_enter(name)
    assert token is not None
    return token


def queued(gate: Gate, name: str, until: float = FOR_EVER) -> asyncio.Task[Token]:
    return asyncio.get_running_loop().create_task(gate.enter(name, until))


async def settle() -> None:
    """Let every task that can run do so, without time passing."""
    for _ in range(5):
        await asyncio.sleep(0)


async def work(token: Token, statements: int, seconds: float) -> None:
    for _ in range(statements):
        token.busy()
        await asyncio.sleep(seconds)
        token.idle()


@virtual
async def test_who_finds_room_is_not_suspended() -> None:
    gate = Gate(1, most=4)
    with pytest.raises(StopIteration) as returned:
        gate.enter("a", FOR_EVER).send(None)
    assert isinstance(returned.value.value, Token) and names(gate) == ["a"]
    assert gate.try_enter("b") is None


@virtual
async def test_leaving_lets_in_exactly_the_first_who_waits() -> None:
    gate = Gate(2, most=4)
    first, second = taken(gate, "first"), taken(gate, "second")
    first.busy(), second.busy()
    waiting = [queued(gate, name) for name in "abc"]
    await settle()
    first.leave()
    assert gate.try_enter("pushes in") is None
    await settle()
    assert [task.done() for task in waiting] == [True, False, False]
    assert names(gate) == ["second", "a"]
    for task in waiting[1:]:
        task.cancel()


@virtual
async def test_leaving_twice_frees_one_place_only() -> None:
    gate = Gate(2, most=4)
    first = taken(gate, "first")
    taken(gate, "second")
    first.leave()
    first.leave()
    taken(gate, "third")
    assert gate.try_enter("fourth") is None


@virtual
async def test_who_gave_up_waiting_is_passed_over() -> None:
    gate = Gate(1, most=1)
    holder = taken(gate, "holder")
    gone, next_one = queued(gate, "gone"), queued(gate, "next")
    await settle()
    gone.cancel()
    holder.leave()
    assert (await next_one).name == "next" and gone.cancelled()
    assert names(gate) == ["next"]


@virtual
async def test_a_place_given_in_the_moment_of_a_cancellation_is_passed_on() -> None:
    gate = Gate(1, most=1)
    holder = taken(gate, "holder")
    gone, next_one = queued(gate, "gone"), queued(gate, "next")
    await settle()
    holder.leave()
    gone.cancel()
    assert (await next_one).name == "next" and gone.cancelled()
    assert names(gate) == ["next"]


@virtual
async def test_a_wait_ends_at_its_deadline_and_names_who_is_inside() -> None:
    gate = Gate(2, most=2)
    holder = taken(gate, "reports")
    await asyncio.sleep(1.0)
    taken(gate, "import")
    began = now()
    with pytest.raises(TimeoutError) as raised:
        await gate.enter("late", began + 0.5)
    assert now() - began == pytest.approx(0.5)
    assert str(raised.value) == (
        "no turn at the databases within 0.5 s: 2 transactions are let in at once, "
        "and inside are reports for 1.5 s, import for 0.5 s"
    )
    holder.leave()
    assert names(gate) == ["import"]
    taken(gate, "the place is free")


@virtual
async def test_a_message_names_only_the_oldest_of_many() -> None:
    gate = Gate(8, most=8)
    for number in range(8):
        taken(gate, f"t{number}")
    with pytest.raises(TimeoutError, match=r"inside are t0 for 0 s, .*t4 for 0 s and 3 more$"):
        await gate.enter("late", now())


@virtual
async def test_the_place_of_a_body_that_does_not_work_is_lent_when_somebody_waits() -> None:
    gate = Gate(2, most=10)
    calls, works = taken(gate, "calls somebody"), taken(gate, "works")
    works.busy()
    await asyncio.sleep(1.0)
    assert gate.try_enter("nothing is lent before somebody waits") is None
    began = now()
    borrower = await gate.enter("borrower", FOR_EVER)
    assert now() - began < 2 * PATIENCE_LEAST
    borrower.busy()
    calls.busy()  # at once, though there are three now
    waiting = queued(gate, "waits for two to leave")
    await asyncio.sleep(1.0)
    borrower.leave()
    await asyncio.sleep(1.0)
    assert not waiting.done()
    works.leave()
    await waiting
    assert names(gate) == ["calls somebody", "waits for two to leave"]


@virtual
async def test_no_more_places_are_lent_than_somebody_waits_for() -> None:
    gate = Gate(3, most=10)
    for name in "abc":
        taken(gate, name)
    await asyncio.sleep(1.0)
    await gate.enter("d", FOR_EVER)
    assert gate.try_enter("e") is None


@virtual
async def test_the_place_of_who_has_not_worked_for_longest_is_lent() -> None:
    gate = Gate(2, most=10)
    worked_later, long_ago = taken(gate, "a"), taken(gate, "b")
    await work(worked_later, 1, 0.5)
    await asyncio.sleep(1.0)
    borrower = await gate.enter("c", FOR_EVER)
    worked_later.busy()
    borrower.leave()
    taken(gate, "d")
    long_ago.busy()
    assert gate.try_enter("there are three now") is None


@virtual
async def test_after_its_end_a_token_counts_no_more_whatever_its_owner_says() -> None:
    gate = Gate(1, most=10)
    lent = taken(gate, "a")
    borrower = await gate.enter("b", FOR_EVER)
    lent.leave()
    lent.busy()
    borrower.leave()
    taken(gate, "c")


@virtual
async def test_no_more_are_inside_than_the_smallest_pool_has_connections() -> None:
    gate = Gate(2, most=3)
    idle = [taken(gate, "a"), taken(gate, "b"), await gate.enter("c", FOR_EVER)]
    waiting = queued(gate, "d")
    await asyncio.sleep(10.0)
    assert names(gate) == ["a", "b", "c"] and not waiting.done()
    idle[0].leave()
    await waiting


@virtual
async def test_a_smaller_pool_lowers_the_limit_and_a_larger_one_lets_in_who_waits() -> None:
    gate = Gate(8, most=1)
    taken(gate, "a").busy()
    waiting = queued(gate, "b")
    await asyncio.sleep(1.0)
    assert gate.limit == 1 and not waiting.done()
    gate.most = 2
    await waiting


@virtual
async def test_who_waits_is_let_in_before_who_comes_when_the_limit_was_raised() -> None:
    gate = Gate(8, most=1)
    taken(gate, "a").busy()
    waiting = queued(gate, "b")
    await settle()
    gate.most = 2
    assert gate.try_enter("pushes in") is None
    await waiting


@virtual
async def test_a_lent_place_counts_when_the_smallest_pool_becomes_smaller() -> None:
    gate = Gate(2, most=3)
    idle, works = taken(gate, "a"), taken(gate, "b")
    works.busy()
    (await gate.enter("c", FOR_EVER)).busy()
    waiting = queued(gate, "d")
    gate.most = 2
    works.leave()
    await asyncio.sleep(1.0)
    assert names(gate) == ["a", "c"] and not waiting.done()
    idle.leave()
    await waiting


@virtual
async def test_a_body_that_goes_from_statement_to_statement_keeps_its_place() -> None:
    gate = Gate(1, most=10)
    token = taken(gate, "works")
    waiting = queued(gate, "waits")
    for _ in range(100):
        token.busy()
        await asyncio.sleep(PATIENCE_LEAST * 3)
        token.idle()
        await asyncio.sleep(PATIENCE_LEAST * 0.9)
    assert not waiting.done()
    token.leave()
    await waiting


@virtual
async def test_while_one_of_two_statements_runs_the_body_works() -> None:
    gate = Gate(1, most=10)
    token = taken(gate, "works")
    token.busy()
    token.busy()
    token.idle()
    waiting = queued(gate, "waits")
    await asyncio.sleep(1.0)
    assert not waiting.done()
    token.idle()
    await waiting


@virtual
async def test_nobody_stands_in_a_line_after_a_wait_that_failed() -> None:
    line: Line[str] = Line(undo=lambda item: None)
    with pytest.raises(TimeoutError, match="not today"):
        await line.wait("late", now() + 1.0, lambda: "not today")
    cancelled = asyncio.create_task(line.wait("cancelled", FOR_EVER, str))
    await settle()
    assert line
    cancelled.cancel()
    await settle()
    assert not line and line.serve() is None


@virtual
async def test_a_line_that_is_closed_refuses_all_who_wait() -> None:
    line: Line[str] = Line(undo=lambda item: None)
    waiting = [asyncio.create_task(line.wait(each, FOR_EVER, str)) for each in "ab"]
    await settle()
    line.refuse_all("closed")
    for each in waiting:
        with pytest.raises(TimeoutError, match="closed"):
            await each
    assert not line and line.serve() is None


class Walk:
    """Clients that come, work, wait for something else, are cancelled, and give up, at random.

    A statement takes little enough for the patience to be the least, always the same.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.limit = self.draw.randint(1, 5)
        self.most = self.draw.randint(self.limit, 8)
        self.gate = Gate(self.limit, most=self.most)
        self.pools = [asyncio.Semaphore(self.most) for _ in range(2)]
        self.seen: dict[str, float | None] = {}
        """Who is inside: None while a statement runs, else since when none does."""
        self.arrived = 0
        self.ended: list[str] = []

    async def client(self) -> None:
        draw = self.draw
        await asyncio.sleep(draw.uniform(0, 0.2))
        name = f"{self.arrived:04}"
        self.arrived += 1
        try:
            token = await self.gate.enter(name, now() + draw.choice([0.02, 5.0, 50.0]))
        except TimeoutError:
            self.ended.append("late")
            return
        try:
            self.seen[name] = now()
            self.check()
            await self.cross(name, token)
            self.ended.append("done")
        finally:
            del self.seen[name]
            token.leave()

    async def cross(self, name: str, token: Token) -> None:
        """Take a connection of each pool, in any order; there is always one."""
        draw = self.draw
        held = draw.sample(self.pools, 2)
        for number, pool in enumerate(held):
            if pool.locked():
                for taken_before in held[:number]:
                    taken_before.release()
                raise AssertionError("waits for a connection while it may hold another")
            await pool.acquire()
        try:
            for _ in range(draw.randint(0, 4)):
                await asyncio.sleep(draw.choice([0.0, 0.001, 0.1]) * draw.random())
                token.busy()
                self.seen[name] = None
                try:
                    await asyncio.sleep(draw.uniform(0.0001, 0.0012))
                finally:
                    token.idle()
                    self.seen[name] = now()
        finally:
            for pool in held:
                pool.release()

    def check(self) -> None:
        inside = names(self.gate)
        assert inside == sorted(inside), "somebody was let in before one who came earlier"
        assert len(inside) <= self.most
        patient = [
            name
            for name, since in self.seen.items()
            if since is None or now() - since < PATIENCE_LEAST
        ]
        assert len(patient) <= self.limit, "more than the limit work"


@pytest.mark.parametrize("seed", range(40))
@virtual
async def test_a_random_walk_keeps_order_and_limit_and_loses_no_place(seed: int) -> None:
    walk = Walk(seed)
    clients = [asyncio.create_task(walk.client()) for _ in range(60)]
    for _ in range(10):
        await asyncio.sleep(walk.draw.uniform(0, 0.05))
        walk.draw.choice(clients).cancel()
    results = await asyncio.gather(*clients, return_exceptions=True)
    failed = [r for r in results if r is not None and not isinstance(r, asyncio.CancelledError)]
    assert not failed and "done" in walk.ended
    assert len(walk.ended) + sum(task.cancelled() for task in clients) == len(clients)
    assert names(walk.gate) == []
    for number in range(walk.limit):
        taken(walk.gate, str(number))
    assert walk.gate.try_enter("one too many") is None
