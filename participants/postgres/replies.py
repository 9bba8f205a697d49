"""How an answer of PostgreSQL is read: pure data and pure functions, no I/O.

`Reply` is what one statement of the protocol was answered; `read_prepare` and `read_finish` say
what it means. The tables are those of PostgreSQL's documentation and of trials against live
servers: a SQLSTATE alone is never a yes, only the command tag is; and an answer that was lost, or
that came with the loss of the connection, is in doubt whatever it says.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from coordinator.errors import TransactionError


class DatabaseUnavailable(TransactionError):
    """The server did not answer, or cannot just now: the same call may be repeated soon.

    What is set up wrong, so that repeating needs a person first, is a `ConfigurationError`.
    """


class Reply(msgspec.Struct, frozen=True):
    """The answer to one statement, or the lack of one.

    `rows` are those of the first statement in it that gave any, `tag` is the last one's.
    `connected` is False when the connection was lost, before the answer or with it.
    `replication_unconfirmed`: it was done here, but no synchronous standby has confirmed it.
    """

    tag: str = ""
    rows: tuple[tuple[str | None, ...], ...] = ()
    sqlstate: str = ""
    message: str = ""
    connected: bool = True
    replication_unconfirmed: bool = False

    @property
    def succeeded(self) -> bool:
        return self.connected and not self.sqlstate

    def __str__(self) -> str:
        if self.sqlstate:
            return f"{self.message} (SQLSTATE {self.sqlstate})"
        return self.message or self.tag or "no answer"


class Meaning(StrEnum):
    DONE = "done"
    NO = "no"
    IN_DOUBT = "in doubt"
    GONE = "gone"
    SOON = "retry soon"
    SLOWLY = "retry slowly: a person has to change something"
    BUG = "bug"


PREPARED_TAG = "PREPARE TRANSACTION"
UNDEFINED_OBJECT = "42704"
IN_FAILED_TRANSACTION = "25P02"
DUPLICATE_OBJECT = "42710"
_SHUTDOWN = {"57P01", "57P02", "57P03"}
_WARNING = "01000"

# Running the whole transaction again may help: conflicts, exhausted resources, time limits, and
# whatever a restart or a failover of the server does.
_RETRYABLE = {
    "40001", "40P01", "55000", "55P03", "53000", "53100", "53200", "53300",
    "57014", "57P01", "57P02", "57P03", "57P05", "58030", "25P03", "25P04",
}  # fmt: skip
# Privileges, the wrong database, a refused login: only a person can change them.
_CONFIGURATION = {"42501", "0A000", "3D000"}
# How a server words a refusal at login that lasts until a person acts. libpq passes the text on,
# and no SQLSTATE; in another language it is read as an outage, which is tried again just the same.
_REFUSALS = (
    "password authentication failed", "no pg_hba.conf entry", "pg_hba.conf rejects", "role ",
    "database ", "permission denied",
)  # fmt: skip
_NOT_YET = "is not currently accepting connections"


def is_retryable(sqlstate: str) -> bool:
    """Whether running the transaction again may succeed after this error."""
    return sqlstate in _RETRYABLE or sqlstate.startswith("08")


def is_configuration(sqlstate: str) -> bool:
    """Whether only a person can make the statement succeed."""
    return sqlstate in _CONFIGURATION or sqlstate.startswith("28")


def is_refusal(message: str) -> bool:
    """Whether a failed login says that only a person can make the next one succeed."""
    _, fatal, reason = message.partition("FATAL:")
    return bool(fatal) and reason.strip().startswith(_REFUSALS) and _NOT_YET not in reason


def is_replication_warning(sqlstate: str, source_function: str) -> bool:
    """Whether a notice says that the wait for synchronous replication was given up.

    A user's own RAISE WARNING, in a deferred trigger for instance, has the same SQLSTATE.
    """
    return sqlstate == _WARNING and source_function != "exec_stmt_raise"


def read_prepare(reply: Reply) -> Meaning:
    """To PREPARE TRANSACTION: DONE is a yes, NO a definite no, IN_DOUBT may be prepared."""
    if not reply.connected or reply.sqlstate in _SHUTDOWN:
        return Meaning.IN_DOUBT
    if reply.sqlstate == DUPLICATE_OBJECT:
        return Meaning.BUG
    if reply.sqlstate or reply.tag == "ROLLBACK":
        return Meaning.NO
    if reply.tag != PREPARED_TAG:
        return Meaning.BUG
    # Prepared here, but a promoted standby would not know of it: the promise cannot be given.
    return Meaning.NO if reply.replication_unconfirmed else Meaning.DONE


def read_finish(reply: Reply, expected_tag: str) -> Meaning:
    """To COMMIT PREPARED and ROLLBACK PREPARED. GONE is ambiguous: ask for the xid8's status."""
    if not reply.connected:
        return Meaning.SOON
    if reply.sqlstate == UNDEFINED_OBJECT:
        return Meaning.GONE
    if is_configuration(reply.sqlstate):
        return Meaning.SLOWLY
    if reply.sqlstate:
        return Meaning.SOON
    return Meaning.DONE if reply.tag == expected_tag else Meaning.BUG


def read_commit(reply: Reply) -> Meaning:
    """To the COMMIT of a branch that was not prepared."""
    if not reply.connected or reply.sqlstate in _SHUTDOWN:
        return Meaning.IN_DOUBT
    if reply.sqlstate or reply.tag == "ROLLBACK":
        return Meaning.NO
    return Meaning.DONE if reply.tag == "COMMIT" else Meaning.BUG


class Fate(StrEnum):
    """What the server says of a transaction number, as `pg_xact_status` words it."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    IN_PROGRESS = "in progress"
    UNKNOWN = "unknown"


def read_fate(reply: Reply) -> Fate:
    """UNKNOWN when the number is too old (null), or has not been given out here (22023)."""
    value = reply.rows[0][0] if reply.succeeded and reply.rows else None
    return Fate(value) if value in set(Fate) else Fate.UNKNOWN
