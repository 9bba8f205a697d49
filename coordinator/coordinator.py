"""`Coordinator`: what a service author holds. It puts log, members, engine and sweep together."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, overload

from coordinator import config
from coordinator.config import Settings
from coordinator.engine import Engine, draw_member_id, now_ms
from coordinator.errors import ConfigurationError, TransactionError
from coordinator.log import open_log
from coordinator.log.base import BelowHorizon, Log, LogIdentity, Proposal
from coordinator.members.base import Members
from coordinator.model import ABORT, Status, TransactionId, Verdict, parse_transaction_id
from coordinator.participant import Binding, Participant
from coordinator.recovery import Recovery, Round
from coordinator.transactional import GlobalTransaction, Scope, Transactional, decorate

logger = logging.getLogger("syncpoint.coordinator")

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Coordinator:
    """Commits several participants atomically.

    `log` is a URL (`memory:`, `sqlite:///file.db`), `cluster` a label for people, `participants`
    what takes part. Nothing is opened before `async with coordinator:`, which opens the log, checks
    the participants and starts the sweep, and whose end lets second phases that run come to an end.
    It may be opened again later, on another event loop too, but on one at a time.

    Raises `ConfigurationError` for what can be seen to be wrong at once.
    """

    def __init__(
        self,
        log: str,
        *,
        cluster: str,
        participants: Iterable[Participant] = (),
        settings: Settings | None = None,
    ) -> None:
        if not cluster or not cluster.strip():
            raise ConfigurationError("cluster is empty: give the group of services a name")
        self.cluster = cluster
        self.settings = (settings or Settings()).validate()
        self._url = log
        self._participants = _by_name(participants)
        open_log(log)  # a wrong URL is answered here and not at the first request
        self._engine: Engine | None = None
        self._log: Log | None = None
        self._opened: list[Participant] = []
        self._sweep: asyncio.Task[None] | None = None
        self._recovery: Recovery | None = None
        self._process = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_config(cls, path: str | os.PathLike[str]) -> Coordinator:
        """Build one from `syncpoint.toml`; `ConfigurationError` names the file and the field."""
        read = config.load(Path(path))
        participants = [_build(each, str(path)) for each in read.participants]
        return cls(
            read.log, cluster=read.cluster, participants=participants, settings=read.settings
        )

    def __repr__(self) -> str:
        state = "open" if self._engine is not None else "closed"
        names = ", ".join(self._participants)
        return f"<Coordinator {self.cluster} {state}: {names or 'no participants'}>"

    # Opening and closing.

    async def __aenter__(self) -> Coordinator:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self, *, sweep: bool = True, tolerate_unreachable: bool = False) -> None:
        """Open the log, check every participant, become a member, start the sweep.

        Raises `ConfigurationError` naming what is wrong and the fix, or `LogUnavailable`; then
        everything is closed again. `sweep=False` leaves recovery to `recover`, or to others. A
        recovery run sets `tolerate_unreachable`: a participant that cannot be opened is left out,
        and every `Round` names it.
        """
        if self._engine is not None:
            raise TransactionError("the coordinator is open already")
        log, members = open_log(self._url)
        try:
            self._log = log
            identity = await log.open()
            await self._start(log, identity, members, tolerate_unreachable)
        except BaseException:
            await self._release()
            raise
        if sweep and self._recovery is not None:
            self._sweep = asyncio.get_running_loop().create_task(self._recovery.run())

    async def _start(
        self, log: Log, identity: LogIdentity, members: Members, tolerate_unreachable: bool
    ) -> None:
        binding = Binding(identity.id, draw_member_id(), self.cluster)
        unreachable = await self._open_participants(log, binding, tolerate_unreachable)
        opened = {participant.name: participant for participant in self._opened}
        engine = Engine(log, identity, members, binding.member, opened, self.settings)
        await engine.start()
        self._process, self._loop = os.getpid(), asyncio.get_running_loop()
        self._engine, self._recovery = engine, Recovery(engine, unreachable)
        logger.info("open: cluster %s, log %s, member %s", self.cluster, identity.id, engine.member)

    async def _open_participants(
        self, log: Log, binding: Binding, tolerate_unreachable: bool
    ) -> dict[str, str]:
        """Open, check and register them all; returns why each of the others was left out."""
        identities: dict[str, str] = {}
        unreachable: dict[str, str] = {}
        for name, participant in self._participants.items():
            try:
                identity = await participant.open(binding)
            except ConfigurationError as error:
                if not tolerate_unreachable:
                    raise
                unreachable[name] = str(error)
                continue
            self._opened.append(participant)
            if identity in identities:
                raise ConfigurationError(
                    f"participants {identities[identity]!r} and {name!r} are one resource "
                    f"({identity}): a transaction has one branch a database, so name it once"
                )
            identities[identity] = name
            await log.register(name, identity, now_ms())
        return unreachable

    async def close(self) -> None:
        """Let running second phases end, then release everything. Harmless when closed."""
        engine, self._engine = self._engine, None
        if self._sweep is not None:
            self._sweep.cancel()
            await asyncio.gather(self._sweep, return_exceptions=True)
            self._sweep = None
        if engine is not None:
            await engine.stop()
        await self._release()

    async def _release(self) -> None:
        self._recovery = None
        opened, self._opened = self._opened, []
        for participant in reversed(opened):
            try:
                await participant.close()
            except Exception:
                logger.exception("closing %s failed", participant.name)
        log, self._log = self._log, None
        if log is not None:
            await log.close()

    def _running(self) -> Engine:
        """The engine; raises `TransactionError` when there is none to be used here."""
        if self._engine is None:
            raise TransactionError(
                "the coordinator is not open: use it inside `async with coordinator:`"
            )
        if self._process != os.getpid():
            raise TransactionError(
                "the coordinator was opened before a fork: the child process must open its own"
            )
        if self._loop is not asyncio.get_running_loop():
            raise TransactionError(
                "the coordinator is open on another event loop: close it there before it is "
                "opened on this one"
            )
        return self._engine

    # Transactions.

    def transaction(self, *, timeout: float | None = None) -> Scope:
        """`async with coordinator.transaction() as txn:` commits at the end of the block.

        `timeout` in seconds is the deadline of everything; nested inside another transaction it is
        ignored and the block joins. Any exception aborts and is raised unchanged. Otherwise the
        block ends with the commit, or raises `TransactionAborted`, `OutcomeUnknown` or
        `HeuristicOutcome`.
        """
        return self._scope(self._checked(timeout))

    @overload
    def transactional(
        self, function: Callable[_P, Coroutine[Any, Any, _T]], /
    ) -> Callable[_P, Coroutine[Any, Any, _T]]: ...

    @overload
    def transactional(
        self, function: None = None, /, *, timeout: float | None = None
    ) -> Transactional: ...

    def transactional(self, function: Any = None, /, *, timeout: float | None = None) -> Any:
        """Make a coroutine function transactional: each call is a `transaction()` of its own.

        Called inside another one it joins. Raises `ConfigurationError` for other functions.
        """
        seconds = self._checked(timeout)

        if function is not None:
            return decorate(function, lambda: self._scope(seconds))
        return lambda each: decorate(each, lambda: self._scope(seconds))

    def _scope(self, timeout: float) -> Scope:
        def begin() -> GlobalTransaction:
            engine = self._running()
            return GlobalTransaction(engine, engine.begin(timeout), timeout)

        return Scope(begin, self._running)

    def _checked(self, timeout: float | None) -> float:
        seconds = self.settings.timeout if timeout is None else timeout
        if not 0 < seconds <= self.settings.timeout_max:
            raise ConfigurationError(
                f"timeout is {seconds!r}: give seconds above 0 and up to the setting timeout_max "
                f"({self.settings.timeout_max:g})"
            )
        return seconds

    # Asking.

    async def status(self, transaction: str) -> Status:
        """What the log says of an id, read linearizably.

        `undecided` means that nothing is recorded: it runs, or it ended without needing a record;
        `forgotten` that it is older than what is kept. Raises `ValueError` for what is no id, and
        `LogUnavailable`.
        """
        return await self._status(parse_transaction_id(transaction))

    async def abort(self, transaction: str) -> Status:
        """Propose abort and answer what stands, for who needs an end now.

        Never `undecided`, unless a last resource still has to answer. Raises as `status` does;
        after `LogUnavailable` the abort may stand or not: ask again.
        """
        transaction_id = parse_transaction_id(transaction)
        answer = await self._running().log.propose(Proposal(transaction_id, ABORT))
        if isinstance(answer, BelowHorizon):
            return Status.FORGOTTEN
        return await self._status(transaction_id)

    async def _status(self, transaction: TransactionId) -> Status:
        reading = await self._running().log.read(transaction)
        if reading.record is None:
            below = transaction < reading.horizon
            return Status.FORGOTTEN if below else Status.UNDECIDED
        verdict = reading.record.answer or reading.record.decision.verdict
        if verdict is Verdict.DELEGATED:
            return Status.UNDECIDED
        return Status.COMMITTED if verdict is Verdict.COMMIT else Status.ABORTED

    async def recover(
        self, progress: Callable[[int, int], None] | None = None, *, dry_run: bool = False
    ) -> Round:
        """One round of the sweep, now; see `Round` for what it tells.

        A branch of a living member is acted on when two rounds have seen it. `dry_run` changes
        nothing. Raises `LogUnavailable`.
        """
        self._running()
        if self._recovery is None:
            raise TransactionError("the coordinator is not open")
        return await self._recovery.round(progress, dry_run=dry_run)


def _by_name(participants: Iterable[Participant]) -> dict[str, Participant]:
    named: dict[str, Participant] = {}
    for participant in participants:
        if participant.name in named:
            raise ConfigurationError(
                f"two participants are named {participant.name!r}: names stand in the log, so each "
                "needs its own"
            )
        named[participant.name] = participant
    return named


def _build(described: config.ParticipantConfig, path: str) -> Participant:
    kinds = {each.name: each for each in entry_points(group="syncpoint.participants")}
    where = f"{path}: participants.{described.name}"
    if described.kind not in kinds:
        raise ConfigurationError(
            f"{where}: unknown kind {described.kind!r}: there are {', '.join(sorted(kinds))}"
        )
    try:
        factory = kinds[described.kind].load()
    except ImportError as error:
        raise ConfigurationError(
            f"{where}: {error}; install the adapter with `pip install 'syncpoint[all]'`"
        ) from error
    try:
        participant: Participant = factory(described.name, **described.options)
    except TypeError as error:
        raise ConfigurationError(f"{where}: {error}") from error
    return participant
