"""The running transaction, and how a body of code becomes one.

`GlobalTransaction` is what user code holds and what participants enlist in. The rules of api.md
section 1 live here: returning commits, an exception aborts and is raised unchanged, a nested
function joins, the deadline cancels the body, a cancelled caller never cancels a second phase.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import secrets
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from coordinator.errors import (
    ConfigurationError,
    HeuristicOutcome,
    OutcomeUnknown,
    TransactionAborted,
    TransactionError,
)
from coordinator.events import AbortRequested, CommitRequested, Enlisted, Published
from coordinator.model import Branch, BranchId, LogId, Outcome, TransactionId, Xid
from coordinator.protocol import Phase

if TYPE_CHECKING:
    from coordinator.driver import Driver
    from coordinator.engine import Engine
    from coordinator.participant import Participant

_P = ParamSpec("_P")
_T = TypeVar("_T")

GRACE_SECONDS = 1.0
"""How long a caller whose time is up still waits to hear an outcome that is already on its way."""

_current: ContextVar[GlobalTransaction | None] = ContextVar("syncpoint_transaction", default=None)


def current() -> GlobalTransaction | None:
    """The transaction that the calling task or thread runs in, if any."""
    return _current.get()


class GlobalTransaction:
    """A running transaction. Made by a coordinator, never by hand."""

    def __init__(self, engine: Engine, driver: Driver, timeout: float) -> None:
        self.timeout = timeout
        self._engine = engine
        self._driver = driver
        self._doom: TransactionAborted | None = None

    @property
    def id(self) -> TransactionId:
        """Names the transaction to `coordinator.status`, to logs and to people.

        Whoever knows the id may ask for an abort; so reading it makes the commit a recorded one.
        """
        core = self._driver.core
        if core.private and core.phase in (Phase.ACTIVE, Phase.PREPARING):
            self._driver.post(Published())
        return core.id

    @property
    def deadline(self) -> float:
        """When the transaction's time is up, on the clock of its event loop, in seconds."""
        return self._driver.deadline

    @property
    def log_id(self) -> LogId:
        return self._engine.identity.id

    @property
    def is_over(self) -> bool:
        """True once the commit or the rollback began: nothing can be enlisted any more."""
        return self._driver.core.phase is not Phase.ACTIVE

    def __repr__(self) -> str:
        return repr(self._driver.core)

    async def enlist(
        self, participant: Participant, *, one_phase: bool = False, last_resource: bool = False
    ) -> Xid:
        """Make a participant part of the transaction; returns the name of its branch.

        Called by participants. Raises `TransactionError` once the commit began, for a participant
        that this coordinator does not have, and for a second last resource.
        """
        self._check_enlistment(participant, last_resource)
        branch = BranchId(secrets.token_hex(8))
        xid = Xid(self.log_id, self._engine.member, self._driver.core.id, branch)
        self._driver.post(
            Enlisted(
                Branch(xid, participant.name), one_phase=one_phase, last_resource=last_resource
            )
        )
        return xid

    def _check_enlistment(self, participant: Participant, last_resource: bool) -> None:
        if self._doom is not None:
            raise TransactionError(f"the transaction cannot commit any more: {self._doom}")
        if self.is_over:
            raise TransactionError(
                f"transaction {self._driver.core.id} is {self._driver.core.phase}: "
                f"{participant.name} can take no part after the commit or the rollback began"
            )
        if self._engine.participants.get(participant.name) is not participant:
            raise ConfigurationError(
                f"{participant.name} is not a participant of this coordinator: name it in "
                "Coordinator(participants=[...])"
            )
        if last_resource and self._driver.core.has_last_resource:
            raise ConfigurationError(
                f"{participant.name} cannot prepare, and the transaction has such a participant "
                "already: at most one can take part"
            )

    def abort(self, reason: str = "abort() was called") -> None:
        """Doom the transaction without an exception: the body may go on, the commit will abort."""
        self.doom(TransactionAborted(reason, transaction_id=self._driver.core.id))

    def doom(self, cause: TransactionAborted) -> None:
        """The transaction will abort with `cause`; the first cause stands."""
        self._doom = self._doom or cause

    # The end, called by the scope that began the transaction.

    async def commit(self) -> None:
        """Commit and return, or raise how it ended otherwise; see `coordinator.errors`."""
        if self._doom is not None:
            await self.roll_back(str(self._doom))
            raise self._doom
        try:
            if self._driver.core.phase is Phase.ACTIVE:
                self._driver.post(CommitRequested())
            await self._until_told()
        except asyncio.CancelledError as cancelled:
            await self._cancelled(cancelled)
            raise
        self._raise_unless_committed()

    async def roll_back(self, reason: str) -> None:
        """Roll back, waiting a little for the branches; never raises for what they answer."""
        driver = self._driver
        driver.post(AbortRequested(reason))
        left = driver.deadline - asyncio.get_running_loop().time()
        await driver.until_over(min(max(left, GRACE_SECONDS), 2 * GRACE_SECONDS))

    async def _until_told(self) -> None:
        driver = self._driver
        left = driver.deadline - asyncio.get_running_loop().time()
        if await driver.until_over(left) or driver.core.decided:
            return
        driver.post(AbortRequested(self._deadline_passed(), retryable=True))
        await driver.until_decided(GRACE_SECONDS)

    async def _cancelled(self, cancelled: asyncio.CancelledError) -> None:
        driver = self._driver
        driver.post(AbortRequested("the caller was cancelled"))
        try:
            await driver.until_decided(GRACE_SECONDS)
        finally:
            self.note_outcome(cancelled)

    def note_outcome(self, error: BaseException) -> None:
        """Tell who reads the exception what became of the transaction."""
        error.add_note(f"transaction {self._driver.core.id}: {self._driver.outcome}")

    def _deadline_passed(self) -> str:
        return f"the deadline of {self.timeout:g} s passed"

    def _raise_unless_committed(self) -> None:
        core = self._driver.core
        if core.heuristic:
            raise HeuristicOutcome(
                transaction_id=core.id, outcome=self._driver.outcome, endings=core.heuristic
            )
        if core.outcome is Outcome.COMMITTED:
            return
        if core.outcome is Outcome.ABORTED:
            reason = core.reason or "somebody else recorded an abort first"
            raise TransactionAborted(reason, transaction_id=core.id, retryable=core.retryable)
        reason = core.reason or self._driver.broken
        reason = reason or f"the log did not answer within {self.timeout:g} s"
        raise OutcomeUnknown(reason, transaction_id=core.id)


