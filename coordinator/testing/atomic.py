"""`assert_atomic`: everything has ended, all of it or nothing of it, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from coordinator.context import running
from coordinator.coordinator import Coordinator
from coordinator.errors import ConfigurationError, LogUnavailable, TransactionError
from coordinator.log.base import Record, Unreadable, every_record
from coordinator.model import EndingKind, TransactionId, Verdict
from coordinator.participant import LastResource
from coordinator.recovery import Round

POLL_SECONDS = 0.02


async def assert_atomic(coordinator: Coordinator, *, within: float = 10.0) -> None:
    """Recover until nothing is in doubt, at most `within` seconds, then compare all with the log.

    Raises `AssertionError` naming what is left: a transaction that is in doubt or still runs, a
    branch that ended against the decision, and a branch of a recorded commit whose participant,
    asked once more, does not say that it committed. Opens a closed coordinator for as long as it
    takes, as the restart after a crash would.

    It sees what participants know. That the amounts are right, and that a participant with a bug of
    its own did not write elsewhere, only your own queries can tell.
    """
    if running() is not None:
        raise TransactionError("assert_atomic() was called inside a transaction: leave it first")
    if coordinator.loop is not None:
        await _check(coordinator, within)
        return
    if coordinator.log_url == "memory:":
        raise ConfigurationError(
            "the log memory: is forgotten when its coordinator closes, so nothing can be compared "
            "any more: name it (memory:NAME), or use coordinator.testing.coordinator()"
        )
    await coordinator.open(sweep=False)
    try:
        await _check(coordinator, within)
    finally:
        await coordinator.close()


def assert_atomic_blocking(coordinator: Coordinator, *, within: float = 10.0) -> None:
    """The same for synchronous callers. A closed coordinator is closed again afterwards."""
    if coordinator.loop is not None:
        coordinator.blocking.run(assert_atomic(coordinator, within=within))
        return
    with coordinator.blocking:
        coordinator.blocking.run(assert_atomic(coordinator, within=within))


async def _check(coordinator: Coordinator, within: float) -> None:
    left = await _settle(coordinator, within)
    if not left:
        left = [*await _incidents(coordinator), *await _against_the_log(coordinator)]
    if left:
        raise AssertionError("not everything ended in one way:\n- " + "\n- ".join(left))


async def _settle(coordinator: Coordinator, within: float) -> list[str]:
    """What has not ended by then; empty as soon as everything has."""
    loop = asyncio.get_running_loop()
    until = loop.time() + within
    while True:
        try:
            left = await _left(coordinator, await coordinator.recover())
        except LogUnavailable as error:
            left = [f"the log does not answer: {error}"]
        if not left or loop.time() >= until:
            return left
        await asyncio.sleep(POLL_SECONDS)


async def _left(coordinator: Coordinator, seen: Round) -> list[str]:
    engine = coordinator.engine()
    prepared: dict[TransactionId, list[str]] = {}
    if seen.in_doubt:
        for name, participant in engine.participants.items():
            if name not in seen.unreachable:
                for branch in await participant.recover():
                    prepared.setdefault(branch.xid.transaction, []).append(name)
    return [
        *(
            f"transaction {each} is in doubt; prepared in: {_listed(prepared.get(each, ()))}"
            for each in sorted(seen.in_doubt)
        ),
        *(f"{driver.core!r} still runs" for driver in engine.drivers.values()),
        *(f"{name} cannot be asked: {why}" for name, why in seen.unreachable.items()),
        *(f"the record of {each} cannot be read: {why}" for each, why in seen.unreadable.items()),
    ]


async def _incidents(coordinator: Coordinator) -> list[str]:
    return [
        f"branch {each.gid} of {each.participant}: {each.kind or 'quarantined'} ({each.evidence})"
        for each in await coordinator.engine().log.incidents()
    ]


async def _against_the_log(coordinator: Coordinator) -> list[str]:
    """The branches of recorded commits that did not commit, as their participants tell."""
    wrong: list[str] = []
    async for record in every_record(coordinator.engine().log, unfinished_only=False):
        if not isinstance(record, Unreadable) and _is_commit(record):
            wrong += await _not_committed(coordinator, record)
    return wrong


def _is_commit(record: Record) -> bool:
    return (record.answer or record.decision.verdict) is Verdict.COMMIT


async def _not_committed(coordinator: Coordinator, record: Record) -> list[str]:
    participants = coordinator.engine().participants
    wrong: list[str] = []
    for branch in record.decision.named:
        said = ""
        participant = participants.get(branch.participant)
        if participant is None:
            said = "there is no such participant here to be asked"
        elif branch == record.decision.last_resource:
            if isinstance(participant, LastResource):
                answer = await participant.ask(branch, commit=True)
                said = "" if answer is Verdict.COMMIT else f"it answers {answer}"
        else:
            ending = await participant.commit(branch)
            if ending.kind is not EndingKind.FINISHED:
                said = f"{ending.kind} ({ending.evidence})"
        if said:
            wrong.append(
                f"transaction {record.transaction} is committed, but {branch.participant}: {said}"
            )
    return wrong


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
