"""What the processes of the crash tests do, each in a fork of the nursery.

A *service* makes one transfer on the way that its plan names and meets its fate. A *customer* makes
a transfer on each of many accounts, a *crowd* many that are in doubt at once. A *sweeper* is a
service that only sweeps, *recover* the command `syncpoint recover`. They talk in lines:

    open          a service waits for its turn
    id ID         of the transaction, before it can be in doubt anywhere
    reached       the point of its fate
    took SECONDS  until the caller was told
    told OUTCOME  what the caller was told, perhaps with an id
    left ID ...   of the transactions that had not ended when the process closed its coordinator
    exit CODE     of the command
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

import msgspec

from coordinator import (
    AlreadyDecided,
    Coordinator,
    OutcomeUnknown,
    Settings,
    TransactionAborted,
    cli,
)
from coordinator.context import running
from coordinator.errors import HeuristicOutcome
from coordinator.log import base
from participants.postgres import PostgreSQL
from tests.crash import fates, planted
from tests.crash.fates import Wire
from tests.crash.matrix import Way

AMOUNT = 30
POOL_SIZE = 2
FORGET_SECONDS_MAX = 10.0
TAKE = f"UPDATE account SET balance = balance - {AMOUNT} WHERE id = %s"
GIVE = f"UPDATE account SET balance = balance + {AMOUNT} WHERE id = %s"
MARK = "INSERT INTO marker (transaction, account) VALUES (%s, %s)"
MOVE = "SELECT move(%s, %s, %s)"
TWICE = "INSERT INTO entry (note) VALUES (%s), (%s)"
READ = "SELECT balance FROM account WHERE id = %s"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Who the process is, where it works, and where it meets its fate."""

    role: str = "service"
    """service, customer, sweeper, crowd or recover."""
    log: str
    accounts: str
    ledger: str
    way: Way = Way.COMMIT
    account: str = ""
    point: str = ""
    occurrence: int = 1
    fate: str = ""
    """kill, wait, lose or refuse; the last two are of calls of the log."""
    key: str | None = None
    timeout: float = 20.0
    config: str = ""
    """The file that `syncpoint recover` reads."""
    many: tuple[str, ...] = ()
    """The accounts of a customer."""
    by_hand: bool = False
    """Somebody rolls the branch in `accounts` back by hand once the commit stands."""
    page: int = 0
    """Read the log so many records at a time, if it is not 0."""
    planted: str = ""
    """A bug to plant first."""


class Unwanted(Exception):
    """The work's own reason to abort."""


def settings(timeout: float, at_once: int) -> Settings:
    return Settings(
        active_most=at_once,
        timeout=timeout,
        timeout_max=timeout,
        retention=120.0,
        sweep_interval=0.1,
        beat_interval=0.1,
        retry_most=1.0,
    )


def run(plan: Plan, wire: Wire) -> None:
    """Live the life of the plan's process."""
    if plan.planted:
        planted.PLANTED[plan.planted].plant()
    if plan.page:
        vars(base)["PAGE"] = plan.page
    if plan.role == "recover":
        _recover(plan, wire)
    else:
        asyncio.run(_ROLES[plan.role](plan, wire))


def _recover(plan: Plan, wire: Wire) -> None:
    """The command with its output in the lines that the test reads."""
    for descriptor in (1, 2):
        os.dup2(wire.descriptor, descriptor)
    code = cli.main(["recover", "--config", plan.config, "--wait", "30"])
    wire.say("exit", code)


