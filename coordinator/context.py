"""Which transaction the calling task or thread runs in.

It is carried by a context variable, so that `asyncio.gather`, `TaskGroup` and `asyncio.to_thread`
carry it too.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar, Token

from coordinator.errors import ConfigurationError, TransactionError
from coordinator.transactional import GlobalTransaction

_current: ContextVar[GlobalTransaction | None] = ContextVar("syncpoint_transaction", default=None)


def current() -> GlobalTransaction | None:
    """The transaction that the calling task or thread runs in, if any."""
    return _current.get()


def running() -> GlobalTransaction | None:
    """The transaction that `current` is, unless it has ended and a stray task goes on.

    A body that runs on after its deadline, as one in a thread does, is no stray: what it calls must
    not begin a transaction of its own and commit it.
    """
    transaction = _current.get()
    if transaction is None or (transaction.has_ended and transaction.is_left):
        return None
    return transaction


def enter(transaction: GlobalTransaction | None) -> Token[GlobalTransaction | None]:
    """From now on the calling task or thread runs in that transaction, or in none."""
    return _current.set(transaction)


def leave(token: Token[GlobalTransaction | None]) -> None:
    """Go back to what was current before `enter`."""
    _current.reset(token)


def required(verb: str, *, blocking: bool) -> GlobalTransaction:
    """The transaction that `verb`, the name of a participant's method, is to work in.

    `blocking` tells which face was called. Raises `TransactionError` outside a transaction, in one
    that was begun with the other face, and for the synchronous face on a running event loop.
    """
    if blocking:
        refuse_on_a_running_loop(verb)
    transaction = current()
    if transaction is None:
        within = "with coordinator.blocking" if blocking else "async with coordinator"
        raise TransactionError(
            f"{verb} was called outside a transaction: call it in a function decorated with "
            f"@coordinator.transactional, or inside `{within}.transaction()`"
        )
    transaction.refuse_unless_of(verb, blocking=blocking)
    return transaction


def refuse_on_a_running_loop(verb: str, hint: str = "use the asynchronous verb") -> None:
    """Raise `ConfigurationError` if the calling thread runs an event loop: it would stand still."""
    if asyncio._get_running_loop() is not None:
        raise ConfigurationError(
            f"{verb} is synchronous and would stop the event loop that runs in this thread: "
            f"{hint}, or call it in a thread of its own"
        )
