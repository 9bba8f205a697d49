"""The statements of the protocol as bytes, and what their answers hold.

They are sent as plain text, since PostgreSQL takes no bind parameter in them; a gid is safe to
quote, because only names in the form of `Xid` are let through.
"""

from __future__ import annotations

import msgspec

from coordinator.errors import ProtocolError
from coordinator.model import LogId, Xid
from participants.postgres.replies import Reply

# Who this server is, asked once on every new connection, in one round trip.
GREET = b"""
SELECT pg_is_in_recovery(),
       (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN '00000000'
            ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END,
       current_setting('synchronous_commit'),
       current_setting('max_prepared_transactions'),
       current_database(),
       pg_backend_pid(),
       (SELECT (extract(epoch FROM backend_start) * 1000000)::bigint
          FROM pg_stat_get_activity(pg_backend_pid()))
"""

# Whether the branch is still the one that was begun, and whether it wrote anything. A serializable
# one counts as a writer: its reads alone can make its commit fail. PREPARE makes the current role
# the owner of the branch, and nobody else can end it: is it the one that logged in?
EXAMINE = b"""
SELECT current_setting('syncpoint.branch', true),
       CASE WHEN current_setting('transaction_isolation') = 'serializable'
            THEN pg_current_xact_id() ELSE pg_current_xact_id_if_assigned() END,
       current_setting('synchronous_commit'),
       current_user = session_user
"""

# The same for a branch that has certainly written, in one message with its PREPARE. What a role was
# taken for, such as row security, is done with before it is laid down.
_EXAMINE_WRITER = """
SELECT current_setting('syncpoint.branch', true), pg_current_xact_id(),
       CASE WHEN current_setting('synchronous_commit') NOT IN ('on', 'remote_apply')
            THEN set_config('synchronous_commit', 'on', true) END;
SET CONSTRAINTS ALL IMMEDIATE; """

# What a role was taken for, such as row security, is done with before it is laid down.
SETTLE = b"SET CONSTRAINTS ALL IMMEDIATE; "

COMMIT = b"COMMIT"
ROLLBACK = b"ROLLBACK"
REPLICATE = b"SET LOCAL synchronous_commit = on"
REPLICATE_SESSION = b"SET synchronous_commit = on"
REPLICATED = ("on", "remote_apply")


class Greeting(msgspec.Struct, frozen=True):
    """The server at the other end of a connection."""

    in_recovery: bool
    system_identifier: int
    timeline: int
    synchronous_commit: str
    max_prepared_transactions: int
    database: str
    process_id: int
    process_began_us: int
    """In microseconds since the epoch, since another process may get the same number later; 0 where
    the session's current role may not see it."""

    @classmethod
    def read(cls, reply: Reply) -> Greeting:
        recovery, system, timeline, synchronous, slots, database, process, began = reply.rows[0]
        return cls(
            in_recovery=recovery == "t",
            system_identifier=int(system or 0),
            timeline=int(timeline or "0", 16),
            synchronous_commit=synchronous or "",
            max_prepared_transactions=int(slots or 0),
            database=database or "",
            process_id=int(process or 0),
            process_began_us=int(began or 0),
        )


class Examination(msgspec.Struct, frozen=True):
    """`xid8`, the transaction number, is None when the branch has written nothing."""

    marker: str
    xid8: int | None
    replicated: bool
    login_role: bool

    @classmethod
    def read(cls, reply: Reply) -> Examination:
        marker, xid8, synchronous, login_role = reply.rows[0]
        return cls(
            marker=marker or "",
            xid8=None if xid8 is None else int(xid8),
            replicated=synchronous in REPLICATED,
            login_role=login_role == "t",
        )

    @classmethod
    def read_writer(cls, reply: Reply) -> Examination:
        """From the answer to `examine_and_prepare`."""
        marker, xid8, _ = reply.rows[0]
        return cls(marker=marker or "", xid8=int(xid8 or 0), replicated=True, login_role=True)


InDoubt = int | Greeting
"""What may yet prepare a branch: its transaction number, or else the session that was asked to."""


class Token(msgspec.Struct, frozen=True, array_like=True):
    """What a vote hands on to whoever ends the branch; xid8 0 is a branch that wrote nothing."""

    xid8: int
    system_identifier: int
    timeline: int

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, token: bytes) -> Token | None:
        """None when there is no token: the branch was found by recovery."""
        if not token:
            return None
        try:
            return msgspec.msgpack.decode(token, type=cls)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"{token!r} is not a token of a PostgreSQL branch") from error


