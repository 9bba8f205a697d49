"""The reply table to COMMIT PREPARED and ROLLBACK PREPARED, row by row.

Not here, since no single machine produces them on purpose: 53100 and 58030, 40001, 40P01 and 55P03
(no code of the user runs in these statements). To the tag ROLLBACK, a bug, `test_reply_table` has
made-up replies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import psycopg
import pytest

from coordinator.errors import ConfigurationError
from coordinator.model import FINISHED, Branch, Ending, EndingKind, VoteKind
from participants.conformance import binding
from participants.postgres import DatabaseUnavailable, PostgreSQL
from participants.postgres.statements import Token
from tests.support.branches import (
    UPDATE,
    end_the_wait,
    missing_standby,
    until,
    until_ended,
    vote_after,
    waiting,
)
from tests.support.branches import work as begun
from tests.support.postgres import query
from tests.support.reply_place import Place, Table

FINISH = Table()

Finish = Callable[[Place, str], Awaitable[None]]


def both(name: str) -> Callable[[Finish], Finish]:
    """A row for either verb."""

    def add(row: Finish) -> Finish:
        for verb in ("COMMIT", "ROLLBACK"):

            @FINISH.row(f"{verb}: {name}")
            async def of_verb(place: Place, verb: str = verb) -> None:
                await row(place, verb)
                assert place.balance() == (99 if verb == "COMMIT" else 100)

        return row

    return add


@asynccontextmanager
async def prepared(place: Place, url: str = "") -> AsyncIterator[tuple[PostgreSQL, Branch]]:
    """A participant with a branch that it has prepared."""
    async with place.participant(url) as participant:
        branch, vote = await vote_after(participant, UPDATE)
        assert vote.kind is VoteKind.PREPARED, vote
        yield participant, branch


def end(participant: PostgreSQL, branch: Branch, verb: str) -> Awaitable[Ending]:
    return participant.commit(branch) if verb == "COMMIT" else participant.rollback(branch)


async def must_end(participant: PostgreSQL, branch: Branch, verb: str) -> None:
    assert await until_ended(lambda: end(participant, branch, verb)) == FINISHED


@both("success tag: done")
async def success(place: Place, verb: str) -> None:
    async with prepared(place) as (participant, branch):
        assert await end(participant, branch, verb) == FINISHED
        assert not place.is_prepared(branch)


@FINISH.row("COMMIT: success tag with warning 01000: done, the decision is kept and it is said")
async def warning_at_commit(place: Place) -> None:
    async with prepared(place) as (participant, branch), missing_standby(place.url):
        ending = asyncio.ensure_future(participant.commit(branch))
        await end_the_wait(place.url)
        assert (await ending).kind is EndingKind.FINISHED
        assert "no synchronous standby" in (await ending).evidence
    assert place.balance() == 99


@FINISH.row("ROLLBACK: success tag with warning 01000: done")
async def warning_at_rollback(place: Place) -> None:
    async with prepared(place) as (participant, branch):
        async with missing_standby(place.url):
            ending = asyncio.ensure_future(participant.rollback(branch))
            await end_the_wait(place.url)
            assert await ending == FINISHED
        assert not place.is_prepared(branch)


# 42704: gone.


def gone(verb: str, by_hand: str, kind: EndingKind, part: str) -> None:
    fate = "committed" if by_hand == "COMMIT" else "aborted"

    @FINISH.row(f"{verb}: 42704, pg_xact_status {fate}: {kind}")
    async def row(place: Place) -> None:
        async with prepared(place) as (participant, branch):
            query(place.url, f"{by_hand} PREPARED '{branch.xid}'")
            ending = await end(participant, branch, verb)
            assert ending.kind is kind and part in ending.evidence, ending
            assert await end(participant, branch, verb) == ending


gone("COMMIT", "COMMIT", EndingKind.FINISHED, "")
gone("COMMIT", "ROLLBACK", EndingKind.HEURISTIC_ROLLBACK, "aborted")
gone("ROLLBACK", "COMMIT", EndingKind.HEURISTIC_COMMIT, "committed")
gone("ROLLBACK", "ROLLBACK", EndingKind.FINISHED, "")


@FINISH.row("COMMIT: 42704, null, in the future, no number, or another timeline: hazard")
async def gone_and_unknown(place: Place) -> None:
    async with prepared(place) as (participant, branch):
        token = Token.decode(branch.token)
        assert token is not None
        assert await participant.commit(branch) == FINISHED
        forgotten = Token(3, token.system_identifier, token.timeline)
        ((status,),) = query(place.url, "SELECT pg_xact_status('3')")
        assert status is None
        future = Token(token.xid8 + 1_000_000, token.system_identifier, token.timeline)
        promoted = Token(token.xid8, token.system_identifier, token.timeline + 1)
        for bad in (forgotten.encode(), future.encode(), promoted.encode(), b""):
            ending = await participant.commit(Branch(branch.xid, "accounts", bad))
            assert ending.kind is EndingKind.HEURISTIC_HAZARD and ending.evidence, ending


@FINISH.row("ROLLBACK: 42704, null or no number: done")
async def rolled_back_and_unknown(place: Place) -> None:
    async with prepared(place) as (participant, branch):
        token = Token.decode(branch.token)
        assert token is not None
        assert await participant.rollback(branch) == FINISHED
        forgotten = Token(3, token.system_identifier, token.timeline)
        for each in (forgotten.encode(), b""):
            assert await participant.rollback(Branch(branch.xid, "accounts", each)) == FINISHED


def in_progress(verb: str) -> None:
    @FINISH.row(f"{verb}: 42704, in progress: not ended yet")
    async def row(place: Place) -> None:
        async with place.participant() as participant:
            branch = await begun(participant)
            # Its own work is over, so that it is looked for among the prepared ones.
            assert await participant.rollback(branch) == FINISHED
            session = psycopg.connect(place.url)
            try:
                found = session.execute(
                    "SELECT pg_current_xact_id(), system_identifier FROM pg_control_system()"
                ).fetchone()
                assert found is not None
                late = Branch(branch.xid, "accounts", Token(int(found[0]), found[1], 1).encode())
                with pytest.raises(DatabaseUnavailable):
                    await end(participant, late, verb)
                if (
                    verb == "ROLLBACK"
                ):  # its session was ended, so that no PREPARE can come any more
                    await must_end(participant, late, verb)
                    with pytest.raises(psycopg.OperationalError):
                        session.execute("SELECT 1")
            finally:
                session.close()


in_progress("COMMIT")
in_progress("ROLLBACK")


# Worth another try soon.


@both("55000 busy with another session: again soon")
async def busy(place: Place, verb: str) -> None:
    async with prepared(place) as (participant, branch):
        async with missing_standby(place.url), place.session() as session:
            finish = f"{verb} PREPARED '{branch.xid}'"
            other = asyncio.create_task(session.execute(finish.encode()))
            await until(lambda: waiting(place.url))
            try:
                with pytest.raises(DatabaseUnavailable, match="55000"):
                    await end(participant, branch, verb)
            finally:
                await end_the_wait(place.url)
                await other
        await must_end(participant, branch, verb)


@both("42704 in five of six sessions that end it at once: done in all")
async def six_at_once(place: Place, verb: str) -> None:
    async with prepared(place) as (participant, branch):

        def attempt() -> Awaitable[Ending]:
            return until_ended(lambda: end(participant, branch, verb))

        endings = await asyncio.gather(*(attempt() for _ in range(6)))
        assert endings == [FINISHED] * 6


@both("53300 no connection left: again, for ever")
async def no_connection(place: Place, verb: str) -> None:
    with place.role() as url:
        async with prepared(place, url) as (participant, branch):
            query(place.url, "ALTER ROLE app CONNECTION LIMIT 0")
            await lose_sessions(place, participant, branch, verb)
            with pytest.raises(DatabaseUnavailable, match="too many connections"):
                await end(participant, branch, verb)
            query(place.url, "ALTER ROLE app CONNECTION LIMIT -1")
            await must_end(participant, branch, verb)


async def lose_sessions(place: Place, participant: PostgreSQL, branch: Branch, verb: str) -> None:
    """The next attempt finds its pooled session dead (57P01, 08xxx); then new ones are opened."""
    await place.end_sessions()
    with pytest.raises(DatabaseUnavailable):
        await end(participant, branch, verb)


@both("57P01 during it, and the answer lost: again soon, and then it is done")
async def terminated(place: Place, verb: str) -> None:
    async with prepared(place) as (participant, branch):
        async with missing_standby(place.url):
            ending = asyncio.ensure_future(end(participant, branch, verb))
            await end_the_wait(place.url, "pg_terminate_backend")
            with pytest.raises(DatabaseUnavailable):
                await ending
        assert not place.is_prepared(branch)
        await must_end(participant, branch, verb)


@both("57P03 and 08xxx, the server shuts down and is gone: again soon")
async def shut_down(place: Place, verb: str) -> None:
    async with prepared(place) as (participant, branch):
        await lose_sessions(place, participant, branch, verb)
        async with place.session():  # a smart shutdown waits for this session, and lets nobody in
            stopping = asyncio.create_task(asyncio.to_thread(place.server.stop, "smart"))
            await until(lambda: is_shutting_down(place.url))
            with pytest.raises(DatabaseUnavailable, match="shutting down"):
                await end(participant, branch, verb)
        await stopping
        with pytest.raises(DatabaseUnavailable, match="cannot be reached"):
            await end(participant, branch, verb)
        await asyncio.to_thread(place.server.start)
        assert place.is_prepared(branch)
        await must_end(participant, branch, verb)


def is_shutting_down(url: str) -> bool:
    try:
        query(url, "SELECT 1")
    except psycopg.OperationalError as error:
        return "shutting down" in str(error)
    return False


# Only a person can help.


@both("42501 not the owner: slowly, and the fix is named")
async def not_the_owner(place: Place, verb: str) -> None:
    async with prepared(place) as (participant, branch):
        with place.role() as url:
            async with place.participant(url) as stranger:
                with pytest.raises(ConfigurationError, match=r"42501.*the user who prepared it"):
                    await end(stranger, branch, verb)
        await must_end(participant, branch, verb)


@both("0A000 wrong database: slowly, and the fix is named")
async def wrong_database(place: Place, verb: str) -> None:
    async with prepared(place) as (participant, branch):
        async with place.participant(place.server.url()) as elsewhere:
            with pytest.raises(ConfigurationError, match=r"0A000.*branch's own database"):
                await end(elsewhere, branch, verb)
        await must_end(participant, branch, verb)


def refused_login(code: str, change: str, back: str, part: str) -> None:
    @both(f"{code} {part}: slowly, and the fix is named")
    async def row(place: Place, verb: str) -> None:
        with place.role() as url:
            async with prepared(place, url) as (participant, branch):
                query(place.url, f"ALTER ROLE app {change}")
                await lose_sessions(place, participant, branch, verb)
                with pytest.raises(ConfigurationError, match=f"{part}.*Mend the role"):
                    await end(participant, branch, verb)
                query(place.url, f"ALTER ROLE app {back}")
                await must_end(participant, branch, verb)


refused_login("28P01", "PASSWORD 'other'", "PASSWORD 'app'", "password authentication failed")
refused_login("28000", "NOLOGIN", "LOGIN", "not permitted to log in")


@both("3D000 no such database: slowly, and the fix is named")
async def no_such_database(place: Place, verb: str) -> None:
    """A database with a branch in it cannot be dropped: the url leads to another one."""
    gone = place.server.create_database("gone")
    async with prepared(place) as (participant, branch):
        elsewhere = PostgreSQL("accounts", gone)
        await elsewhere.open(binding())
        query(place.url, "DROP DATABASE gone WITH (FORCE)")
        try:
            with pytest.raises(DatabaseUnavailable):
                await end(elsewhere, branch, verb)
            with pytest.raises(ConfigurationError, match=r'"gone" does not exist.*Mend'):
                await end(elsewhere, branch, verb)
        finally:
            await elsewhere.close()
        await must_end(participant, branch, verb)
