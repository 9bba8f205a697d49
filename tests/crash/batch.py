"""Runs cases that share a fault side by side: each has a process and an account of its own.

One crash of a server meets all of them, each at its own boundary, and one `syncpoint recover` ends
what they left. Each case is counted alone.
"""

from __future__ import annotations

import asyncio
import fcntl
import secrets
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import groupby
from pathlib import Path

import msgspec

from tests.crash.accounting import Books, Facts, of_the_whole, violations
from tests.crash.fates import ON_THE_WIRE
from tests.crash.matrix import NETWORK_FAULTS, PAUSES, SERVER_FAULTS, Case, Fault, Way
from tests.crash.nursery import Process
from tests.crash.place import Place, stopped
from tests.crash.process import Plan
from tests.support.proxy import Fault as LinkFault
from tests.support.proxy import Proxy

AT_ONCE = 40
"""So many processes at a time: two connections each, of the three hundred of a server."""
TURNS = 4
"""So many of them begin at a time, so that none meets its deadline before its fault."""
SECONDS = 20.0
SECONDS_OF_A_PAUSE = 1.5
"""The deadline of transactions that somebody pauses."""

_LINK_FAULTS = {
    Fault.LOST: LinkFault.LOSE_ANSWER,
    Fault.CUT: LinkFault.LOSE_REQUEST,
    Fault.SILENT: LinkFault.BLACK_HOLE,
}


class Result(msgspec.Struct, frozen=True):
    """What was wrong with each case, by its name, and with the batch as a whole."""

    cases: dict[str, list[str]]
    whole: list[str]

    @property
    def wrong(self) -> dict[str, list[str]]:
        found = {name: wrong for name, wrong in self.cases.items() if wrong}
        return found | ({"the whole batch": self.whole} if self.whole else {})

    def check(self) -> None:
        """Raise `AssertionError` that says for each case what is wrong, and how to run it again."""
        lines = [
            f"{name}: {'; '.join(wrong)}\n    python -m tests.crash --only '{name}'"
            for name, wrong in self.wrong.items()
        ]
        assert not lines, "\n".join(["", *lines])


def batches(cases: Iterable[Case]) -> Iterator[list[Case]]:
    """Cases that can share a fault, so many at a time."""

    def kind(case: Case) -> tuple[str, bool]:
        return case.fault, case.has_key

    for _, alike in groupby(sorted(cases, key=kind), key=kind):
        rest = list(alike)
        while rest:
            yield rest[:AT_ONCE]
            del rest[:AT_ONCE]


class Running:
    """One case under way."""

    def __init__(self, case: Case, plan: Plan) -> None:
        self.case = case
        self.plan = plan
        self.hit = False
        self.fired: list[LinkFault] = []
        self.process: Process | None = None
        self.repeat: Process | None = None
        self.proxies: dict[str, Proxy] = {}

    @property
    def alive(self) -> Process:
        assert self.process is not None
        return self.process

    @property
    def transaction(self) -> str:
        return self.alive.said("id")[0]


