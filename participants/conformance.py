"""What every participant promises, as checks that run against yours.

    class Harness:                       # see the protocol below
        ...

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
    async def test_conformance(check):
        await check(Harness())

A check fails with `AssertionError`. It leaves nothing prepared when it passes. Each opens its own
participants; `trial` runs a body in a transaction that the check then ends by hand.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol, cast

from uuid_utils import uuid7

from coordinator.context import enter, leave
from coordinator.errors import TransactionError
from coordinator.hooks import AfterEnd, BeforeCommit, Hooks
from coordinator.model import (
    FINISHED,
    Branch,
    BranchId,
    Ending,
    EndingKind,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    VoteKind,
    Xid,
)
from coordinator.participant import Binding, OnePhase, Participant
from coordinator.transactional import GlobalTransaction

TRIAL_SECONDS = 30.0


class Harness(Protocol):
    """How the checks reach a resource. One harness is one resource, empty at first."""

    def participant(self) -> Participant:
        """A new, closed participant on the resource, as another process would have it."""

    async def write(self, participant: Participant) -> None:
        """Write one thing more, in the running transaction."""

    async def read(self, participant: Participant) -> None:
        """Read something and write nothing, in the running transaction."""

    async def count(self) -> int:
        """How many writes are committed, seen from outside."""


class TrialTransaction:
    """Stands in for an asynchronous `GlobalTransaction` where a check plays the coordinator."""

    blocking = False
    outer = None
    token = None

    def __init__(self, binding: Binding, seconds: float = TRIAL_SECONDS) -> None:
        self.id = TransactionId(str(uuid7()))
        self.log_id = binding.log
        self.loop = asyncio.get_running_loop()
        self.deadline = self.waits_end = self.loop.time() + seconds
        self.is_over = self.has_ended = False
        self.hooks = Hooks()
        self.branches: list[Branch] = []
        self._member = binding.member

    def refuse_unless_of(self, verb: str, *, blocking: bool) -> None:
        if blocking:
            raise TransactionError(f"{verb} is synchronous, but the trial is not")

    async def admit(self) -> None:
        """There is no gate: a trial has the resource for itself."""

    def before_commit(self, call: BeforeCommit) -> None:
        self.hooks.before_commit.append(call)

    def after_end(self, call: AfterEnd) -> None:
        self.hooks.after_end.append(call)

    async def enlist(
        self, participant: Participant, *, one_phase: bool = False, last_resource: bool = False
    ) -> Xid:
        if self.is_over:
            raise TransactionError("the trial transaction is over")
        xid = Xid(self.log_id, self._member, self.id, BranchId(secrets.token_hex(8)))
        self.branches.append(Branch(xid, participant.name))
        return xid

    @property
    def branch(self) -> Branch:
        """The only branch that was enlisted."""
        (branch,) = self.branches
        return branch


def binding(log: LogId | None = None) -> Binding:
    """For a log of its own unless one is named."""
    return Binding(
        log or LogId(secrets.token_hex(8)), MemberId(secrets.token_hex(8)), "conformance"
    )


@asynccontextmanager
async def opened(harness: Harness, bound: Binding) -> AsyncIterator[Participant]:
    """A participant, open as long as the block runs."""
    participant = harness.participant()
    await participant.open(bound)
    try:
        yield participant
    finally:
        await participant.close()


@asynccontextmanager
async def trial(bound: Binding, seconds: float = TRIAL_SECONDS) -> AsyncIterator[TrialTransaction]:
    """Run the block in a transaction; leaving it closes enlistment and ends nothing."""
    transaction = TrialTransaction(bound, seconds)
    former = enter(cast(GlobalTransaction, transaction))
    try:
        yield transaction
        await transaction.hooks.run_before_commit()
    finally:
        transaction.is_over = True
        leave(former)


async def prepared(harness: Harness, participant: Participant, bound: Binding) -> Branch:
    """A branch that wrote one thing and voted PREPARED, with its token."""
    async with trial(bound) as transaction:
        await harness.write(participant)
    branch = transaction.branch
    vote = await participant.prepare(branch.xid)
    assert vote.kind is VoteKind.PREPARED, vote
    return Branch(branch.xid, branch.participant, vote.token)


async def check_commits(harness: Harness) -> None:
    """A prepared write is invisible, then committed; committing again changes nothing."""
    bound = binding()
    async with opened(harness, bound) as participant:
        branch = await prepared(harness, participant, bound)
        assert await harness.count() == 0
        assert await participant.commit(branch) == FINISHED
        assert await harness.count() == 1
        assert await participant.commit(branch) == FINISHED
        assert await harness.count() == 1


async def check_rolls_back(harness: Harness) -> None:
    """Rolled back prepared or not, nothing remains; repeating it changes nothing."""
    bound = binding()
    async with opened(harness, bound) as participant:
        branch = await prepared(harness, participant, bound)
        async with trial(bound) as transaction:
            await harness.write(participant)
        for each in (branch, branch, transaction.branch, transaction.branch):
            assert await participant.rollback(each) == FINISHED
        assert await harness.count() == 0
        assert list(await participant.recover()) == []


async def check_rollback_of_unknown_is_finished(harness: Harness) -> None:
    """A branch that never was is rolled back already."""
    bound = binding()
    async with opened(harness, bound) as participant:
        async with trial(bound) as transaction:
            xid = await transaction.enlist(participant)
        assert await participant.rollback(Branch(xid, participant.name)) == FINISHED


async def check_commit_of_rolled_back_is_heuristic(harness: Harness) -> None:
    """Told to commit what somebody rolled back, it says so instead of FINISHED."""
    bound = binding()
    async with opened(harness, bound) as participant:
        branch = await prepared(harness, participant, bound)
        assert await participant.rollback(branch) == FINISHED
        ending = await participant.commit(branch)
        assert ending.kind in (EndingKind.HEURISTIC_ROLLBACK, EndingKind.HEURISTIC_HAZARD), ending
        assert ending.evidence


async def check_rollback_of_committed_is_heuristic(harness: Harness) -> None:
    """Told to roll back what was committed, it says so instead of FINISHED."""
    bound = binding()
    async with opened(harness, bound) as participant:
        branch = await prepared(harness, participant, bound)
        assert await participant.commit(branch) == FINISHED
        ending = await participant.rollback(branch)
        assert ending.kind is EndingKind.HEURISTIC_COMMIT, ending
        assert ending.evidence


async def check_recover_shows_only_ours(harness: Harness) -> None:
    """Branches of other logs are never shown."""
    bound, foreign = binding(), binding()
    async with opened(harness, bound) as participant, opened(harness, foreign) as other:
        branch = await prepared(harness, participant, bound)
        assert [found.xid for found in await participant.recover()] == [branch.xid]
        assert list(await other.recover()) == []
        assert await participant.rollback(branch) == FINISHED
        assert list(await participant.recover()) == []


async def check_prepared_survives_reopening(harness: Harness) -> None:
    """Another process finds the prepared branch and commits it."""
    bound = binding()
    async with opened(harness, bound) as participant:
        branch = await prepared(harness, participant, bound)
    async with opened(harness, binding(bound.log)) as participant:
        assert [found.xid for found in await participant.recover()] == [branch.xid]
        assert await participant.commit(branch) == FINISHED
    assert await harness.count() == 1


async def check_identity_is_the_same_for_all(harness: Harness) -> None:
    """Two participants on one resource give one identity, also after reopening."""
    first, second = harness.participant(), harness.participant()
    identities = {await first.open(binding()), await second.open(binding())}
    await first.close()
    identities.add(await first.open(binding()))
    await first.close()
    await second.close()
    assert len(identities) == 1, identities


async def check_reading_votes_read_only(harness: Harness) -> None:
    """What wrote nothing is not prepared, and is ended by commit, repeatedly, by anyone."""
    bound = binding()
    async with opened(harness, bound) as participant:
        async with trial(bound) as transaction:
            await harness.read(participant)
        vote = await participant.prepare(transaction.branch.xid)
        assert vote.kind is VoteKind.READ_ONLY, vote
        assert list(await participant.recover()) == []
        branch = Branch(transaction.branch.xid, participant.name, vote.token)
        assert await participant.commit(branch) == FINISHED
        assert await participant.commit(branch) == FINISHED


async def check_six_may_commit_at_once(harness: Harness) -> None:
    """Six callers in two processes commit one branch, and all are told that it is finished."""
    bound = binding()
    async with opened(harness, bound) as participant, opened(harness, bound) as other:
        branch = await prepared(harness, participant, bound)
        endings = await asyncio.gather(
            *(_until_answered(each.commit, branch) for each in (participant, other) * 3)
        )
        assert [ending.kind for ending in endings] == [EndingKind.FINISHED] * 6, endings
        assert await harness.count() == 1


async def check_prepare_of_unknown_votes_no(harness: Harness) -> None:
    """Who has no work under the name cannot promise anything."""
    bound = binding()
    async with opened(harness, bound) as participant:
        async with trial(bound) as transaction:
            xid = await transaction.enlist(participant)
        vote = await participant.prepare(xid)
        assert vote.kind is VoteKind.ABORTED and vote.reason, vote


async def check_no_work_after_the_end(harness: Harness) -> None:
    """A stray task that works on after the vote is refused, and nothing of it is committed."""
    bound = binding()
    async with opened(harness, bound) as participant:
        go_on = asyncio.Event()

        async def stray() -> None:
            await go_on.wait()
            await harness.write(participant)

        async with trial(bound) as transaction:
            await harness.write(participant)
            task = asyncio.create_task(stray())
        vote = await participant.prepare(transaction.branch.xid)
        go_on.set()
        (error,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(error, TransactionError), error
        branch = Branch(transaction.branch.xid, participant.name, vote.token)
        assert await participant.commit(branch) == FINISHED
        assert await harness.count() == 1


async def check_work_outside_a_transaction_is_refused(harness: Harness) -> None:
    """There is no transaction to take part in, and nothing is written."""
    async with opened(harness, binding()) as participant:
        try:
            await harness.write(participant)
        except TransactionError:
            pass
        else:
            raise AssertionError("work outside a transaction was accepted")
    assert await harness.count() == 0


async def check_one_phase(harness: Harness) -> None:
    """Who offers one phase commits in it; a branch without work is not committed."""
    bound = binding()
    async with opened(harness, bound) as participant:
        if not isinstance(participant, OnePhase):
            return
        async with trial(bound) as transaction:
            await harness.write(participant)
        verdict, _, _ = await participant.commit_one_phase(transaction.branch)
        assert verdict is Verdict.COMMIT
        verdict, reason, _ = await participant.commit_one_phase(transaction.branch)
        assert verdict is Verdict.ABORT and reason
    assert await harness.count() == 1


async def _until_answered(end: Callable[[Branch], Awaitable[Ending]], branch: Branch) -> Ending:
    """As the engine does: an exception means that the same call may be made again."""
    async with asyncio.timeout(TRIAL_SECONDS):
        while True:
            try:
                return await end(branch)
            except Exception:
                await asyncio.sleep(0.01)


Check = Callable[[Harness], Awaitable[None]]

CHECKS: tuple[Check, ...] = (
    check_commits,
    check_rolls_back,
    check_rollback_of_unknown_is_finished,
    check_commit_of_rolled_back_is_heuristic,
    check_rollback_of_committed_is_heuristic,
    check_recover_shows_only_ours,
    check_prepared_survives_reopening,
    check_identity_is_the_same_for_all,
    check_reading_votes_read_only,
    check_six_may_commit_at_once,
    check_prepare_of_unknown_votes_no,
    check_no_work_after_the_end,
    check_work_outside_a_transaction_is_refused,
    check_one_phase,
)
