"""`Coordinator`: what a service author holds. It puts log, members, engine and sweep together."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from coordinator import asking, config
from coordinator.blocking import BlockingCoordinator
from coordinator.config import Settings
from coordinator.decorating import F, How, decorate
from coordinator.engine import Engine, draw_member_id, now_ms
from coordinator.errors import ConfigurationError, TransactionError
from coordinator.keys import check_key
from coordinator.log import open_log
from coordinator.log.base import Log, LogIdentity
from coordinator.logs import note
from coordinator.members.base import Members
from coordinator.model import Status, parse_transaction_id
from coordinator.participant import Binding, Participant
from coordinator.propagation import Propagation
from coordinator.recovery import Recovery, Round
from coordinator.scope import Options, Scope

logger = logging.getLogger("syncpoint.coordinator")


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
        self.log_url = log
        self._participants = _by_name(participants)
        open_log(log)  # a wrong URL is answered here and not at the first request
        self._engine: Engine | None = None
        self._log: Log | None = None
        self._opened: list[Participant] = []
        self._sweep: asyncio.Task[None] | None = None
        self._recovery: Recovery | None = None
        self.blocking = BlockingCoordinator(self)
        """The same verbs for synchronous callers."""
        self._process = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_config(cls, path: str | os.PathLike[str]) -> Coordinator:
        """Build one from `syncpoint.toml`; `ConfigurationError` names the file and the field."""
        read = config.load(Path(path))
        participants = [config.build(each, str(path)) for each in read.participants]
        return cls(
            read.log, cluster=read.cluster, participants=participants, settings=read.settings
        )

    def __repr__(self) -> str:
        state = "open" if self._engine is not None else "closed"
        names = ", ".join(self._participants)
        return f"<Coordinator {self.cluster} {state}: {names or 'no participants'}>"

    @property
    def participants(self) -> Sequence[Participant]:
        """What takes part, as given."""
        return tuple(self._participants.values())

    @property
    def unreachable(self) -> Mapping[str, str]:
        """Participants that could not be opened and were left out, and why; see `open`."""
        return {} if self._recovery is None else self._recovery.unreachable

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
            self._forget_parent()
        if self._engine is not None and self._is_on_a_dead_loop:
            await self._leave_dead_loop()
        if self._engine is not None:
            raise TransactionError("the coordinator is open already")
        log, members = open_log(self.log_url)
        try:
            self._log = log
            identity = await log.open()
            await self._start(log, identity, members, tolerate_unreachable)
        except BaseException:
            await self._release()
            raise
        if sweep and self._recovery is not None:
            self._sweep = asyncio.get_running_loop().create_task(self._recovery.run())

    def _members_seen(self) -> int:
        return 1 if self._engine is None else self._engine.members_seen

    def _forget_parent(self) -> None:
        """After a fork: what is open belongs to the parent, and its sockets must not be touched."""
        if self._process != os.getpid():
            self._engine = self._log = self._sweep = self._recovery = None
            self._opened = []

    @property
    def _is_on_a_dead_loop(self) -> bool:
        return self._loop is not None and self._loop.is_closed()

    async def _leave_dead_loop(self) -> None:
        """Its loop ended without closing it, as loops of tests do: give back what can be."""
        message = "the event loop of the coordinator ended without closing it"
        note(logger, logging.WARNING, "loop-ended", message, cluster=self.cluster)
        engine, self._engine = self._engine, None
        self._sweep = None
        if engine is not None:
            await engine.members.leave()
        await self._release()

    async def _start(
        self, log: Log, identity: LogIdentity, members: Members, tolerate_unreachable: bool
    ) -> None:
        binding = Binding(identity.id, draw_member_id(), self.cluster, self._members_seen)
        unreachable = await self._open_participants(log, binding, tolerate_unreachable)
        opened = {participant.name: participant for participant in self._opened}
        engine = Engine(log, identity, members, binding.member, opened, self.settings)
        await engine.start()
        self._process, self._loop = os.getpid(), asyncio.get_running_loop()
        self._engine, self._recovery = engine, Recovery(engine, unreachable)
        message = "open: cluster %s, log %s, member %s"
        fields = {"cluster": self.cluster, "log": identity.id, "member": engine.member}
        note(logger, logging.INFO, "opened", message, *fields.values(), **fields)

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
                unreachable[name] = why = str(error)
                message = "%s cannot be opened and is left out: %s"
                note(logger, logging.INFO, "left-out", message, name, why, participant=name)
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
        self._forget_parent()
        engine, self._engine = self._engine, None
        if self._sweep is not None:
            self._sweep.cancel()
            await asyncio.gather(self._sweep, return_exceptions=True)
            self._sweep = None
        if engine is not None:
            await engine.stop()
            fields = {"cluster": self.cluster, "member": engine.member}
            note(logger, logging.INFO, "closed", "closed: member %s", engine.member, **fields)
        await self._release()

    async def _release(self) -> None:
        self._recovery = None
        opened, self._opened = self._opened, []
        for participant in reversed(opened):
            try:
                await participant.close()
            except Exception as error:
                name, message = participant.name, "closing %s failed"
                fields: dict[str, Any] = {"participant": name, "exc_info": error}
                note(logger, logging.ERROR, "closing-failed", message, name, **fields)
        log, self._log = self._log, None
        if log is not None:
            await log.close()

    @property
    def is_closed(self) -> bool:
        """Nobody has it open, nor has left it open on an event loop that has ended."""
        return self._engine is None

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop on which it is open; None when it is not, also in a forked child."""
        if self._engine is None or self._process != os.getpid() or self._is_on_a_dead_loop:
            return None
        return self._loop

    def engine(self) -> Engine:
        """The engine; raises `TransactionError` when there is none to be used here."""
        if self._engine is None:
            raise TransactionError(
                "the coordinator is not open: use it inside `async with coordinator:`"
            )
        if self._process != os.getpid():
            raise TransactionError(
                "the coordinator was opened before a fork: the child process must open its own"
            )
        if self._is_on_a_dead_loop:
            raise TransactionError(
                "the event loop that the coordinator was opened on has ended: open it on this one"
            )
        running = asyncio._get_running_loop()
        if running is not None and running is not self._loop:
            raise TransactionError(
                "the coordinator is open on another event loop: close it there before it is "
                "opened on this one"
            )
        return self._engine

    # Transactions.

    def transaction(
        self,
        *,
        timeout: float | None = None,
        key: str | None = None,
        propagation: str = "required",
    ) -> Scope:
        """`async with coordinator.transaction() as txn:` commits at the end of the block.

        `timeout` in seconds is the deadline of everything; nested inside another transaction it is
        ignored and the block joins, unless `propagation` says otherwise. `key` is an idempotency
        key: a repeat raises `AlreadyDecided`. Any exception aborts and is raised unchanged.
        Otherwise the block ends with the commit, or raises `TransactionAborted`, `OutcomeUnknown`
        or `HeuristicOutcome`.
        """
        return Scope(self.engine, self.options(timeout, key, propagation))

    @overload
    def transactional(self, function: F, /) -> F: ...

    @overload
    def transactional(
        self,
        function: None = None,
        /,
        *,
        timeout: float | None = None,
        propagation: str = "required",
        attempts: int = 1,
        idempotency_key: Callable[..., str] | None = None,
        record_result: bool = False,
    ) -> Callable[[F], F]: ...

    def transactional(
        self,
        function: Any = None,
        /,
        *,
        timeout: float | None = None,
        propagation: str = "required",
        attempts: int = 1,
        idempotency_key: Callable[..., str] | None = None,
        record_result: bool = False,
    ) -> Any:
        """Make a function transactional, a coroutine function or an ordinary one.

        Each call is a `transaction()` of its own; called inside another one it does what
        `propagation` says, as in Jakarta Transactions: `required` joins. `attempts` is how often
        the whole function is run after a retryable abort or a serialization failure (SQLSTATE
        40001, 40P01), `timeout` the seconds of each. `idempotency_key` gets the call's arguments
        and returns text: one key commits once; a repeat raises `AlreadyDecided`, or returns the
        first result with `record_result`, which needs a return annotation for what is no plain
        value. An ordinary function is for threads without an event loop, see `blocking`. Raises
        `ConfigurationError` for what cannot be decorated.
        """
        how = How(
            timeout=self._checked(timeout),
            propagation=Propagation.read(propagation),
            attempts=attempts,
            key=idempotency_key,
            record_result=record_result,
        ).validate()
        if function is not None:
            return decorate(function, how, self.engine, self.blocking)
        return lambda each: decorate(each, how, self.engine, self.blocking)

    def options(self, timeout: float | None, key: str | None, propagation: str) -> Options:
        """The checked arguments of `transaction`; raises `ConfigurationError`."""
        kind = Propagation.read(propagation)
        if kind in (Propagation.SUPPORTS, Propagation.NOT_SUPPORTED, Propagation.NEVER):
            raise ConfigurationError(
                f"propagation {propagation!r} may run without a transaction, which a block that "
                "begins one cannot: use it with @coordinator.transactional"
            )
        return Options(
            timeout=self._checked(timeout),
            propagation=kind,
            key=None if key is None else check_key(key),
        )

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
        return await asking.status_of(self.engine().log, parse_transaction_id(transaction))

    async def abort(self, transaction: str) -> Status:
        """Propose abort and answer what stands, for who needs an end now.

        Never `undecided`, unless a resource whose own commit is the decision has still to answer.
        Raises as `status` does; after `LogUnavailable` the abort may stand or not: ask again.
        """
        return await asking.abort(self.engine(), parse_transaction_id(transaction))

    async def recover(
        self, progress: Callable[[int, int], None] | None = None, *, dry_run: bool = False
    ) -> Round:
        """One round of the sweep, now; see `Round` for what it tells.

        A branch of a living member is acted on when two rounds have seen it. `dry_run` changes
        nothing. Raises `LogUnavailable`.
        """
        self.engine()
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