class Batch:
    """Cases with one fault."""

    def __init__(self, place: Place, cases: list[Case], planted: str = "") -> None:
        self.place = place
        self.fault = cases[0].fault
        self.seconds = SECONDS_OF_A_PAUSE if self.fault in PAUSES else SECONDS
        self.log = f"sqlite:///{place.folder / secrets.token_hex(4)}.db"
        self.planted = planted
        name = secrets.token_hex(3)
        self.all = [
            Running(case, self._plan(case, f"{name}-{number}")) for number, case in enumerate(cases)
        ]

    def _plan(self, case: Case, account: str) -> Plan:
        log_fault = case.fault in (Fault.LOST, Fault.CUT) and " " not in case.point
        fates = {Fault.KILLED: "kill", Fault.LOST: "lose", Fault.CUT: "refuse"}
        return self.plan(
            way=case.way,
            account=account,
            point=case.point if log_fault or case.fault not in NETWORK_FAULTS else "",
            occurrence=case.occurrence,
            fate=fates.get(case.fault, "wait"),
            key=account if case.has_key else None,
        )

    def plan(self, **fields: object) -> Plan:
        """A plan of a process in this batch."""
        base = Plan(log=self.log, timeout=self.seconds, planted=self.planted, **self.place.direct)
        return msgspec.structs.replace(base, **fields)

    async def run(self) -> Result:
        self.place.open_accounts([each.plan.account for each in self.all])
        with self.place.branches_of_another_log() as foreign:
            async with self._proxies():
                await self._meet_the_fault()
            self.place.wait_for_sessions_to_end()
            transactions = {each.plan.account: each.transaction for each in self.all}
            before = await self.place.books(self.log, transactions)
            exit_code = await self._recover()
            after = await self.place.books(self.log, transactions)
            await self._transfer_again()
            later = await self.place.books(self.log, transactions)
            left = self.place.prepared()
        facts = {each.case.name: _facts(each, before, after, later) for each in self.all}
        return Result(
            {name: violations(found) for name, found in facts.items()},
            of_the_whole(exit_code, left, foreign),
        )

    # The faults.

    async def _meet_the_fault(self) -> None:
        for each in self.all:
            each.process = await self.place.nursery.start(each.plan)
        await self._each(self._is_open)
        turns = asyncio.Semaphore(TURNS)

        async def take_its_turn(each: Running) -> None:
            async with turns:
                each.alive.go_on()
                await self._has_begun(each)

        await self._each(take_its_turn)
        if self.fault is Fault.KILLED:
            await self._each(self._is_killed)
        elif self.fault is Fault.PAUSED:
            await self._pause_the_processes()
        elif self.fault in (Fault.FIRST_KILLED, Fault.SECOND_KILLED):
            server = self.place.servers[SERVER_FAULTS[self.fault]]
            await asyncio.to_thread(server.kill)
            for each in self.all:
                each.alive.go_on()
            await asyncio.to_thread(server.start)
            await self._each(self._ends)
        elif self.fault in SERVER_FAULTS:
            with stopped(self.place.servers[SERVER_FAULTS[self.fault]]):
                for each in self.all:
                    each.alive.go_on()
                await self._each(self._is_told)
            await self._each(self._ends)
        else:
            await self._each(self._is_told)
            for each in self.all:
                for proxy in each.proxies.values():
                    proxy.heal()
            await self._each(self._ends)

    async def _each(self, do: Callable[[Running], Awaitable[None]]) -> None:
        await asyncio.gather(*(do(each) for each in self.all))

    async def _is_open(self, each: Running) -> None:
        await each.alive.until("open")

    async def _has_begun(self, each: Running) -> None:
        """Until it is where the fault meets it."""
        if self.fault is Fault.SILENT:
            loop = asyncio.get_running_loop()
            give_up = loop.time() + self.seconds
            while loop.time() < give_up and not any(p.fired for p in each.proxies.values()):
                await asyncio.sleep(0.01)
        elif self.fault not in NETWORK_FAULTS:
            each.hit = await each.alive.says("reached")
        else:
            await each.alive.until("told")

    async def _is_killed(self, each: Running) -> None:
        each.hit = await each.alive.ended() == -signal.SIGKILL and bool(each.alive.said("reached"))

    async def _is_told(self, each: Running) -> None:
        await each.alive.until("told")

    async def _ends(self, each: Running) -> None:
        assert await each.alive.ended() == 0, self.place.nursery.errors()
        if self.fault in NETWORK_FAULTS:
            each.fired = [fault for proxy in each.proxies.values() for fault in proxy.fired]
            wanted = 1 + each.case.point.count("+")
            each.hit = len(each.fired) == wanted or bool(each.alive.said("reached"))

    async def _pause_the_processes(self) -> None:
        """Beyond their deadlines, while another process ends what they have prepared: for those
        with a key the command, for the others a service that sweeps.
        """
        await self._stop_all()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.seconds
        sweeps = not self.all[0].case.has_key
        other = await (self._start("sweeper") if sweeps else self._start_the_command())
        if sweeps:
            await other.until("sweeping")
        else:
            assert await other.ended() == 0 and other.said("exit") == ["0"], other.lines
        await asyncio.sleep(deadline - loop.time())
        await asyncio.to_thread(self.place.wait_for_branches_to_end)
        for each in self.all:
            each.alive.signal(signal.SIGCONT)
            each.alive.go_on()
        await self._each(self._ends)
        if sweeps:
            other.go_on()
            assert await other.ended() == 0, self.place.nursery.errors()

    async def _stop_all(self) -> None:
        """Stop every process, none of them inside a write: its lock would keep the log from all."""
        lock = Path(f"{self.log.removeprefix('sqlite:///')}.lock")
        while True:
            for each in self.all:
                each.alive.signal(signal.SIGSTOP)
            if _is_free(lock):
                return
            for each in self.all:
                each.alive.signal(signal.SIGCONT)
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def _proxies(self) -> AsyncIterator[None]:
        """For faults of the network: a proxy before each database, for each case its own."""
        async with AsyncExitStack() as stack:
            for each in self.all:
                if each.case.fault not in NETWORK_FAULTS or each.plan.point:
                    continue
                urls = {}
                for name, server in zip(self.place.direct, self.place.servers, strict=True):
                    proxy = await stack.enter_async_context(Proxy(server.port))
                    _cut_by_reset(proxy)
                    each.proxies[name] = proxy
                    urls[name] = proxy.url(self.place.direct[name])
                participant, _, statements = each.case.point.partition(" ")
                *before, last = statements.split(" + ")
                for verb in before:
                    each.proxies[participant].on(ON_THE_WIRE[verb], LinkFault.LOSE_ANSWER)
                fault = _LINK_FAULTS[each.case.fault]
                each.proxies[participant].on(ON_THE_WIRE[last], fault)
                each.plan = msgspec.structs.replace(each.plan, **urls)
            yield

    # After the fault.

    async def _recover(self) -> int:
        """Recover by the command, while repeats under the keys of the dead wait for their turn."""
        for each in self.all:
            if self.fault is Fault.KILLED and each.case.has_key:
                again = msgspec.structs.replace(each.plan, way=Way.KEYED, point="")
                each.repeat = await self.place.nursery.start(again)
                each.repeat.go_on()
        command = await self._start_the_command()
        assert await command.ended() == 0, command.lines
        for each in self.all:
            if each.repeat is not None:
                assert await each.repeat.ended() == 0, self.place.nursery.errors()
        return int(command.said("exit")[0])

    async def _start(self, role: str, **fields: object) -> Process:
        return await self.place.nursery.start(self.plan(role=role, **fields))

    async def _start_the_command(self) -> Process:
        return await self._start("recover", config=str(self.place.config(self.log, self.seconds)))

    async def _transfer_again(self) -> None:
        accounts = tuple(each.plan.account for each in self.all)
        customer = await self._start("customer", many=accounts, timeout=SECONDS)
        await customer.until("done")
        assert await customer.ended() == 0, self.place.nursery.errors()


