"""The suite's part on keys: claims with their results, and the names of current attempts."""

from __future__ import annotations

import asyncio

from coordinator.log.base import Attempt, ClaimHeld, KeyState, Proposal, Stands
from coordinator.model import ABORT, Claim, TransactionId, Verdict, id_time_ms
from tests.conformance.log_suite import KEY, MEMBER, OTHER_KEY, Place, check, finish_all, stands


def attempt_of(transaction: TransactionId) -> Attempt:
    """Another time for each transaction, so that no attempt passes for another one."""
    return Attempt(transaction, id_time_ms(transaction) % 100_000, MEMBER)


@check
async def a_held_claim_refuses_a_commit(place: Place) -> None:
    one, other = await place.open(), await place.open()
    holder, second = place.draw(), place.draw()
    await one.propose(Proposal(holder, place.commit(holder, "orders"), (KEY,)))
    proposal = Proposal(second, place.commit(second, "orders"), (OTHER_KEY, KEY))
    assert await other.propose(proposal) == ClaimHeld(KEY, holder)
    assert (await one.read(second)).record is None
    assert await one.read_key(KEY) == KeyState(holder, True)
    assert await one.read_key(OTHER_KEY) == KeyState(), "a refused commit takes no claim"
    assert stands(await one.propose(Proposal(second, ABORT, (KEY,)))).ours


@check
async def one_of_two_racing_for_a_claim_wins(place: Place) -> None:
    logs = [await place.open() for _ in range(2)]
    for round_number in range(20):
        claim = Claim("step", f"{round_number}")
        ids = [place.draw() for _ in range(4)]
        answers = await asyncio.gather(
            *(
                logs[n % 2].propose(Proposal(each, place.commit(each, "orders"), (claim,)))
                for n, each in enumerate(ids)
            )
        )
        winners = [
            each
            for each, answer in zip(ids, answers, strict=True)
            if isinstance(answer, Stands) and answer.ours
        ]
        assert len(winners) == 1
        assert await logs[0].read_key(claim) == KeyState(winners[0], True)
        losers = [answer for answer in answers if not isinstance(answer, Stands)]
        assert losers == [ClaimHeld(claim, winners[0])] * 3


@check
async def the_same_claim_twice_in_a_proposal_is_one(place: Place) -> None:
    log = await place.open()
    transaction = place.draw()
    proposal = Proposal(transaction, place.commit(transaction, "orders"), (KEY, KEY), b"result")
    assert stands(await log.propose(proposal)).ours
    assert await log.read_key(KEY) == KeyState(transaction, True, b"result")


@check
async def an_answer_of_abort_frees_the_claims(place: Place) -> None:
    log = await place.open()
    transaction, following_attempt = place.draw(), place.draw()
    decision = place.delegated(transaction, "orders")
    await log.propose(Proposal(transaction, decision, (KEY,), b"result"))
    assert await log.record_answer(transaction, Verdict.ABORT) is Verdict.ABORT
    record = (await log.read(transaction)).record
    assert record is not None and record.finished
    assert await log.read_key(KEY) == KeyState()
    proposal = Proposal(following_attempt, place.commit(following_attempt, "orders"), (KEY,))
    assert stands(await log.propose(proposal)).ours


@check
async def a_claim_stays_as_long_as_its_holders_record(place: Place) -> None:
    """Else another attempt could run while a last resource may still commit the former one."""
    log = await place.open()
    transaction, later = place.draw(), place.draw()
    decision = place.delegated(transaction, "orders")
    await log.propose(Proposal(transaction, decision, (KEY,), b"result"))
    await log.raise_horizon(later)
    expired_ms = id_time_ms(transaction) + 1
    await log.forget(10, claims_before_ms=expired_ms)
    assert await log.read_key(KEY) == KeyState(transaction)
    await log.record_answer(transaction, Verdict.COMMIT)
    await finish_all(log, decision)
    await log.forget(10, claims_before_ms=expired_ms)
    await log.forget(10, claims_before_ms=expired_ms)
    assert await log.read_key(KEY) == KeyState()