class Service:
    """One coordinator over the two databases."""

    def __init__(self, plan: Plan, wire: Wire, at_once: int = POOL_SIZE) -> None:
        self.plan = plan
        self.wire = wire
        self.accounts = PostgreSQL("accounts", plan.accounts, pool_size=at_once)
        self.ledger = PostgreSQL("ledger", plan.ledger, pool_size=at_once)
        self.coordinator = Coordinator(
            plan.log,
            cluster="crash",
            participants=[self.accounts, self.ledger],
            settings=settings(plan.timeout, at_once),
        )

    def say(self, *words: object) -> None:
        self.wire.say(*words)

    async def told(self) -> tuple[object, ...]:
        """Run the plan's transfer and say what its caller was told."""
        try:
            if self.plan.way is Way.THREAD:
                await asyncio.to_thread(self._in_a_thread)
            else:
                async with self.coordinator.transaction(key=self.plan.key):
                    await self.work(self.plan.account)
        except (TransactionAborted, Unwanted):
            return ("aborted",)
        except OutcomeUnknown as error:
            return "unknown", error.transaction_id
        except AlreadyDecided as error:
            return "before", error.transaction_id
        except HeuristicOutcome as error:
            return "heuristic", error.transaction_id
        return ("committed",)

    async def work(self, account: str) -> None:
        way, name = self.plan.way, self._own_id()
        if way is Way.ALONE:
            transaction = running()
            assert transaction is not None and transaction.id == name  # which is read, and leaves
        first = await self.accounts.connection()
        if way is Way.EXAMINED:
            await first.execute(MOVE, (-AMOUNT, name, account))
            second = await self.ledger.connection()
            await second.execute(MOVE, (AMOUNT, name, account))
            return
        if way is Way.READER:
            await first.execute(READ, (account,))
        else:
            await first.execute(TAKE, (account,))
            await first.execute(MARK, (name, account))
        if way in (Way.ALONE, Way.ONE_PHASE):
            return
        second = await self.ledger.connection()
        await second.execute(GIVE, (account,))
        await second.execute(MARK, (name, account))
        if way is Way.VOTE_NO:
            await second.execute(TWICE, (name, name))
        if way in (Way.ABORT, Way.KEYED_ABORT):
            raise Unwanted

    def _in_a_thread(self) -> None:
        with self.coordinator.blocking.transaction(key=self.plan.key):
            name, account = self._own_id(), self.plan.account
            first = self.accounts.blocking.connection()
            first.execute(TAKE, (account,))
            first.execute(MARK, (name, account))
            second = self.ledger.blocking.connection()
            second.execute(GIVE, (account,))
            second.execute(MARK, (name, account))

    def _own_id(self) -> str:
        """Tell the id without reading it: that would make every commit a recorded one."""
        transaction = running()
        assert transaction is not None
        self.say("id", transaction._driver.core.id)
        return transaction._driver.core.id


async def _serve(plan: Plan, wire: Wire) -> None:
    service = Service(plan, wire)
    await service.coordinator.open(sweep=False)
    fate = fates.Fate(plan.point, plan.occurrence, plan.fate, wire)
    if plan.by_hand:
        fates.roll_back_by_hand_then(fate, plan.accounts)
    elif plan.point:
        fates.install(fate, {"accounts": plan.accounts, "ledger": plan.ledger})
    service.say("open")
    wire.wait()  # its deadline must not pass while others only start
    began = time.monotonic()
    told = await service.told()
    service.say("took", f"{time.monotonic() - began:.3f}")
    service.say("told", *told)
    if plan.point.startswith("forget"):
        async with asyncio.timeout(FORGET_SECONDS_MAX):  # a batch of marks is written now and then
            while not fate.is_over:
                await asyncio.sleep(0.01)
    drivers = service.coordinator.engine().drivers
    await service.coordinator.close()
    service.say("left", *drivers)


async def _crowd(plan: Plan, wire: Wire) -> None:
    """Many transactions, which are in doubt when the process is killed: the log has decided about
    each other one, and no branch has heard of it.
    """
    everybody = len(plan.many)
    service = Service(plan, wire, at_once=everybody)
    await service.coordinator.open(sweep=False)
    waiting = fates.hold_decisions_and_commits()

    async def one(account: str) -> None:
        async with service.coordinator.transaction():
            await service.work(account)

    tasks = [asyncio.create_task(one(account)) for account in plan.many]
    while len(waiting) < everybody:
        await asyncio.sleep(0.01)
        for task in tasks:
            if task.done():
                task.result()
    wire.say("reached")
    os.kill(os.getpid(), signal.SIGKILL)


async def _buy(plan: Plan, wire: Wire) -> None:
    """A transfer on each account; says how many were committed, and what went wrong."""
    service = Service(plan, wire)
    await service.coordinator.open(sweep=False)

    async def one(account: str) -> bool:
        try:
            async with service.coordinator.transaction():
                first = await service.accounts.connection()
                await first.execute("SET LOCAL lock_timeout = '1s'")
                await first.execute(TAKE, (account,))
                second = await service.ledger.connection()
                await second.execute("SET LOCAL lock_timeout = '1s'")
                await second.execute(GIVE, (account,))
        except Exception as error:
            service.say("failed", account, "|", repr(error))
            return False
        return True

    done = await asyncio.gather(*(one(account) for account in plan.many))
    service.say("done", sum(done))
    await service.coordinator.close()


async def _sweep(plan: Plan, wire: Wire) -> None:
    """Sweep until told to go on."""
    service = Service(plan, wire)
    async with service.coordinator:
        service.say("sweeping")
        await asyncio.to_thread(wire.wait)


_ROLES = {"service": _serve, "customer": _buy, "sweeper": _sweep, "crowd": _crowd}
