"""The reply table to PREPARE TRANSACTION, and to the COMMIT of one phase, row by row.

A row makes a live server give the answer and asserts what the participant makes of it. Errors that
need a broken machine, such as a full disk, are raised by a trigger at the end of the transaction:
to the protocol the answer is the same, an error on a connection that lives.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import pytest

from coordinator.errors import ConfigurationError, ProtocolError, TransactionAborted
from coordinator.model import FINISHED, Branch, Verdict, VoteKind
from participants.postgres import DatabaseUnavailable, PostgreSQL, work
from participants.postgres.replies import Meaning
from tests.support.branches import (
    UPDATE,
    end_the_wait,
    missing_standby,
    until,
    until_ended,
    vote_after,
    waiting,
    working,
)
from tests.support.branches import work as begun
from tests.support.postgres import query
from tests.support.reply_place import SLOTS, Place, Table

PREPARE = Table()

INSERT = "INSERT INTO entry DEFAULT VALUES"
SERIALIZABLE = "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"


async def must_refuse(
    place: Place, part: str, *statements: str, retryable: bool, **options: float
) -> None:
    """Asked for its vote, the participant says no with this in the reason, and nothing stays."""
    async with place.participant(**options) as participant:
        branch, vote = await vote_after(participant, *statements)
        assert vote.kind is VoteKind.ABORTED, vote
        assert part in vote.reason and vote.retryable is retryable, vote
        assert not place.is_prepared(branch)
        assert await participant.rollback(branch) == FINISHED
        again, vote = await vote_after(participant, UPDATE)  # the session is clean for the next
        assert vote.kind is VoteKind.PREPARED, vote
        assert await participant.rollback(again) == FINISHED
    assert place.balance() == 100


@PREPARE.row("success tag: yes")
async def success(place: Place) -> None:
    async with place.participant() as participant:
        branch, vote = await vote_after(participant, UPDATE)
        assert vote.kind is VoteKind.PREPARED, vote
        assert place.is_prepared(branch) and place.balance() == 100


@PREPARE.row("success tag with warning 01000: no")
async def warning(place: Place) -> None:
    async with place.participant() as participant:
        # The user's own weaker setting does not stand.
        branch = await begun(participant, "SET LOCAL synchronous_commit = off", UPDATE)
        async with missing_standby(place.url):
            voting = asyncio.create_task(participant.prepare(branch.xid))
            await end_the_wait(place.url)
            vote = await voting
            assert vote.kind is VoteKind.ABORTED, vote
            assert vote.retryable and "standby" in vote.reason
            assert place.is_prepared(branch)  # here, and nowhere else
            ending = asyncio.create_task(participant.rollback(branch))
            await end_the_wait(place.url)
            assert await ending == FINISHED
        assert not place.is_prepared(branch)


@PREPARE.row("success tag with a warning 01000 of the user's own: yes")
async def users_warning(place: Place) -> None:
    query(
        place.url,
        "CREATE OR REPLACE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE WARNING 'mine'; RETURN NULL; END $$; "
        "CREATE CONSTRAINT TRIGGER warns AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION warn()",
    )
    async with place.participant() as participant:
        branch, vote = await vote_after(participant, INSERT)
        assert vote.kind is VoteKind.PREPARED, vote
        assert await participant.rollback(branch) == FINISHED


@PREPARE.row("tag ROLLBACK in a failed transaction: no")
async def failed_transaction(place: Place) -> None:
    reply = await place.ask("BEGIN", UPDATE, "SELECT 1/0", "PREPARE TRANSACTION 'failed'")
    assert reply.tag == "ROLLBACK" and not reply.sqlstate
    assert work.read_prepare(reply) is Meaning.NO


@PREPARE.row("tag ROLLBACK outside a transaction: no")
async def no_transaction(place: Place) -> None:
    reply = await place.ask("PREPARE TRANSACTION 'nothing'")
    assert reply.tag == "ROLLBACK" and not reply.sqlstate
    assert work.read_prepare(reply) is Meaning.NO


@PREPARE.row("42710 duplicate gid: a bug")
async def duplicate(place: Place) -> None:
    async with place.participant() as participant:
        branch = await begun(participant)
        query(place.url, f"BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION '{branch.xid}'")
        with pytest.raises(ProtocolError, match="42710"):
            await participant.prepare(branch.xid)


@PREPARE.row("40001 at PREPARE: no")
async def serialization(place: Place) -> None:
    read = "SELECT sum(balance) FROM account"
    async with place.participant() as participant:
        async with working(participant) as (first, one):
            await one.execute(SERIALIZABLE.encode())
            await one.execute(read.encode())
        async with working(participant) as (second, other):
            await other.execute(SERIALIZABLE.encode())
            await other.execute(read.encode())
            await other.execute("UPDATE account SET balance = 1 WHERE id = 'bob'")
        await one.execute("UPDATE account SET balance = 1 WHERE id = 'alice'")
        votes = [await participant.prepare(each.branch.xid) for each in (first, second)]
        no = [vote for vote in votes if vote.kind is VoteKind.ABORTED]
        assert len(no) == 1 and no[0].retryable and "40001" in no[0].reason, votes


@PREPARE.row("55P03 lock not had at PREPARE: no")
async def lock_at_prepare(place: Place) -> None:
    """The deferred check of a foreign key waits for the row that it refers to."""
    query(
        place.url,
        "ALTER TABLE entry ADD COLUMN owner text REFERENCES account DEFERRABLE INITIALLY DEFERRED",
    )
    async with place.session() as session, session.transaction():
        await session.execute("SELECT 1 FROM account WHERE id = 'bob' FOR UPDATE")
        await must_refuse(
            place, "55P03", "INSERT INTO entry (owner) VALUES ('bob')",
            retryable=True, lock_timeout=0.05,
        )  # fmt: skip


@PREPARE.row("23xxx deferred constraint: no, with the reason")
async def deferred(place: Place) -> None:
    twice = "INSERT INTO entry (note) VALUES ('x'), ('x')"
    await must_refuse(place, "23505", twice, retryable=False)


def unsupported(name: str, *statements: str) -> None:
    @PREPARE.row(f"0A000 {name}: no, with the reason")
    async def refused(place: Place) -> None:
        await must_refuse(place, "0A000", *statements, retryable=False)


unsupported("temporary table", "CREATE TEMPORARY TABLE t (n int)")
unsupported("LISTEN", INSERT, "LISTEN news")
unsupported("NOTIFY", INSERT, "NOTIFY news")
unsupported("hold cursor", INSERT, "DECLARE c CURSOR WITH HOLD FOR SELECT 1")


@PREPARE.row("22023 gid too long: no")
async def too_long(place: Place) -> None:
    async def prepare(bytes_: int) -> Meaning:
        gid = "x" * bytes_
        reply = await place.ask("BEGIN", UPDATE, f"PREPARE TRANSACTION '{gid}'")
        assert reply.sqlstate == ("22023" if bytes_ > 199 else "")
        return work.read_prepare(reply)

    assert await prepare(200) is Meaning.NO
    assert await prepare(199) is Meaning.DONE


@PREPARE.row("25P02 in a failed transaction: no, with the error that was swallowed")
async def swallowed(place: Place) -> None:
    async with place.participant() as participant:
        async with working(participant) as (transaction, connection):
            for error in ("23514", "25P02"):
                with pytest.raises(psycopg.Error) as raised:
                    await connection.execute("UPDATE account SET balance = -1 WHERE id = 'bob'")
                assert raised.value.sqlstate == error, raised.value
        vote = await participant.prepare(transaction.branch.xid)
        assert vote.kind is VoteKind.ABORTED and not vote.retryable
        assert "swallowed" in vote.reason and "account_balance_check" in vote.reason
    assert place.balance() == 100


def raised_at_prepare(sqlstate: str, what: str, *, retryable: bool) -> None:
    @PREPARE.row(f"{sqlstate} {what}, connection alive: no")
    async def refused(place: Place) -> None:
        fails = f"INSERT INTO failing VALUES ('{sqlstate}')"
        await must_refuse(place, sqlstate, UPDATE, fails, retryable=retryable)


raised_at_prepare("55000", "busy", retryable=True)
raised_at_prepare("55P03", "lock", retryable=True)
raised_at_prepare("40P01", "deadlock", retryable=True)
raised_at_prepare("53200", "out of memory", retryable=True)
raised_at_prepare("53300", "too many connections", retryable=True)
raised_at_prepare("53100", "disk full", retryable=True)
raised_at_prepare("58030", "I/O error", retryable=True)
raised_at_prepare("08006", "connection failure", retryable=True)
raised_at_prepare("57014", "cancelled", retryable=True)
raised_at_prepare("42501", "privilege", retryable=False)
raised_at_prepare("0A000", "not supported", retryable=False)
raised_at_prepare("28000", "authorization", retryable=False)
raised_at_prepare("3D000", "no such database", retryable=False)


@PREPARE.row("53200 no slot left: no")
async def no_slot(place: Place) -> None:
    for number in range(SLOTS):
        query(place.url, f"BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION 's{number}'")
    async with place.participant() as participant:
        branch, vote = await vote_after(participant, UPDATE)
        assert vote.kind is VoteKind.ABORTED and vote.retryable and "53200" in vote.reason
        query(place.url, "ROLLBACK PREPARED 's0'")
        branch, vote = await vote_after(participant, UPDATE)
        assert vote.kind is VoteKind.PREPARED, vote
        assert await participant.rollback(branch) == FINISHED


@PREPARE.row("53300 no connection left: nothing began")
async def no_connection(place: Place) -> None:
    with place.role() as url:
        async with place.participant(url) as participant:
            query(place.url, "ALTER ROLE app CONNECTION LIMIT 0")
            await place.end_sessions()
            with pytest.raises(TransactionAborted, match="too many connections") as raised:
                await begun(participant)
            assert raised.value.retryable


@asynccontextmanager
async def in_doubt(place: Place) -> AsyncIterator[tuple[PostgreSQL, Branch]]:
    """The block makes the answer to PREPARE, which waits for a standby, get lost."""
    async with place.participant() as participant:
        branch = await begun(participant)
        async with missing_standby(place.url):
            voting = asyncio.create_task(participant.prepare(branch.xid))
            await until(lambda: waiting(place.url))
            yield participant, branch
            with pytest.raises(DatabaseUnavailable, match="lost while it prepared"):
                await voting
        assert place.is_prepared(branch)
        assert await until_ended(lambda: participant.rollback(branch)) == FINISHED
        assert not place.is_prepared(branch) and place.balance() == 100


@PREPARE.row("57P01 during PREPARE: in doubt, the branch is prepared")
async def terminated(place: Place) -> None:
    async with in_doubt(place):
        await end_the_wait(place.url, "pg_terminate_backend")


@PREPARE.row("57P02 another backend crashed during PREPARE: in doubt, the branch is prepared")
async def server_crashed(place: Place) -> None:
    async with in_doubt(place):
        with psycopg.connect(place.url) as victim:
            os.kill(victim.info.backend_pid, signal.SIGKILL)
            with pytest.raises(psycopg.OperationalError):
                victim.execute("SELECT pg_sleep(10)")
        await until(lambda: is_up(place.url))


def is_up(url: str) -> bool:
    try:
        query(url, "SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


@PREPARE.row("57P01 raised on a connection that lives: in doubt all the same")
async def terminated_but_alive(place: Place) -> None:
    async with place.participant() as participant:
        branch = await begun(participant, UPDATE, "INSERT INTO failing VALUES ('57P01')")
        with pytest.raises(DatabaseUnavailable, match="57P01"):
            await participant.prepare(branch.xid)
        assert await until_ended(lambda: participant.rollback(branch)) == FINISHED


@PREPARE.row("55000 prepared transactions are disabled: refused at registration")
async def disabled(place: Place) -> None:
    await restart_with(place, 0)
    try:
        with pytest.raises(ConfigurationError, match="max_prepared_transactions is 0"):
            async with place.participant():
                pass
        reply = await place.ask("BEGIN", UPDATE, "PREPARE TRANSACTION 'disabled'")
        assert reply.sqlstate == "55000" and work.read_prepare(reply) is Meaning.NO
    finally:
        await restart_with(place, SLOTS)


async def restart_with(place: Place, slots: int) -> None:
    query(place.url, f"ALTER SYSTEM SET max_prepared_transactions = {slots}")
    await asyncio.to_thread(place.server.stop)
    await asyncio.to_thread(place.server.start)


@PREPARE.row("one phase, success tag: committed")
async def one_phase(place: Place) -> None:
    async with place.participant() as participant:
        branch = await begun(participant)
        assert (await participant.commit_one_phase(branch))[0] is Verdict.COMMIT
    assert place.balance() == 99


@PREPARE.row("one phase, 23xxx: aborted")
async def one_phase_refused(place: Place) -> None:
    async with place.participant() as participant:
        branch = await begun(participant, UPDATE, "INSERT INTO entry (note) VALUES ('x'), ('x')")
        verdict, reason, retryable = await participant.commit_one_phase(branch)
        assert verdict is Verdict.ABORT and "23505" in reason and not retryable
    assert place.balance() == 100


@PREPARE.row("one phase, 57P01 during COMMIT: the server is asked how it ended")
async def one_phase_lost(place: Place) -> None:
    async with place.participant() as participant:
        branch = await begun(participant)
        async with missing_standby(place.url):
            ending = asyncio.create_task(participant.commit_one_phase(branch))
            await end_the_wait(place.url, "pg_terminate_backend")
            verdict, _, _ = await ending
        assert verdict is Verdict.COMMIT
    assert place.balance() == 99