@check
async def claims_outlive_their_records_and_the_horizon(place: Place) -> None:
    log = await place.open()
    transaction, later = place.draw(), place.draw()
    decision = place.commit(transaction, "orders")
    await log.propose(Proposal(transaction, decision, (KEY, OTHER_KEY), b"result"))
    await finish_all(log, decision)
    taken_ms = id_time_ms(transaction)
    await log.forget(10, claims_before_ms=taken_ms + 1)
    taken = KeyState(transaction, True, b"result")
    assert await log.read_key(KEY) == taken, "it is above the horizon"
    await log.raise_horizon(later)
    await log.forget(10, claims_before_ms=taken_ms)
    assert (await log.read(transaction)).record is None
    for claim in (KEY, OTHER_KEY):
        assert await log.read_key(claim) == taken, "its own retention has not passed"
    again = Proposal(later, place.commit(later, "orders"), (KEY,))
    assert await log.propose(again) == ClaimHeld(KEY, transaction)
    await log.forget(10, claims_before_ms=taken_ms + 1)
    for claim in (KEY, OTHER_KEY):
        assert await log.read_key(claim) == KeyState()
    assert stands(await log.propose(again)).ours


@check
async def an_attempt_is_named_by_compare_and_set(place: Place) -> None:
    one, other = await place.open(), await place.open()
    first, second = attempt_of(place.draw()), attempt_of(place.draw())
    stranger = place.draw()
    assert await one.read_key(KEY) == KeyState()
    assert await one.name_attempt(KEY, first, stranger) == KeyState(), "nothing was named"
    assert await one.name_attempt(KEY, first, None) == KeyState(attempt=first)
    assert await other.read_key(KEY) == KeyState(attempt=first)
    for expected in (None, stranger, second.transaction):
        assert await other.name_attempt(KEY, second, expected) == KeyState(attempt=first)
    assert await one.name_attempt(KEY, first, None) == KeyState(attempt=first), "asked again"
    assert await one.read_key(KEY) == KeyState(attempt=first)
    second_stands = KeyState(attempt=second)
    assert await other.name_attempt(KEY, second, first.transaction) == second_stands
    assert await one.read_key(KEY) == second_stands
    for expected in (None, first.transaction):
        assert await one.name_attempt(KEY, first, expected) == second_stands


@check
async def each_key_has_a_name_of_its_own(place: Place) -> None:
    log = await place.open()
    claims = [KEY, OTHER_KEY, Claim("step", KEY.key)]
    attempts = [attempt_of(place.draw()) for _ in claims]
    for claim, attempt in zip(claims, attempts, strict=True):
        assert await log.name_attempt(claim, attempt, None) == KeyState(attempt=attempt)
    for claim, attempt in zip(claims, attempts, strict=True):
        assert await log.read_key(claim) == KeyState(attempt=attempt)


@check
async def one_of_the_callers_racing_for_a_key_names_its_attempt(place: Place) -> None:
    logs = [await place.open() for _ in range(2)]
    former: TransactionId | None = None
    for _ in range(20):
        attempts = [attempt_of(place.draw()) for _ in range(4)]
        states = await asyncio.gather(
            *(logs[n % 2].name_attempt(KEY, each, former) for n, each in enumerate(attempts))
        )
        assert len({state.attempt for state in states}) == 1
        stands_now = states[0].attempt
        assert stands_now in attempts
        assert await logs[0].read_key(KEY) == KeyState(attempt=stands_now)
        former = stands_now.transaction


@check
async def nobody_names_an_attempt_under_a_held_key(place: Place) -> None:
    one, other = await place.open(), await place.open()
    attempt, following = attempt_of(place.draw()), attempt_of(place.draw())
    holder = attempt.transaction
    await one.name_attempt(KEY, attempt, None)
    await one.propose(Proposal(holder, place.commit(holder, "orders"), (KEY, OTHER_KEY), b"result"))
    for claim, named in ((KEY, attempt), (OTHER_KEY, None)):
        held = KeyState(holder, True, b"result", named)
        for expected in (holder, None):
            assert await other.name_attempt(claim, following, expected) == held
        assert await one.read_key(claim) == held


