"""Ends prepared branches, of this process or of any other, over connections of its own.

Users' leases can hold every connection of their pool; what ends branches must never wait for them.
An idle connection of that pool is borrowed when there is one, else one of a few that are kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from functools import partial

import psycopg

from coordinator.errors import ConfigurationError, ProtocolError, one_line
from coordinator.logs import retry_level, say_of
from coordinator.model import FINISHED, Branch, Ending, EndingKind, LogId, Xid
from coordinator.participant import Send
from participants.postgres import statements
from participants.postgres.connection import ANSWER_SECONDS_MAX, ServerConnection
from participants.postgres.pool import Pool
from participants.postgres.replies import (
    DatabaseUnavailable,
    Fate,
    Meaning,
    Reply,
    is_refusal,
    read_fate,
    read_finish,
)
from participants.postgres.statements import Greeting, InDoubt, Token

logger = logging.getLogger("syncpoint.postgres")

ASK_AGAIN_SECONDS_MAX = 2.0


class Finisher:
    """What recovery needs of a database. Every method may be called by several at once.

    Raises `DatabaseUnavailable` when the same call may be repeated soon, and `ConfigurationError`
    when a person must change something first.
    """

    def __init__(self, name: str, borrowed: Pool, own: Pool, system_identifier: int) -> None:
        self._name = name
        self._borrowed = borrowed
        self._own = own
        self._sent_to: set[ServerConnection] = set()
        self._system_identifier = system_identifier

    def close(self) -> None:
        self._own.close()
        for connection in self._sent_to:
            connection.close()  # nobody waits for its answer any more

    async def commit(self, branch: Branch) -> Ending:
        """COMMIT PREPARED; a branch that is gone is looked up by its transaction number."""
        token = Token.decode(branch.token)
        if token is not None and not token.xid8:
            return FINISHED  # it wrote nothing, and its session is gone
        async with self._connection() as connection:
            self._check_cluster(connection, token)
            reply = await connection.ask(statements.commit_prepared(branch.xid))
            meaning = read_finish(reply, "COMMIT PREPARED")
            if meaning is Meaning.GONE:
                return await self._gone_after_commit(connection, branch, token)
            self._raise_unless_done(meaning, reply, branch.xid)
        return self._committed(branch, reply)

    def _committed(self, branch: Branch, reply: Reply) -> Ending:
        if not reply.replication_unconfirmed:
            return FINISHED
        # It is committed here, and the decision stands in the log. If a standby that missed it is
        # promoted, the branch comes back prepared and the sweep commits it again.
        evidence = "committed, but no synchronous standby has confirmed it"
        about = (logger, logging.WARNING, self._name, branch.xid)
        say_of(*about, "unconfirmed", "%s: %s", evidence=evidence)
        return Ending(EndingKind.FINISHED, evidence)

    def commit_at_once(self, branch: Branch) -> Send | None:
        """COMMIT PREPARED over an idle connection of the users' pool, if there is one just now.

        The answer is how it ended, or None for everything that `commit` has to look into.
        """
        token = Token.decode(branch.token)
        if token is None or not token.xid8 or not self._borrowed.has_idle:
            return None
        if token.system_identifier != self._system_identifier:
            return None
        return partial(self._send_commit, branch)

    def _send_commit(self, branch: Branch, ended: Callable[[Ending | None], None]) -> None:
        connection = self._borrowed.acquire_idle()
        assert connection is not None, "there was one when it was asked for, a moment ago"
        self._sent_to.add(connection)

        def answered(reply: Reply) -> None:
            self._sent_to.remove(connection)
            self._borrowed.release(connection)
            done = read_finish(reply, "COMMIT PREPARED") is Meaning.DONE
            ended(self._committed(branch, reply) if done else None)

        connection.send(statements.commit_prepared(branch.xid), answered, ANSWER_SECONDS_MAX)

    async def roll_back(self, branch: Branch, in_doubt: InDoubt | None) -> Ending:
        """ROLLBACK PREPARED. `in_doubt` when a PREPARE was sent and its answer was lost."""
        token = Token.decode(branch.token)
        xid8 = in_doubt if isinstance(in_doubt, int) else None
        if token is not None:
            if not token.xid8:
                return FINISHED
            xid8 = token.xid8
        async with self._connection() as connection:
            self._check_cluster(connection, token)
            if isinstance(in_doubt, Greeting):
                await self._end_session(connection, branch, in_doubt)
            reply = await connection.ask(statements.rollback_prepared(branch.xid))
            meaning = read_finish(reply, "ROLLBACK PREPARED")
            if meaning is Meaning.GONE:
                if xid8 is None:
                    return FINISHED
                return await self._gone_after_rollback(connection, branch, token, xid8)
            self._raise_unless_done(meaning, reply, branch.xid)
        return FINISHED

    async def learn_fate(self, token: Token, xid: Xid) -> Fate:
        """How a COMMIT whose answer was lost ended; asked until the server says it.

        The session that ran it may not have noticed that its client is gone, and then never would
        end: it is told to. UNKNOWN when the server has lost track, after a promotion for instance.
        """
        pause, attempt = 0.02, 0
        while True:
            attempt += 1
            try:
                async with self._connection() as connection:
                    self._check_cluster(connection, token)
                    if connection.greeting.timeline != token.timeline:
                        return Fate.UNKNOWN
                    fate = await self._fate(connection, token.xid8)
                    if fate is not Fate.IN_PROGRESS:
                        return fate
                    await connection.ask(statements.terminate_session_of(token.xid8))
            except (DatabaseUnavailable, ConfigurationError) as error:
                message = "%s cannot be asked how its commit ended, attempt %d: %s"
                fields = {"attempt": attempt, "error": str(error)}
                say_of(logger, retry_level(attempt), self._name, xid, "retry", message, **fields)
            await asyncio.sleep(pause)
            pause = min(pause * 2, ASK_AGAIN_SECONDS_MAX)

    async def recover(self, log: LogId) -> Collection[Branch]:
        """The prepared branches of a log in this database."""
        async with self._connection() as connection:
            reply = await connection.ask(statements.recover(log))
            if not reply.succeeded:
                raise DatabaseUnavailable(f"{self._name} does not list its branches: {reply}")
        (in_recovery, _), *found = reply.rows
        if in_recovery == "t":
            raise DatabaseUnavailable(
                f"{self._name} is a standby just now: what is prepared is known on its primary only"
            )
        xids = (Xid.parse(gid or "") for _, gid in found)
        return [Branch(xid, self._name) for xid in xids if xid is not None and xid.log == log]

    async def _gone_after_commit(
        self, connection: ServerConnection, branch: Branch, token: Token | None
    ) -> Ending:
        if token is None:
            return Ending(
                EndingKind.HEURISTIC_HAZARD,
                "the branch is gone and its transaction number was never recorded: it may have "
                "been committed or rolled back by somebody",
            )
        fate = await self._fate(connection, token.xid8)
        known = f"pg_xact_status('{token.xid8}') is {fate}"
        if connection.greeting.timeline != token.timeline:
            return Ending(
                EndingKind.HEURISTIC_HAZARD,
                f"the branch is gone; {known}, which proves nothing: the server was promoted from "
                f"timeline {token.timeline} to {connection.greeting.timeline} since it voted",
            )
        match fate:
            case Fate.COMMITTED:
                return FINISHED
            case Fate.ABORTED:
                return Ending(
                    EndingKind.HEURISTIC_ROLLBACK,
                    f"the branch is gone and {known}: somebody rolled it back",
                )
            case Fate.IN_PROGRESS:
                raise DatabaseUnavailable(f"{self._name}: {known}, though its branch is gone")
        return Ending(
            EndingKind.HEURISTIC_HAZARD,
            f"the branch is gone and {known}: the server no longer knows how it ended",
        )

    async def _gone_after_rollback(
        self, connection: ServerConnection, branch: Branch, token: Token | None, xid8: int
    ) -> Ending:
        if token is not None and connection.greeting.timeline != token.timeline:
            return FINISHED  # a promotion has dropped it, and the number now means another
        match await self._fate(connection, xid8):
            case Fate.COMMITTED:
                return Ending(
                    EndingKind.HEURISTIC_COMMIT,
                    f"the branch is gone and pg_xact_status('{xid8}') is committed: somebody "
                    "committed it",
                )
            case Fate.IN_PROGRESS:
                # The session is still there: its PREPARE may be on the way. It ends now, and the
                # next attempt finds the branch prepared, or nothing.
                await connection.ask(statements.terminate_session_of(xid8))
                raise DatabaseUnavailable(
                    f"{self._name}: branch {branch.xid} is not prepared yet, and not ended either"
                )
        return FINISHED

    async def _end_session(
        self, connection: ServerConnection, branch: Branch, session: Greeting
    ) -> None:
        """Only when the session that was to prepare has gone is what it left behind all there is.

        Raises `DatabaseUnavailable` while it is there; the next attempt finds it gone.
        """
        statement = statements.terminate_process(session.process_id, session.process_began_us)
        reply = await connection.ask(statement)
        if not reply.succeeded:
            raise DatabaseUnavailable(f"{self._name} was lost: {reply}")
        if reply.rows:
            raise DatabaseUnavailable(
                f"{self._name}: branch {branch.xid} is not prepared yet, and not ended either"
            )

    async def _fate(self, connection: ServerConnection, xid8: int) -> Fate:
        reply = await connection.ask(statements.fate(xid8))
        if not reply.connected:
            raise DatabaseUnavailable(f"{self._name} was lost: {reply}")
        return read_fate(reply)

    def _raise_unless_done(self, meaning: Meaning, reply: Reply, xid: Xid) -> None:
        if meaning is Meaning.DONE:
            return
        text = f"{self._name}, branch {xid}: {reply}"
        if meaning is Meaning.SLOWLY:
            raise ConfigurationError(
                f"{text}. Connect to the branch's own database, as the user who prepared it or as "
                "a superuser"
            )
        if meaning is Meaning.BUG:
            raise ProtocolError(f"{text}: unexpected answer")
        raise DatabaseUnavailable(text)

    def _check_cluster(self, connection: ServerConnection, token: Token | None) -> None:
        found = connection.greeting.system_identifier
        if token is not None and token.system_identifier != found:
            raise ConfigurationError(
                f"{self._name} is another PostgreSQL cluster (system identifier {found}) than the "
                f"one that holds the branch ({token.system_identifier}): point its url there"
            )

    def _connection(self) -> _Lent:
        """A connection for one exchange: an idle one of the users' pool, else one of our own."""
        return _Lent(self._name, self._borrowed, self._own)


class _Lent:
    """A connection, for as long as the block lasts."""

    __slots__ = ("_borrowed", "_connection", "_name", "_pool")

    def __init__(self, name: str, borrowed: Pool, own: Pool) -> None:
        self._name = name
        self._borrowed = borrowed
        self._pool = own
        self._connection: ServerConnection | None = None

    async def __aenter__(self) -> ServerConnection:
        connection = self._borrowed.acquire_idle()
        if connection is None:
            connection = await self._acquire()
        else:
            self._pool = self._borrowed
        self._connection = connection
        return connection

    async def __aexit__(self, *_: object) -> None:
        if self._connection is not None:
            self._pool.release(self._connection)

    async def _acquire(self) -> ServerConnection:
        until = asyncio.get_running_loop().time() + ANSWER_SECONDS_MAX
        try:
            return await self._pool.acquire(until)
        except TimeoutError as error:
            raise DatabaseUnavailable(f"{self._name} does not answer") from error
        except psycopg.Error as error:
            text = f"{self._name} cannot be reached: {one_line(error)}"
            if is_refusal(str(error)):
                raise ConfigurationError(
                    f"{text}. Mend the role, the url or pg_hba.conf; it is tried again"
                ) from error
            raise DatabaseUnavailable(text) from error
