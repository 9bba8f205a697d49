"""Ends prepared branches, of this process or of any other, over connections of its own.

Users' leases can hold every connection of their pool; what ends branches must never wait for them.
An idle connection of that pool is borrowed when there is one, else one of a few that are kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import psycopg

from coordinator.errors import ConfigurationError, ProtocolError, one_line
from coordinator.model import FINISHED, Branch, Ending, EndingKind, LogId, Xid
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
from participants.postgres.statements import Token

logger = logging.getLogger("syncpoint.postgres")

ASK_AGAIN_SECONDS_MAX = 2.0


class Finisher:
    """What recovery needs of a database. Every method may be called by several at once.

    Raises `DatabaseUnavailable` when the same call may be repeated soon, and `ConfigurationError`
    when a person must change something first.
    """

    def __init__(self, name: str, borrowed: Pool, own: Pool) -> None:
        self._name = name
        self._borrowed = borrowed
        self._own = own

    def close(self) -> None:
        self._own.close()

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
        if not reply.replication_unconfirmed:
            return FINISHED
        # It is committed here, and the decision stands in the log. If a standby that missed it is
        # promoted, the branch comes back prepared and the sweep commits it again.
        evidence = "committed, but no synchronous standby has confirmed it"
        logger.warning("%s: branch %s is %s", self._name, branch.xid, evidence)
        return Ending(EndingKind.FINISHED, evidence)

    async def roll_back(self, branch: Branch, xid8: int | None) -> Ending:
        """ROLLBACK PREPARED. `xid8` is known when a PREPARE was sent and its answer was lost."""
        token = Token.decode(branch.token)
        if token is not None:
            if not token.xid8:
                return FINISHED
            xid8 = token.xid8
        async with self._connection() as connection:
            self._check_cluster(connection, token)
            reply = await connection.ask(statements.rollback_prepared(branch.xid))
            meaning = read_finish(reply, "ROLLBACK PREPARED")
            if meaning is Meaning.GONE:
                if xid8 is None:
                    return FINISHED
                return await self._gone_after_rollback(connection, branch, token, xid8)
            self._raise_unless_done(meaning, reply, branch.xid)
        return FINISHED

    async def learn_fate(self, token: Token) -> Fate:
        """How a COMMIT whose answer was lost ended; asked until the server says it.

        The session that ran it may not have noticed that its client is gone, and then never would
        end: it is told to. UNKNOWN when the server has lost track, after a promotion for instance.
        """
        pause = 0.02
        while True:
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
                logger.warning("%s: cannot learn how a commit ended: %s", self._name, error)
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

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[ServerConnection]:
        """A connection for one exchange."""
        pool = self._borrowed
        connection = pool.acquire_idle()
        if connection is None:
            pool = self._own
            until = asyncio.get_running_loop().time() + ANSWER_SECONDS_MAX
            try:
                connection = await pool.acquire(until)
            except TimeoutError as error:
                raise DatabaseUnavailable(f"{self._name} does not answer") from error
            except psycopg.Error as error:
                text = f"{self._name} cannot be reached: {one_line(error)}"
                if is_refusal(str(error)):
                    raise ConfigurationError(
                        f"{text}. Mend the role, the url or pg_hba.conf; it is tried again"
                    ) from error
                raise DatabaseUnavailable(text) from error
        try:
            yield connection
        finally:
            pool.release(connection)
