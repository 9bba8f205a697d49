"""What a caller sees: outcomes, deadlines, cancellation, joining, doom."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.context import current
from coordinator.errors import (
    ConfigurationError,
    HeuristicOutcome,
    OutcomeUnknown,
    TransactionAborted,
    TransactionError,
)
from coordinator.events import Published
from coordinator.log.base import Proposal
from coordinator.model import ABORT, Ending, EndingKind, Verdict, Vote, VoteKind
from coordinator.protocol import Phase
from tests.unit.scripted import OnePhaseScripted, Scripted, SlowLog, engine_with, until


async def test_returning_commits_every_branch_after_one_record() -> None:
    a, b, log = Scripted("a"), Scripted("b"), SlowLog()
    async with engine_with(a, b, log=log) as bench:
        async with bench.scope() as transaction:
            assert current() is transaction
            await transaction.enlist(a)
            await transaction.enlist(b)
        assert current() is None
        assert a.calls == b.calls == ["prepare", "commit"]
        assert [p.decision.verdict for p in log.proposals] == [Verdict.COMMIT]
        named = {branch.participant for branch in log.proposals[0].decision.branches}
        assert named == {"a", "b"}


async def test_an_exception_aborts_and_is_raised_unchanged() -> None:
    a, log = Scripted("a"), SlowLog()
    async with engine_with(a, log=log) as bench:
        with pytest.raises(ZeroDivisionError) as raised:
            async with bench.scope() as transaction:
                await transaction.enlist(a)
                raise ZeroDivisionError("mine")
        assert str(raised.value) == "mine"
        assert a.calls == ["rollback"]
        assert log.proposals == []


async def test_a_vote_no_rolls_back_all_with_its_reason() -> None:
    no = Vote(VoteKind.ABORTED, reason="deferred constraint", retryable=False)
    a, b = Scripted("a"), Scripted("b", vote=no)
    async with engine_with(a, b) as bench:
        with pytest.raises(TransactionAborted, match="deferred constraint") as raised:
            async with bench.scope() as transaction:
                await transaction.enlist(a)
                await transaction.enlist(b)
        assert not raised.value.retryable
        assert "rollback" in a.calls and "rollback" in b.calls
        assert "commit" not in a.calls + b.calls


async def test_an_exception_of_prepare_is_a_retryable_no() -> None:
    a, b = Scripted("a"), Scripted("b")
    b.failures["prepare"] = 1
    async with engine_with(a, b) as bench:
        with pytest.raises(TransactionAborted, match="b does not answer prepare") as raised:
            async with bench.scope() as transaction:
                await transaction.enlist(a)
                await transaction.enlist(b)
        assert raised.value.retryable


async def test_a_single_private_branch_commits_in_one_phase_without_a_record() -> None:
    a, log = OnePhaseScripted("a"), SlowLog()
    async with engine_with(a, log=log) as bench:
        async with bench.scope() as transaction:
            await transaction.enlist(a, one_phase=True)
        assert a.calls == ["commit_one_phase"]
        assert log.proposals == []


async def test_reading_the_id_makes_the_commit_a_recorded_one() -> None:
    a, log = OnePhaseScripted("a"), SlowLog()
    async with engine_with(a, log=log) as bench:
        async with bench.scope() as transaction:
            await transaction.enlist(a, one_phase=True)
            known = transaction.id
        assert a.calls == ["prepare", "commit"]
        assert [p.transaction for p in log.proposals] == [known]


async def test_an_id_older_than_a_second_is_published_and_its_commit_recorded() -> None:
    a, log = OnePhaseScripted("a"), SlowLog()
    async with engine_with(a, log=log) as bench:
        async with bench.scope() as transaction:
            await transaction.enlist(a, one_phase=True)
            driver = next(iter(bench.engine.drivers.values()))
            driver.born -= 1.0
            await until(lambda: not driver.core.private)
            alive = await bench.engine.members.alive()
            shown = alive[bench.engine.member].in_flight
            assert [flight.transaction for flight in shown] == [driver.core.id]
        assert a.calls == ["prepare", "commit"]


async def test_the_deadline_cancels_the_body_and_is_named() -> None:
    a = Scripted("a")
    async with engine_with(a) as bench:
        with pytest.raises(TransactionAborted, match=r"deadline of 0\.02 s") as raised:
            async with bench.scope(timeout=0.02) as transaction:
                await transaction.enlist(a)
                await asyncio.Event().wait()
        assert raised.value.retryable
        assert a.calls == ["rollback"]


async def test_the_deadline_ends_a_prepare_that_does_not_answer() -> None:
    a, b = Scripted("a"), Scripted("b")
    b.hold("prepare")
    async with engine_with(a, b) as bench:
        with pytest.raises(TransactionAborted, match="deadline"):
            async with bench.scope(timeout=0.02) as transaction:
                await transaction.enlist(a)
                await transaction.enlist(b)
        await until(lambda: "rollback" in a.calls and "rollback" in b.calls)


async def test_at_the_deadline_after_the_decision_the_result_is_returned_all_the_same() -> None:
    a = Scripted("a")
    gate = a.hold("commit")
    async with engine_with(a) as bench:
        async with bench.scope(timeout=0.02) as transaction:
            await transaction.enlist(a)
        assert a.prepared
        gate.set()
        await until(lambda: not a.prepared)


async def test_a_silent_log_makes_the_outcome_unknown_and_the_driver_goes_on() -> None:
    a, log = Scripted("a"), SlowLog()
    log.gate = asyncio.Event()
    async with engine_with(a, log=log) as bench:
        with pytest.raises(OutcomeUnknown) as raised:
            async with bench.scope(timeout=0.02) as transaction:
                await transaction.enlist(a)
        assert raised.value.transaction_id in str(raised.value)
        assert "rollback" not in a.calls and a.prepared
        log.gate.set()
        await until(lambda: not a.prepared)
        reading = await log.read(raised.value.transaction_id)
        assert reading.record is not None
        committed = reading.record.decision.verdict is Verdict.COMMIT
        assert ("commit" in a.calls) is committed


async def test_a_lost_answer_of_the_log_is_asked_again_and_compared() -> None:
    a, log = Scripted("a"), SlowLog()
    log.lose_answers = 2
    async with engine_with(a, log=log) as bench:
        async with bench.scope() as transaction:
            await transaction.enlist(a)
        assert a.calls == ["prepare", "commit"]
        assert len(log.proposals) == 3


async def test_an_abort_recorded_by_others_is_obeyed() -> None:
    a, log = Scripted("a"), SlowLog()
    async with engine_with(a, log=log) as bench:
        with pytest.raises(TransactionAborted, match="recorded an abort first"):
            async with bench.scope() as transaction:
                await transaction.enlist(a)
                await log.propose(Proposal(transaction.id, ABORT))
        assert a.calls == ["prepare", "rollback"]


async def test_phase_two_is_repeated_until_it_succeeds() -> None:
    a = Scripted("a")
    a.failures["commit"] = 7
    async with engine_with(a) as bench:
        async with bench.scope() as transaction:
            await transaction.enlist(a)
        assert a.calls.count("commit") == 8


async def test_cancelling_before_the_decision_aborts() -> None:
    a = Scripted("a")
    a.hold("prepare")
    async with engine_with(a) as bench:

        async def body() -> None:
            async with bench.scope() as transaction:
                await transaction.enlist(a)

        task = asyncio.create_task(body())
        await until(lambda: "prepare" in a.calls)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert any("aborted" in note for note in raised.value.__notes__)
        await until(lambda: "rollback" in a.calls)


async def test_cancelling_after_the_decision_does_not_stop_the_second_phase() -> None:
    a = Scripted("a")
    gate = a.hold("commit")
    async with engine_with(a) as bench:

        async def body() -> None:
            async with bench.scope() as transaction:
                await transaction.enlist(a)

        task = asyncio.create_task(body())
        await until(lambda: "commit" in a.calls)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert any("committed" in note for note in raised.value.__notes__)
        gate.set()
        await until(lambda: not a.prepared)


async def test_a_nested_function_joins_and_its_exception_dooms_even_if_swallowed() -> None:
    a = Scripted("a")
    async with engine_with(a) as bench:

        async def inner() -> None:
            transaction = current()
            assert transaction is not None
            await transaction.enlist(a)
            raise LookupError("inner failed")

        async def outer() -> None:
            with pytest.raises(LookupError):
                await bench.transactional(inner)()

        with pytest.raises(TransactionAborted, match="inner failed") as raised:
            await bench.transactional(outer)()
        assert isinstance(raised.value.__cause__, LookupError)
        assert a.calls == ["rollback"]


async def test_abort_dooms_without_an_exception_and_refuses_further_work() -> None:
    a, b = Scripted("a"), Scripted("b")
    async with engine_with(a, b) as bench:
        with pytest.raises(TransactionAborted, match="not today"):
            async with bench.scope() as transaction:
                await transaction.enlist(a)
                transaction.abort("not today")
                with pytest.raises(TransactionError, match="not today"):
                    await transaction.enlist(b)
        assert a.calls == ["rollback"] and b.calls == []


async def test_enlisting_after_the_commit_began_is_refused() -> None:
    a, b = Scripted("a"), Scripted("b")
    gate = a.hold("prepare")
    async with engine_with(a, b) as bench:
        late: list[TransactionError] = []

        async def stray() -> None:
            transaction = current()
            assert transaction is not None
            await until(lambda: "prepare" in a.calls)
            try:
                await transaction.enlist(b)
            except TransactionError as error:
                late.append(error)
            gate.set()

        async with bench.scope() as transaction:
            await transaction.enlist(a)
            task = asyncio.create_task(stray())
        await task
        assert "after the commit" in str(late[0])
        assert b.calls == []


async def test_a_participant_of_another_coordinator_is_refused() -> None:
    a, stranger = Scripted("a"), Scripted("a")
    async with engine_with(a) as bench:
        with pytest.raises(ConfigurationError, match="not a participant of this coordinator"):
            async with bench.scope() as transaction:
                await transaction.enlist(stranger)


async def test_transactions_of_two_coordinators_do_not_nest() -> None:
    async with engine_with() as one, engine_with() as two:
        with pytest.raises(ConfigurationError, match="another coordinator"):
            async with one.scope(), two.scope():
                pass


async def test_a_second_last_resource_is_refused() -> None:
    a, b = Scripted("a"), Scripted("b")
    async with engine_with(a, b) as bench:
        with pytest.raises(ConfigurationError, match="at most one"):
            async with bench.scope() as transaction:
                await transaction.enlist(a, last_resource=True)
                await transaction.enlist(b, last_resource=True)


async def test_a_heuristic_ending_is_raised_and_kept_for_a_person() -> None:
    a, b = Scripted("a"), Scripted("b")
    a.endings["commit"] = Ending(EndingKind.HEURISTIC_ROLLBACK, "a person rolled it back")
    async with engine_with(a, b) as bench:
        with pytest.raises(HeuristicOutcome, match="a person rolled it back"):
            async with bench.scope() as transaction:
                await transaction.enlist(a)
                await transaction.enlist(b)
        incidents = await bench.log.incidents()
        assert [i.participant for i in incidents] == ["a"]
        assert b.calls == ["prepare", "commit"]


async def test_closing_waits_for_second_phases_and_aborts_what_only_works() -> None:
    a, b = Scripted("a"), Scripted("b")
    gate = a.hold("commit")
    async with engine_with(a, b) as bench:
        async with bench.scope(timeout=0.02) as transaction:
            await transaction.enlist(a)

        async def works() -> None:
            async with bench.scope() as transaction:
                await transaction.enlist(b)
                await until(lambda: transaction.is_over)

        working = asyncio.create_task(works())
        await until(lambda: len(bench.engine.drivers) == 2)
        stopping = asyncio.create_task(bench.engine.stop())
        with pytest.raises(TransactionAborted, match="closing"):
            await working
        assert not stopping.done()
        gate.set()
        await stopping
        assert not a.prepared
        with pytest.raises(TransactionError, match="closing"):
            async with bench.scope():
                pass


async def test_a_published_event_is_refused_in_one_phase_only() -> None:
    a = OnePhaseScripted("a")
    gate = a.hold("commit_one_phase")
    async with engine_with(a) as bench:

        async def body() -> None:
            async with bench.scope() as transaction:
                await transaction.enlist(a, one_phase=True)

        task = asyncio.create_task(body())
        await until(lambda: "commit_one_phase" in a.calls)
        driver = next(iter(bench.engine.drivers.values()))
        assert driver.core.phase is Phase.ONE_PHASE
        with pytest.raises(TransactionError):
            driver.post(Published())
        driver.born -= 5
        await bench.engine.members.beat(bench.engine._beat())
        alive = await bench.engine.members.alive()
        assert not alive[bench.engine.member].in_flight
        gate.set()
        await task
