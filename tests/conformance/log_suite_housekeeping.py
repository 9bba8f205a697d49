"""The second half of the suite: scans, marks, forgetting, resources, incidents, closing."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.errors import ConfigurationError, LogUnavailable, ProtocolError
from coordinator.log.base import (
    Attempt,
    BelowHorizon,
    Incident,
    KeyState,
    Log,
    Mark,
    Proposal,
    Record,
    Word,
)
from coordinator.model import ABORT, EndingKind, TransactionId, Verdict, id_floor, id_time_ms
from tests.conformance.log_suite import KEY, MEMBER, Place, check, finish_all, stands

REGISTERED_MS = 1_000


async def scanned(log: Log, limit: int, *, unfinished_only: bool = True) -> list[TransactionId]:
    """The ids of a whole scan, by pages of `limit`."""
    found: list[TransactionId] = []
    after: TransactionId | None = None
    while True:
        page = await log.scan(after, limit, unfinished_only=unfinished_only)
        assert len(page.records) <= limit
        found += [record.transaction for record in page.records]
        after = page.after
        if after is None:
            return found
        assert page.records[-1].transaction == after, "the next page goes on where this one ended"


@check
async def a_scan_goes_by_pages_in_the_order_of_ids(place: Place) -> None:
    log = await place.open()
    assert await scanned(log, 10) == []
    ids = [place.draw() for _ in range(23)]
    for number, transaction in enumerate(reversed(ids)):
        aborts = number % 3 == 0
        decision = ABORT if aborts else place.commit(transaction, "orders")
        await log.propose(Proposal(transaction, decision))
    unfinished = [each for number, each in enumerate(reversed(ids)) if number % 3][::-1]
    for limit in (1, 5, len(unfinished), 23, 24, 1_000):
        assert await scanned(log, limit, unfinished_only=False) == ids
        assert await scanned(log, limit) == unfinished
    page = await log.scan(ids[10], 2, unfinished_only=False)
    assert [each.transaction for each in page.records] == ids[11:13]
    assert (await log.scan(ids[-1], 5)).records == ()


@check
async def a_scan_shows_records_as_they_stand(place: Place) -> None:
    log = await place.open()
    transaction = place.draw()
    decision = place.delegated(transaction, "orders", "stock")
    await log.propose(Proposal(transaction, decision, attachment=b"result"))
    await log.finish([Mark(transaction, decision.branches[1].id)])
    await log.record_answer(transaction, Verdict.COMMIT)
    expected = Record(
        transaction, decision, b"result", Verdict.COMMIT, frozenset({decision.branches[1].id})
    )
    assert (await log.scan(None, 10)).records == (expected,)
    assert (await log.read(transaction)).record == expected


@check
async def marks_finish_a_commit_branch_by_branch(place: Place) -> None:
    log = await place.open()
    transaction = place.draw()
    decision = place.commit(transaction, "orders", "stock", "mail")
    first, second, third = (branch.id for branch in decision.branches)
    await log.propose(Proposal(transaction, decision))
    for marks, ended in (
        ([second], {second}),
        ([second], {second}),
        ([first, second], {first, second}),
        ([third], {first, second, third}),
    ):
        await log.finish([Mark(transaction, branch) for branch in marks])
        record = (await log.read(transaction)).record
        assert record is not None
        assert record.ended == ended
        assert record.finished == (len(ended) == 3)
        assert await scanned(log, 10) == ([] if record.finished else [transaction])


@check
async def a_mark_of_what_is_not_named_is_passed_over(place: Place) -> None:
    log = await place.open()
    transaction, delegated, aborted, absent = (place.draw() for _ in range(4))
    decisions = {
        transaction: place.commit(transaction, "orders"),
        delegated: place.delegated(delegated, "orders"),
        aborted: ABORT,
    }
    strangers = [Mark(absent, place.branch(absent, "orders").id)]
    for each, decision in decisions.items():
        await log.propose(Proposal(each, decision))
        strangers.append(Mark(each, place.branch(each, "orders").id))
    last_resource = decisions[delegated].last_resource
    assert last_resource is not None
    strangers.append(Mark(delegated, last_resource.id))
    await log.finish(strangers)
    for each, decision in decisions.items():
        assert (await log.read(each)).record == Record(each, decision)
    assert (await log.read(absent)).record is None
    await log.finish([])


@check
async def only_what_is_finished_and_below_the_horizon_is_forgotten(place: Place) -> None:
    log = await place.open()
    aborted, finished, partial, unresolved, unmarked, above = (place.draw() for _ in range(6))
    done = place.commit(finished, "orders", "stock")
    half = place.commit(partial, "orders", "stock")
    delegated = place.delegated(unresolved, "orders")
    await log.propose(Proposal(aborted, ABORT))
    for decision in (done, half, delegated, place.commit(unmarked, "orders")):
        transaction = decision.branches[0].xid.transaction
        await log.propose(Proposal(transaction, decision))
    await log.propose(Proposal(above, ABORT))
    await finish_all(log, done)
    await finish_all(log, delegated)
    await log.finish([Mark(partial, half.branches[0].id)])
    assert await log.forget(100, claims_before_ms=0) == 0, "the horizon is below all of them"
    await log.raise_horizon(above)
    assert await log.forget(100, claims_before_ms=0) == 2
    assert await scanned(log, 100, unfinished_only=False) == [partial, unresolved, unmarked, above]


@check
async def a_deleted_id_can_never_be_proposed_again(place: Place) -> None:
    one, other = await place.open(), await place.open()
    transaction = place.draw()
    decision = place.commit(transaction, "orders")
    await one.propose(Proposal(transaction, decision))
    await finish_all(one, decision)
    horizon = await one.raise_horizon(place.draw())
    assert await one.forget(10, claims_before_ms=0) == 1
    for proposed in (decision, ABORT):
        assert await other.propose(Proposal(transaction, proposed)) == BelowHorizon(horizon)
    assert (await other.read(transaction)).record is None
    assert await one.record_answer(transaction, Verdict.COMMIT) is None


@check
async def forgetting_is_limited_and_oldest_first(place: Place) -> None:
    log = await place.open()
    ids = [place.draw() for _ in range(5)]
    for transaction in ids:
        await log.propose(Proposal(transaction, ABORT))
    await log.raise_horizon(place.draw())
    assert await log.forget(3, claims_before_ms=0) == 3
    assert await scanned(log, 10, unfinished_only=False) == ids[3:]
    assert await log.forget(3, claims_before_ms=0) == 2
    assert await log.forget(3, claims_before_ms=0) == 0


@check
async def a_resource_is_registered_and_swept(place: Place) -> None:
    one, other = await place.open(), await place.open()
    assert place.identity is not None
    floor = id_floor(place.identity.created_ms)
    resource = await one.register("orders", "system 7, database 5", REGISTERED_MS)
    assert (resource.name, resource.identity) == ("orders", "system 7, database 5")
    assert (resource.clear, resource.swept_ms) == (floor, REGISTERED_MS)
    early, late = place.draw(), place.draw()
    now = place.identity.created_ms + 60_000
    for clear, begun_ms, stands_now in (
        (late, now, (late, now)),
        (early, now - 1, (late, now)),  # an older scan, published late, says nothing
        (early, now + 1, (early, now + 1)),  # the latest one saw more left to do
        (late, now + 1, (late, now + 1)),
    ):
        await other.swept("orders", clear, begun_ms)
        again = await one.register("orders", "system 7, database 5", REGISTERED_MS)
        assert (again.clear, again.swept_ms) == stands_now
    with pytest.raises(ProtocolError, match="stock"):
        await one.swept("stock", late, now)
    await one.register("stock", "system 8, database 1", REGISTERED_MS)
    assert [each.name for each in await other.resources()] == ["orders", "stock"]


@check
async def a_name_moves_only_when_no_unfinished_commit_needs_it(place: Place) -> None:
    log = await place.open()
    await log.register("orders", "old", REGISTERED_MS)
    transaction = place.draw()
    decision = place.commit(transaction, "orders")
    await log.propose(Proposal(transaction, decision))
    with pytest.raises(ConfigurationError, match="orders"):
        await log.register("orders", "new", REGISTERED_MS)
    await log.register("kafka", "old", REGISTERED_MS)
    delegated = place.draw()
    await log.propose(Proposal(delegated, place.delegated(delegated)))
    with pytest.raises(ConfigurationError, match="kafka"):
        await log.register("kafka", "new", REGISTERED_MS)
    assert [each.identity for each in await log.resources()] == ["old", "old"]
    await finish_all(log, decision)
    await log.swept("orders", place.draw(), id_time_ms(transaction))
    horizon = await log.raise_horizon(place.draw())
    moved = await log.register("orders", "new", REGISTERED_MS)
    assert (moved.identity, moved.clear) == ("new", horizon), "nothing is known of the new one"
    assert moved in await log.resources()


@check
async def an_incident_is_kept_until_it_is_acknowledged(place: Place) -> None:
    one, other = await place.open(), await place.open()
    transaction = place.draw()
    decision = place.commit(transaction, "orders", "stock")
    await one.propose(Proposal(transaction, decision))
    gid = str(decision.branches[0].xid)
    later = Incident(gid, "orders", EndingKind.HEURISTIC_ROLLBACK, "it was gone", 2_000)
    earlier = Incident("sp:foreign", "stock", None, "below the horizon", 1_000)
    await one.report(later)
    await one.report(earlier)
    await other.report(Incident(gid, "orders", None, "a second sight", 3_000))
    assert list(await other.incidents()) == [earlier, later]
    assert await other.acknowledge(gid)
    assert not await one.acknowledge(gid)
    assert list(await one.incidents()) == [earlier]
    record = (await one.read(transaction)).record
    assert record is not None and record.ended == {decision.branches[0].id}
    assert await one.acknowledge("sp:foreign")
    assert list(await one.incidents()) == []


@check
async def a_word_is_written_once(place: Place) -> None:
    one, other = await place.open(), await place.open()
    assert list(await one.words()) == []
    transaction = place.draw()
    gid = str(place.branch(transaction, "orders").xid)
    later = Word(gid, Verdict.COMMIT, "the payment stands", "ann", 2_000)
    earlier = Word(str(transaction), None, "seen", "bob", 1_000)
    assert await one.give_word(later) == later
    assert await other.give_word(earlier) == earlier
    for second in (
        Word(gid, Verdict.ABORT, "changed my mind", "ann", 3_000),
        Word(gid, None, "seen", "bob", 500),
        later,
    ):
        assert await other.give_word(second) == later
    assert list(await one.words()) == [earlier, later]
    assert (await one.read(transaction)).record is None, "a word decides nothing"


@check
async def one_of_the_racing_words_stands(place: Place) -> None:
    logs = [await place.open() for _ in range(3)]
    for number in range(10):
        verdicts = (Verdict.COMMIT, Verdict.ABORT, None)
        words = [
            Word(f"gid {number}", verdict, f"reason {index}", "ann", number)
            for index, verdict in enumerate(verdicts)
        ]
        stood = await asyncio.gather(
            *(log.give_word(word) for log, word in zip(logs, words, strict=True))
        )
        assert set(stood) <= set(words)
        assert len(set(stood)) == 1
        assert (await logs[0].words())[-1] == stood[0]


@check
async def words_and_incidents_leave_each_other_alone(place: Place) -> None:
    log = await place.open()
    transaction = place.draw()
    decision = place.commit(transaction, "orders")
    await log.propose(Proposal(transaction, decision))
    gid = str(decision.branches[0].xid)
    incident = Incident(gid, "orders", EndingKind.HEURISTIC_ROLLBACK, "it was gone", 1_000)
    await log.report(incident)
    word = await log.give_word(Word(gid, None, "paid by hand", "ann", 2_000))
    assert list(await log.incidents()) == [incident]
    record = (await log.read(transaction)).record
    assert record is not None and not record.finished
    await log.acknowledge(gid)
    await log.raise_horizon(place.draw())
    assert await log.forget(10, claims_before_ms=1 << 46) == 1
    assert list(await log.words()) == [word], "words are never forgotten"


@check
async def reopening_keeps_everything(place: Place) -> None:
    log = await place.open()
    identity = place.identity
    transaction, pending = place.draw(), place.draw()
    decision = place.commit(transaction, "orders")
    attempt = Attempt(transaction, 10_000, MEMBER)
    await log.name_attempt(KEY, attempt, None)
    record = stands(await log.propose(Proposal(transaction, decision, (KEY,), b"result"))).record
    unfinished = place.delegated(pending, "orders", "stock")
    await log.propose(Proposal(pending, unfinished))
    await log.finish([Mark(pending, unfinished.branches[0].id)])
    await log.record_answer(pending, Verdict.COMMIT)
    horizon = await log.raise_horizon(place.draw())
    resource = await log.register("orders", "system 7", REGISTERED_MS)
    incident = Incident("sp:foreign", "stock", None, "below the horizon", 1_000)
    await log.report(incident)
    word = await log.give_word(Word("sp:foreign", Verdict.ABORT, "no such order", "ann", 1_500))
    await place.close()
    log = await place.open()
    assert place.identity == identity
    assert (await log.read(transaction)).record == record
    assert (await log.read(transaction)).horizon == horizon
    assert (await log.scan(None, 10)).records == (
        record,
        Record(pending, unfinished, b"", Verdict.COMMIT, frozenset({unfinished.branches[0].id})),
    )
    assert await log.read_key(KEY) == KeyState(transaction, True, b"result", attempt)
    assert await log.resources() == (resource,)
    assert list(await log.incidents()) == [incident]
    assert list(await log.words()) == [word]


@check
async def closing_twice_is_harmless_and_closed_is_unavailable(place: Place) -> None:
    log, other = await place.open(), await place.open()
    await log.close()
    await log.close()
    transaction = place.draw()
    for call in (log.propose(Proposal(transaction, ABORT)), log.read(transaction)):
        with pytest.raises(LogUnavailable):
            await call
    assert stands(await other.propose(Proposal(transaction, ABORT))).ours


@check
async def closing_finishes_what_was_accepted(place: Place) -> None:
    log = await place.open()
    ids = [place.draw() for _ in range(50)]
    tasks = [asyncio.ensure_future(log.propose(Proposal(each, ABORT))) for each in ids]
    await asyncio.sleep(0)  # each task has handed its proposal over
    await log.close()
    assert all(stands(answer).ours for answer in await asyncio.gather(*tasks))
    log = await place.open()
    assert await scanned(log, 100, unfinished_only=False) == ids


@check
async def a_cancelled_caller_loses_nothing(place: Place) -> None:
    log = await place.open()
    ids = [place.draw() for _ in range(20)]
    tasks = [
        asyncio.ensure_future(log.propose(Proposal(each, place.commit(each, "orders"))))
        for each in ids
    ]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for each in ids:
        answer = stands(await log.propose(Proposal(each, ABORT)))
        assert answer.record.decision.verdict is Verdict.COMMIT, "it had been handed over"