def _is_free(lock: Path) -> bool:
    with lock.open() as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _cut_by_reset(proxy: Proxy) -> None:
    """What it closes is cut by a RST, not by an orderly FIN; accepted sockets inherit that."""
    assert proxy._listener is not None
    linger = struct.pack("ii", 1, 0)
    proxy._listener.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def _facts(
    each: Running, before: dict[str, Books], after: dict[str, Books], later: dict[str, Books]
) -> Facts:
    account = each.plan.account
    slow = [float(seconds) >= each.plan.timeout for seconds in each.alive.said("took")]
    told = (each.alive.said("told") or [""])[0].split() or [""]
    repeat = None
    if each.repeat is not None:
        answer = (each.repeat.said("told") or [""])[0].split() or [""]
        repeat = (answer[0], answer[1] if len(answer) > 1 else each.repeat.said("id")[0])
    return Facts(
        case=each.case,
        transaction=each.transaction,
        hit=each.hit,
        said=(*each.alive.lines, *(f"fired {fault.value}" for fault in each.fired)),
        told=told[0],
        told_transaction=told[1] if len(told) > 1 else "",
        late=each.case.fault not in PAUSES and any(slow),
        left=any(each.alive.said("left")),
        repeat=repeat,
        before=before[account],
        after=after[account],
        later=later[account],
    )
