"""The sweep: finds what crashes and lost answers left behind, and drives it to its end.

One `round` observes and acts once, by the pure rules of `coordinator.sweep`; `run` repeats it for
as long as the coordinator is open, and `syncpoint recover` until nothing is left. Any process that
has the participant may sweep it, at the same time as others: whoever drives a transaction proposes
abort and obeys what stands.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import msgspec

from coordinator.driver import Driver
from coordinator.engine import Engine, now_ms
from coordinator.errors import LogUnavailable
from coordinator.log.base import (
    PAGE,
    Incident,
    Log,
    Record,
    RecordUnreadable,
    Unreadable,
    every_record,
)
from coordinator.logs import note, say, say_of
from coordinator.members.base import Beat
from coordinator.model import Branch, MemberId, Outcome, TransactionId
from coordinator.participant import Participant
from coordinator.protocol import Phase
from coordinator.sweep import Case, Watch, clear_mark, horizon_candidate, owners_of

logger = logging.getLogger("syncpoint.recovery")

DRIVEN_AT_ONCE = 16
HOUSEKEEPING_SECONDS = 5.0
FORGOTTEN_PAGES_MOST = 20
"""How much is forgotten at a time: 4,000 transactions a second, in one process."""


class Round(msgspec.Struct):
    """What one round of the sweep saw and did; counts are of transactions unless it is said."""

    committed: int = 0
    aborted: int = 0
    in_doubt: set[TransactionId] = msgspec.field(default_factory=set)
    """Seen, not yet ended: live, or to be tried again in the next round."""
    cases: list[Case] = msgspec.field(default_factory=list)
    """What this round drove, or with `dry_run` would have driven, oldest first."""
    quarantined: int = 0
    incidents: list[Incident] = msgspec.field(default_factory=list)
    """The branches that need a person, from this round and before, oldest first."""
    unreachable: dict[str, str] = msgspec.field(default_factory=dict)
    """Participants that could not list their branches, and why."""
    unreadable: dict[TransactionId, str] = msgspec.field(default_factory=dict)
    """Records that cannot be decoded; each parks its own transaction only."""

    @property
    def clean(self) -> bool:
        """Nothing is in doubt, and every participant has said so."""
        return not (self.in_doubt or self.unreachable or self.unreadable)


class Recovery:
    """Sweeps the participants of one open coordinator.

    `unreachable` are those that could not be opened, and why; every round reports them.
    """

    def __init__(self, engine: Engine, unreachable: Mapping[str, str]) -> None:
        self.unreachable = unreachable
        self._engine = engine
        self._watch = Watch(engine.settings.timeout_max)
        self._kept_house = float("-inf")
        self._complained: dict[str, str] = {}
        self._sighted: set[TransactionId] = set()

    async def run(self) -> None:
        """Sweep for ever. A round that fails is logged, and the next one tries again."""
        while True:
            try:
                await self.round()
            except LogUnavailable as error:
                self._complain("the log", str(error))
            except Exception as error:
                message = "a round of the sweep failed"
                note(logger, logging.ERROR, "sweep-failed", message, exc_info=error)
            await asyncio.sleep(self._engine.settings.sweep_interval)

    async def round(
        self, progress: Callable[[int, int], None] | None = None, *, dry_run: bool = False
    ) -> Round:
        """Observe and act once; with `dry_run` only observe.

        `progress` is told how many of how many cases are done. Raises `LogUnavailable` when the log
        does not answer; then nothing was presumed.
        """
        engine, report = self._engine, Round(unreachable=dict(self.unreachable))
        await engine.write_marks()  # else our own finished transactions look unfinished
        alive = await engine.members.alive()
        engine.members_seen = max(len(alive), 1)
        quarantined = {incident.gid for incident in await engine.log.incidents()}
        scan_began_ms = now_ms()
        scans = await self._scan_participants(report)
        # What waits for a person is neither driven again nor does it hold up forgetting.
        found = {
            name: [branch for branch in branches if str(branch.xid) not in quarantined]
            for name, branches in scans.items()
        }
        seen = [branch for branches in found.values() for branch in branches]
        records = await self._read_records(seen, report)
        in_sight = {branch.xid.transaction for branch in seen}
        parked = {
            transaction
            for transaction, record in records.items()
            # A branch that the record does not name has still to be rolled back.
            if transaction not in in_sight and _is_parked(record, quarantined)
        }
        cases = self._watch.judge(
            now=asyncio.get_running_loop().time(),
            alive=alive,
            seen=seen,
            records=records,
            driven_here=engine.drivers.keys() | report.unreadable.keys() | parked,
        )
        report.in_doubt = set(in_sight)
        report.in_doubt |= {t for t, r in records.items() if not r.finished and t not in parked}
        report.cases = cases
        if logger.isEnabledFor(logging.DEBUG):
            self._tell_sights(seen, records, report.in_doubt)
            if not dry_run:
                _tell_driven(cases, alive)
        if not dry_run:
            await self._drive(cases, report, progress)
            # The horizon passes what cannot be read: its record stands below it as well.
            readable = {
                name: [each for each in branches if each.xid.transaction not in report.unreadable]
                for name, branches in found.items()
            }
            await self._keep_house(alive, readable, records, scan_began_ms)
        report.incidents = list(await engine.log.incidents())
        return report

    # Observing.

    async def _scan_participants(self, report: Round) -> dict[str, list[Branch]]:
        found, failures = await scan_participants(self._engine)
        report.unreachable.update(failures)
        for name, why in failures.items():
            self._complain(name, f"cannot list its branches: {why}", participant=name)
        for name in found:
            self._complained.pop(name, None)
        return found

    async def _read_records(
        self, seen: Iterable[Branch], report: Round
    ) -> dict[TransactionId, Record]:
        """The unfinished records, and those that stand under the ids that were seen."""
        log = self._engine.log
        records: dict[TransactionId, Record] = {}
        async for record in every_record(log):
            self._sort(record, records, report)
        for transaction in {branch.xid.transaction for branch in seen}:
            if transaction in records or transaction in report.unreadable:
                continue
            if transaction in self._engine.drivers:
                continue
            found = await read_one(log, transaction)
            if found is not None:
                self._sort(found, records, report)
        return records

    def _sort(
        self, found: Record | Unreadable, records: dict[TransactionId, Record], report: Round
    ) -> None:
        if isinstance(found, Unreadable):
            report.unreadable[found.transaction] = found.why
            self._complain_of(found.transaction, f"its record cannot be read: {found.why}")
        else:
            records[found.transaction] = found

    def _tell_sights(
        self,
        seen: Iterable[Branch],
        records: Mapping[TransactionId, Record],
        in_doubt: Set[TransactionId],
    ) -> None:
        """Tell what is not driven here and was not seen by the round before."""
        prepared: dict[TransactionId, list[str]] = {}
        for branch in seen:
            prepared.setdefault(branch.xid.transaction, []).append(branch.participant)
        elsewhere = in_doubt - self._engine.drivers.keys()
        for transaction in sorted(elsewhere - self._sighted):
            names = sorted(prepared.get(transaction, ()))
            record = records.get(transaction)
            verdict = None if record is None else record.answer or record.decision.verdict
            message = "seen, prepared in %s; in the log stands: %s"
            fields: dict[str, Any] = {"participants": names, "verdict": verdict}
            shown = (", ".join(names) or "nothing that answers", verdict or "nothing")
            say(logger, logging.DEBUG, transaction, "seen", message, *shown, **fields)
        self._sighted = elsewhere

    # Acting.

    async def _drive(
        self,
        cases: list[Case],
        report: Round,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        gate = asyncio.Semaphore(DRIVEN_AT_ONCE)
        done = 0

        async def one(case: Case) -> None:
            nonlocal done
            async with gate:
                try:
                    await self._drive_one(case, report)
                except Exception as error:
                    # One transaction that cannot be driven must not stop the others.
                    self._complain_of(case.transaction, f"cannot be driven: {error}")
            done += 1
            if progress is not None:
                progress(done, len(cases))

        await asyncio.gather(*(one(case) for case in cases))

    async def _drive_one(self, case: Case, report: Round) -> None:
        if case.transaction in self._engine.drivers:
            return
        driver = await self._engine.recover(case)
        if driver.core.phase is Phase.UNKNOWN:
            await self._quarantine(case, report)
        elif driver.core.phase is Phase.ENDED:
            report.in_doubt.discard(case.transaction)
            committed = driver.core.outcome is Outcome.COMMITTED
            report.committed += committed
            report.aborted += not committed
            outcome = driver.core.outcome
            about = logger, logging.INFO, case.transaction
            say(*about, "recovered", "recovered: %s", outcome, outcome=outcome)
        else:
            self._complain_of(case.transaction, f"not ended yet: {_why_left(driver)}")

    async def _quarantine(self, case: Case, report: Round) -> None:
        """The log has forgotten the id: look again, and show what is still there to a person."""
        for branch in case.branches:
            participant = self._engine.participants.get(branch.participant)
            if participant is None:
                continue
            still = {each.id for each in await _scan(self._engine, participant)}
            if branch.id not in still:
                continue
            incident = Incident(
                str(branch.xid),
                branch.participant,
                None,
                "prepared, but the log has forgotten transactions of that age: a restored backup, "
                "a late promotion, or a pause longer than the retention",
                now_ms(),
            )
            await self._engine.log.report(incident)
            about = logger, logging.ERROR, branch.participant, branch.xid
            message = "quarantined: prepared in %s, but the log has forgotten it"
            say_of(*about, "quarantined", message)
            report.quarantined += 1
        report.in_doubt.discard(case.transaction)

    # Forgetting.

    async def _keep_house(
        self,
        alive: Mapping[MemberId, Beat],
        found: dict[str, list[Branch]],
        records: dict[TransactionId, Record],
        scan_began_ms: int,
    ) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._kept_house < HOUSEKEEPING_SECONDS:
            return
        self._kept_house = now
        engine, log, settings = self._engine, self._engine.log, self._engine.settings
        retention_ms = int(settings.retention * 1000)
        for name, branches in found.items():
            clear = clear_mark(
                scan_began_ms=scan_began_ms,
                retention_ms=retention_ms,
                alive=alive,
                seen=branches,
                records=records,
            )
            await log.swept(name, clear, scan_began_ms)
        newest = max([engine.newest, *records])
        candidate = horizon_candidate(
            retention_ms=retention_ms,
            absence_limit_ms=int(settings.absence_limit * 1000),
            now_ms=scan_began_ms,
            alive=await engine.members.alive(),
            newest_seen=newest,
            resources=await log.resources(),
        )
        before, engine.horizon = engine.horizon, await log.raise_horizon(candidate)
        if engine.horizon != before:
            message = "the horizon has risen to %s"
            fields = {"horizon": engine.horizon}
            note(logger, logging.DEBUG, "horizon", message, engine.horizon, **fields)
        claims_before_ms = scan_began_ms - int(settings.key_retention * 1000)
        forgotten = 0
        for _ in range(FORGOTTEN_PAGES_MOST):  # in steps, since others wait for the log meanwhile
            count = await log.forget(PAGE, claims_before_ms=claims_before_ms)
            forgotten += count
            if count < PAGE:
                break
        if forgotten:
            message = "%d finished records were forgotten"
            note(logger, logging.DEBUG, "forgotten", message, forgotten, count=forgotten)

    def _complain(self, about: str, why: str, **fields: Any) -> None:
        """Warn once for each new reason, so that a long outage does not fill the disk."""
        if self._complained.get(about) != why:
            self._complained[about] = why
            fields["reason"] = why
            note(logger, logging.WARNING, "complaint", "%s: %s", about, why, **fields)

    def _complain_of(self, transaction: TransactionId, why: str) -> None:
        self._complain(f"transaction {transaction}", why, transaction=transaction)


async def scan_participants(engine: Engine) -> tuple[dict[str, list[Branch]], dict[str, str]]:
    """What each participant of the engine holds of ours, and why the others could not say."""
    participants = list(engine.participants.values())
    scans = await asyncio.gather(
        *(_scan(engine, participant) for participant in participants), return_exceptions=True
    )
    found: dict[str, list[Branch]] = {}
    failures: dict[str, str] = {}
    for participant, scan in zip(participants, scans, strict=True):
        if isinstance(scan, BaseException):
            failures[participant.name] = str(scan) or type(scan).__name__
        else:
            found[participant.name] = scan
    return found, failures


async def read_one(log: Log, transaction: TransactionId) -> Record | Unreadable | None:
    """What stands under an id. Raises `LogUnavailable` when the log does not answer at all."""
    try:
        return (await log.read(transaction)).record
    except RecordUnreadable as error:
        return Unreadable(transaction, str(error))


async def _scan(engine: Engine, participant: Participant) -> list[Branch]:
    async with asyncio.timeout(engine.settings.scan_timeout):
        return list(await participant.recover())


def _is_parked(record: Record, incidents: set[str]) -> bool:
    """All that is left of it waits for a person."""
    left = [b for b in record.decision.branches if b.id not in record.ended]
    return bool(left) and all(str(branch.xid) in incidents for branch in left)


def _tell_driven(cases: Iterable[Case], alive: Mapping[MemberId, Beat]) -> None:
    for case in cases:
        why = _why_due(case, alive)
        about = logger, logging.DEBUG, case.transaction
        say(*about, "driven", "is driven to its end: %s", why, reason=why)


def _why_due(case: Case, alive: Mapping[MemberId, Beat]) -> str:
    """In words, what `coordinator.sweep` has judged."""
    if not owners_of(case.branches, case.record) & alive.keys():
        return "its owner is dead"
    if case.record is not None:
        return "its record stands, and not everything has ended"
    return "its owner lives, and works on it no more or has used up its time"


def _why_left(driver: Driver) -> str:
    return "; ".join(driver.left) or driver.broken or f"left while {driver.core.phase}"