class Scope:
    """`async with coordinator.transaction() as txn`: begins or joins, then ends what it began."""

    def __init__(self, begin: Callable[[], GlobalTransaction], owner: Callable[[], Engine]) -> None:
        self._begin = begin
        self._owner = owner
        self._transaction: GlobalTransaction | None = None
        self._token: Token[GlobalTransaction | None] | None = None
        self._timer: asyncio.Timeout | None = None

    async def __aenter__(self) -> GlobalTransaction:
        outer = _current.get()
        if outer is not None and outer._driver.core.phase is not Phase.ENDED:
            if outer.is_over:
                raise TransactionError(
                    f"{outer!r} is ending: a function that a stray task calls now can neither join "
                    "it nor begin another in its place"
                )
            if outer._engine is not self._owner():
                raise ConfigurationError(
                    "a transaction of another coordinator is running here: two coordinators cannot "
                    "make one atomic commit; use one coordinator for all participants"
                )
            self._transaction = outer
            return outer
        transaction = self._transaction = self._begin()
        self._token = _current.set(transaction)
        self._timer = asyncio.timeout_at(transaction.deadline)
        await self._timer.__aenter__()
        return transaction

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        transaction = self._transaction
        if transaction is None:
            raise TransactionError("the transaction was never entered")
        if self._timer is None or self._token is None:  # joined: the outer scope ends it
            if error is not None:
                transaction.doom(_doomed_by(error, transaction))
            return
        _current.reset(self._token)
        try:
            await self._timer.__aexit__(kind, error, traceback)
        except TimeoutError:
            reason = transaction._deadline_passed()
            await transaction.roll_back(reason)
            raise TransactionAborted(
                reason, transaction_id=transaction._driver.core.id, retryable=True
            ) from error
        if error is None:
            await transaction.commit()
            return
        await transaction.roll_back(f"{type(error).__name__}: {error}")
        if isinstance(error, asyncio.CancelledError):
            transaction.note_outcome(error)


def _doomed_by(error: BaseException, transaction: GlobalTransaction) -> TransactionAborted:
    if isinstance(error, TransactionAborted):
        return error
    doom = TransactionAborted(
        f"a function that had joined raised {type(error).__name__}: {error}",
        transaction_id=transaction._driver.core.id,
    )
    doom.__cause__ = error
    return doom


class Transactional(Protocol):
    """What `@coordinator.transactional(...)` is: a decorator that keeps a function's type."""

    def __call__(
        self, function: Callable[_P, Coroutine[Any, Any, _T]], /
    ) -> Callable[_P, Coroutine[Any, Any, _T]]: ...


def decorate(
    function: Callable[_P, Coroutine[Any, Any, _T]], scope: Callable[[], Scope]
) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """Run each call of a coroutine function in a scope of its own."""
    if not inspect.iscoroutinefunction(function):
        raise ConfigurationError(
            f"{getattr(function, '__qualname__', function)!s} is no coroutine function: write "
            "`async def`; synchronous functions are not supported yet"
        )

    @functools.wraps(function)
    async def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        async with scope():
            return await function(*args, **kwargs)

    return wrapper