@check
async def a_result_counts_once_the_last_resource_has_answered(place: Place) -> None:
    log = await place.open()
    for answer in (Verdict.COMMIT, Verdict.ABORT):
        claim = Claim("key", answer)
        attempt, following = attempt_of(place.draw()), attempt_of(place.draw())
        holder = attempt.transaction
        await log.name_attempt(claim, attempt, None)
        decision = place.delegated(holder, "orders")
        await log.propose(Proposal(holder, decision, (claim,), b"result"))
        unresolved = KeyState(holder, attempt=attempt)
        assert await log.read_key(claim) == unresolved
        assert await log.name_attempt(claim, following, holder) == unresolved
        await log.record_answer(holder, answer)
        if answer is Verdict.COMMIT:
            resolved = KeyState(holder, True, b"result", attempt)
            assert await log.read_key(claim) == resolved
            assert await log.name_attempt(claim, following, holder) == resolved
        else:
            assert await log.read_key(claim) == KeyState(attempt=attempt)
            named = await log.name_attempt(claim, following, holder)
            assert named == KeyState(attempt=following)


@check
async def names_of_attempts_have_the_retention_of_claims(place: Place) -> None:
    log = await place.open()
    attempt, later = attempt_of(place.draw()), attempt_of(place.draw())
    named_ms = id_time_ms(attempt.transaction)
    await log.name_attempt(KEY, attempt, None)
    await log.name_attempt(OTHER_KEY, later, None)
    await log.forget(10, claims_before_ms=named_ms + 1)
    assert await log.read_key(KEY) == KeyState(attempt=attempt), "it is above the horizon"
    await log.raise_horizon(place.draw())
    await log.forget(10, claims_before_ms=named_ms)
    assert await log.read_key(KEY) == KeyState(attempt=attempt), "its retention has not passed"
    await log.forget(10, claims_before_ms=named_ms + 1)
    assert await log.read_key(KEY) == KeyState()
    assert await log.read_key(OTHER_KEY) == KeyState(attempt=later)
    assert await log.name_attempt(KEY, later, attempt.transaction) == KeyState(), "it is gone"
    assert await log.name_attempt(KEY, later, None) == KeyState(attempt=later)


@check
async def forgetting_keys_is_limited_and_oldest_first(place: Place) -> None:
    log = await place.open()
    by_age = [Claim("key", each) for each in ("d", "a", "e", "b", "c")]
    single = {claim: place.draw() for claim in by_age[:3]}
    shared = place.draw()  # its two keys go in their own order
    for transaction, claims in (
        *((each, (claim,)) for claim, each in single.items()),
        (shared, (by_age[4], by_age[3])),
    ):
        for claim in claims:
            await log.name_attempt(claim, attempt_of(transaction), None)
        decision = place.commit(transaction, "orders")
        await log.propose(Proposal(transaction, decision, claims))
        await finish_all(log, decision)
    unclaimed = [Claim("step", each) for each in ("b", "a")]
    for claim in unclaimed:
        await log.name_attempt(claim, attempt_of(place.draw()), None)
    newest = place.draw()
    await log.raise_horizon(newest)
    assert await log.forget(10, claims_before_ms=0) == 4
    for limit, claims_left, names_left in (
        (2, by_age[2:], by_age[2:] + unclaimed),
        (2, by_age[4:], by_age[4:] + unclaimed),
        (2, [], unclaimed[1:]),
        (2, [], []),
    ):
        deleted = await log.forget(limit, claims_before_ms=id_time_ms(newest))
        assert deleted == 0, "the records are gone"
        states = {claim: await log.read_key(claim) for claim in by_age + unclaimed}
        assert [claim for claim, state in states.items() if state.holder] == claims_left
        assert [claim for claim, state in states.items() if state.attempt] == names_left