class Begin(msgspec.Struct, frozen=True):
    """How every branch of a participant begins; limits in milliseconds, None for the server's own.

    SET LOCAL and not `set_config`: a SELECT would take the snapshot, after which the user could not
    choose an isolation level any more.
    """

    lock_timeout_ms: int | None = None
    statement_timeout_ms: int | None = None

    def statement(self, begin: str, xid: Xid, greeting: Greeting, idle_limit_ms: int) -> bytes:
        """BEGIN, as `begin` has it with its modes, and the branch's marker in one message.

        The idle limit makes the server itself drop the session, and its locks, when we vanish
        without a word.
        """
        apply = greeting.synchronous_commit == "remote_apply"
        parts = [
            begin,
            f"SET LOCAL syncpoint.branch = {_gid(xid)}",
            f"SET LOCAL synchronous_commit = {'remote_apply' if apply else 'on'}",
            f"SET LOCAL idle_in_transaction_session_timeout = {idle_limit_ms:d}",
        ]
        if self.lock_timeout_ms is not None:
            parts.append(f"SET LOCAL lock_timeout = {self.lock_timeout_ms:d}")
        if self.statement_timeout_ms is not None:
            parts.append(f"SET LOCAL statement_timeout = {self.statement_timeout_ms:d}")
        return "; ".join(parts).encode()


def prepare(xid: Xid) -> bytes:
    return f"PREPARE TRANSACTION {_gid(xid)}".encode()


def examine_and_prepare(xid: Xid, login_role: bytes) -> bytes:
    """For a branch that has certainly written: PREPARE unless the server answers with an error."""
    return f"{_EXAMINE_WRITER}{login_role.decode()}; PREPARE TRANSACTION {_gid(xid)}".encode()


def commit_prepared(xid: Xid) -> bytes:
    return f"COMMIT PREPARED {_gid(xid)}".encode()


def rollback_prepared(xid: Xid) -> bytes:
    return f"ROLLBACK PREPARED {_gid(xid)}".encode()


def fate(xid8: int) -> bytes:
    return f"SELECT pg_xact_status('{xid8:d}')".encode()


def terminate_session_of(xid8: int) -> bytes:
    """End the session, if any, in which a transaction still runs: its client is gone.

    Sessions show the lower 32 bits of the number; two that are alive never share them.
    """
    return (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE datname = current_database() AND backend_xid = '{xid8 % 2**32:d}'"
    ).encode()


def terminate_process(process_id: int, began_us: int) -> bytes:
    """End one session of the server; no row says that it had ended already.

    One that the current role may not look at, which may be that one, is left to end by itself.
    """
    return (
        "SELECT CASE WHEN backend_start IS NOT NULL THEN pg_terminate_backend(pid) END "
        f"FROM pg_stat_activity WHERE pid = {process_id:d} AND (backend_start IS NULL "
        f"OR (extract(epoch FROM backend_start) * 1000000)::bigint = {began_us:d})"
    ).encode()


def has_written(tag: str) -> bool:
    """Whether a command with this tag has changed rows, and so has a transaction number.

    False says nothing: a SELECT may call what writes.
    """
    return tag.startswith(("INSERT", "UPDATE", "DELETE", "MERGE")) and not tag.endswith(" 0")


def recover(log: LogId) -> bytes:
    """All branches of a log in this database, beside whether this is a primary.

    `starts_with`, since `_` is a wildcard of LIKE. In recovery the view is empty whatever is
    prepared on the primary, so the two are asked in one statement.
    """
    prefix = _plain(Xid.prefix(log))
    return (
        "SELECT pg_is_in_recovery(), NULL UNION ALL "
        "SELECT false, gid FROM pg_prepared_xacts "
        f"WHERE database = current_database() AND starts_with(gid, '{prefix}')"
    ).encode()


def _gid(xid: Xid) -> str:
    return f"'{_plain(str(xid))}'"


def _plain(text: str) -> str:
    """The text, which is safe between quotes; raises `ProtocolError` if it is not."""
    if not text.translate(_HARMLESS).isalnum() or not text.isascii():
        raise ProtocolError(f"{text!r} cannot be quoted: it is no name of ours")
    return text


_HARMLESS = str.maketrans("", "", ":-")
