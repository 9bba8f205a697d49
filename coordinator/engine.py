"""Owns the running transactions of one open coordinator: begins, drives, beats, drains.

One engine lives on one event loop from `start` to `stop`. It draws the ids, keeps a driver for each
transaction, writes finished marks in batches, and tells the other members what it drives.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping

from uuid_utils import uuid7

from coordinator import failpoint, story
from coordinator.config import Settings
from coordinator.driver import Driver, Patience
from coordinator.errors import LogUnavailable, TransactionError
from coordinator.events import AbortRequested, Published
from coordinator.gate import Gate
from coordinator.log.base import Log, LogIdentity, Mark
from coordinator.logs import note, say
from coordinator.members.base import Beat, InFlight, Members
from coordinator.model import Claim, MemberId, TransactionId, id_floor, id_time_ms
from coordinator.participant import Bounded, Participant, Prompt
from coordinator.protocol import Phase, Transaction
from coordinator.sweep import Case

logger = logging.getLogger("syncpoint.engine")

MARKS_INTERVAL_SECONDS = 0.2
PUBLISHED_AFTER_SECONDS = 1.0
GATE_MOST = 1000
"""Without participants that name a smaller bound."""


def draw_member_id() -> MemberId:
    """A fresh name for one opening of a coordinator."""
    return MemberId(secrets.token_hex(8))


def now_ms() -> int:
    """The wall clock in milliseconds since the epoch: for ids and for people, never for safety."""
    return int(time.time() * 1000)


class Engine:
    """The running transactions of one open coordinator."""

    def __init__(
        self,
        log: Log,
        identity: LogIdentity,
        members: Members,
        member: MemberId,
        participants: Mapping[str, Participant],
        settings: Settings,
    ) -> None:
        self.log = log
        self.identity = identity
        self.members = members
        self.member = member
        self.participants = participants
        self.prompt: Mapping[str, Prompt] = {
            name: each for name, each in participants.items() if isinstance(each, Prompt)
        }
        self.settings = settings
        self.retry_first = settings.retry_first
        self.retry_most = settings.retry_most
        self.gate = Gate(settings.active_most, most=self._at_once())
        self.members_seen = 1
        self.drivers: dict[TransactionId, Driver] = {}
        self.newest = id_floor(identity.created_ms)
        self.horizon = id_floor(identity.created_ms)
        self._latest_clock_ms = 0
        self._marks: list[Mark] = []
        self._beats = 0
        self._closing = False
        self._idle = asyncio.Event()
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Become a member, then beat and write marks in the background."""
        await self.members.join(self.member, self._beat())
        # Read after joining, so that from here on our clock holds the horizon back.
        self.horizon = (await self.log.read(self.newest)).horizon
        loop = asyncio.get_running_loop()
        self._background = [
            loop.create_task(self._keep_beating()),
            loop.create_task(self._keep_marking()),
        ]

    async def stop(self) -> None:
        """Begin nothing more, abort what only works, let second phases end, leave."""
        self._closing = True
        for driver in list(self.drivers.values()):
            if driver.core.phase is Phase.ACTIVE:
                reason = "the coordinator is closing"
                driver.story.abort_requested(logging.INFO, reason)
                driver.post(AbortRequested(reason, retryable=True))
        await self._drain()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        try:
            await self.write_marks()
            await self.members.leave()
        except LogUnavailable as error:
            message = "closing without the last finished marks: %s"
            note(logger, logging.WARNING, "marks-late", message, error, error=str(error))

    async def _drain(self) -> None:
        if self.drivers:
            count = len(self.drivers)
            message = "waiting for %d transactions to end"
            note(logger, logging.INFO, "draining", message, count, count=count)
            self._idle.clear()
            try:
                async with asyncio.timeout(self.settings.drain_timeout):
                    await self._idle.wait()
            except TimeoutError:
                for driver in self.drivers.values():
                    message = "has not ended before closing; recovery will end it"
                    say(logger, logging.WARNING, driver.core.id, "left", message)
        for driver in list(self.drivers.values()):
            driver.abandon()

    # Transactions.

    def draw(self) -> TransactionId:
        """A fresh id for a transaction.

        Raises `TransactionError` while closing, and `LogUnavailable` when the clock is so far
        behind the horizon that the log would refuse the decision: nothing was begun.
        """
        if self._closing:
            raise TransactionError("the coordinator is closing: no transaction can begin")
        transaction = TransactionId(str(uuid7()))
        self._refuse_near_horizon(transaction)
        self.newest = max(self.newest, transaction)
        return transaction

    def begin(
        self,
        timeout: float,
        claims: tuple[Claim, ...] = (),
        transaction: TransactionId | None = None,
    ) -> Driver:
        """Start driving a transaction, under a fresh id or one just drawn. `timeout` in seconds.

        Raises what `draw` raises.
        """
        transaction = transaction or self.draw()
        deadline = asyncio.get_running_loop().time() + timeout
        driver = Driver(self, Transaction(transaction, claims=claims), deadline=deadline)
        if story.logger.isEnabledFor(logging.DEBUG):
            driver.tell_in_full(timeout, claims)
        self.drivers[transaction] = driver
        return driver

    def _refuse_near_horizon(self, transaction: TransactionId) -> None:
        # A horizon that has never moved is the log's creation, and may be a moment ago.
        moved = id_time_ms(self.horizon) > self.identity.created_ms
        margin_ms = int(self.settings.retention * 500)
        if id_time_ms(transaction) < self._latest_clock_ms - margin_ms:
            # The horizon may have risen by what our beats said before the clock was set back.
            raise LogUnavailable(
                f"this clock says {_shown(id_time_ms(transaction))}, but it has said "
                f"{_shown(self._latest_clock_ms)} before: correct it and begin again"
            )
        if id_time_ms(transaction) < id_time_ms(self.horizon) + (margin_ms if moved else 0):
            here = _shown(id_time_ms(transaction))
            there = _shown(id_time_ms(self.horizon))
            raise LogUnavailable(
                f"this clock says {here}, but the log has forgotten everything before {there}: "
                "one of the cluster's clocks is wrong; correct it and begin again"
            )

    def decides_elsewhere(self, transaction: TransactionId) -> bool:
        """Its one branch is being committed in one phase here: an abort in the log would lie."""
        driver = self.drivers.get(transaction)
        return driver is not None and driver.core.phase is Phase.ONE_PHASE

    async def recover(self, case: Case) -> Driver:
        """Drive a transaction found by the sweep as far as it goes now."""
        core = Transaction.in_doubt(case.transaction, case.branches)
        driver = Driver(self, core, patience=Patience.ONCE)
        if story.logger.isEnabledFor(logging.DEBUG):
            driver.tell_in_full()
        self.drivers[case.transaction] = driver
        try:
            driver.post(AbortRequested("found by recovery"))
            await driver.until_over(self.settings.timeout_max)
        finally:
            self.ended(driver)
        return driver

    def _at_once(self) -> int:
        """Who was let in must never wait for a connection or a slot that others of them hold."""
        bounds = [each.at_once for each in self.participants.values() if isinstance(each, Bounded)]
        return min(bounds, default=GATE_MOST)

    def mark(self, mark: Mark) -> None:
        self._marks.append(mark)

    def ended(self, driver: Driver) -> None:
        if self.drivers.get(driver.core.id) is driver:
            del self.drivers[driver.core.id]
        if not self.drivers:
            self._idle.set()

    # Background work.

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(self.settings.beat_interval)
            self.gate.most = self._at_once()
            try:
                await self.members.beat(self._beat())
            except LogUnavailable as error:
                message = "cannot say that this member lives: %s"
                note(logger, logging.WARNING, "no-beat", message, error, error=str(error))

    def _beat(self) -> Beat:
        now = asyncio.get_running_loop().time()
        clock_ms = now_ms()
        self._latest_clock_ms = max(self._latest_clock_ms, clock_ms)
        self._beats += 1
        in_flight = []
        for driver in self.drivers.values():
            if now - driver.born < PUBLISHED_AFTER_SECONDS or driver.core.phase is Phase.ONE_PHASE:
                continue
            if driver.core.private and not driver.core.decided:
                # Whoever can read the id may ask for an abort, so the commit must be recorded.
                driver.post(Published())
            branches = tuple(branch.participant for branch in driver.core.branches)
            left = max(driver.deadline - now, 0.0)
            in_flight.append(InFlight(driver.core.id, left, driver.core.phase.value, branches))
        return Beat(clock_ms, self._beats, in_flight)

    async def _keep_marking(self) -> None:
        while True:
            await asyncio.sleep(MARKS_INTERVAL_SECONDS)
            try:
                await self.write_marks()
            except LogUnavailable as error:
                message = "finished marks are late: %s"
                note(logger, logging.WARNING, "marks-late", message, error, error=str(error))

    async def write_marks(self) -> None:
        """Write the finished marks that wait; raises `LogUnavailable` and keeps them."""
        marks, self._marks = self._marks, []
        if not marks:
            return
        failpoint.reach("forget:before", self)
        try:
            await self.log.finish(marks)
        except LogUnavailable:
            self._marks = marks + self._marks
            raise
        failpoint.reach("forget:after", self)


def _shown(unix_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(unix_ms / 1000))
