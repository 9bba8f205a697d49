"""Which sessions a prepared branch holds up: the lock waiters, and those in the queue behind them.

Read from `pg_prepared_xacts`, `pg_locks` and `pg_stat_activity`, with the rights of any role. The
locks of a prepared branch belong to no process, so they are found by the lock that it has on its
own transaction number: a session that waits for a row of it waits for that very lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec
import psycopg

from coordinator.errors import one_line
from coordinator.model import Branch, BranchId
from coordinator.participant import Waiter
from participants.postgres.location import Location
from participants.postgres.observation import connect
from participants.postgres.replies import DatabaseUnavailable

ANSWER_SECONDS_MAX = 5.0
QUERY_CHARACTERS_MAX = 120

# `waitstart` is of version 14; before it the age of the statement has to do.
_QUEUE = """
WITH locks AS MATERIALIZED (SELECT * FROM pg_locks),
branches AS (
    SELECT prepared.gid, own.virtualtransaction
    FROM pg_prepared_xacts AS prepared JOIN locks AS own
    ON own.locktype = 'transactionid' AND own.transactionid = prepared.transaction
    AND own.granted AND own.pid IS NULL
    WHERE prepared.database = current_database() AND prepared.gid = ANY(%s)
)
SELECT waiter.pid AS session,
       waiter.mode,
       pg_blocking_pids(waiter.pid) AS blockers,
       extract(epoch FROM clock_timestamp() - coalesce(
           (to_jsonb(waiter) ->> 'waitstart')::timestamptz, activity.query_start))::float8
           AS seconds,
       coalesce(activity.query, '') AS query,
       ARRAY(
           SELECT ARRAY[branches.gid, held.mode]
           FROM branches JOIN locks AS held USING (virtualtransaction)
           WHERE held.granted AND held.pid IS NULL
           AND (held.locktype, held.database, held.relation, held.page, held.tuple,
                held.transactionid, held.classid, held.objid, held.objsubid)
           IS NOT DISTINCT FROM
               (waiter.locktype, waiter.database, waiter.relation, waiter.page, waiter.tuple,
                waiter.transactionid, waiter.classid, waiter.objid, waiter.objsubid)
       ) AS held
FROM locks AS waiter LEFT JOIN pg_stat_activity AS activity USING (pid)
WHERE NOT waiter.granted AND waiter.pid IS NOT NULL
"""

_HIDDEN = "<insufficient privilege>"
_HIDDEN_NOTE = "its query is shown to its own role, to pg_read_all_stats and to superusers"

# What conflicts with what, from PostgreSQL's table of lock modes; the relation is symmetric.
_MODES = (
    "AccessShareLock",
    "RowShareLock",
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
)
_CONFLICTS = ("7", "67", "4567", "34567", "23567", "234567", "1234567", "01234567")


class Queued(msgspec.Struct, frozen=True):
    """One session that waits for a lock; `held` are the locks of branches on the same thing."""

    session: int
    mode: str
    blockers: Sequence[int]
    seconds: float | None
    query: str
    held: Sequence[tuple[str, str]] = ()


async def who_waits(name: str, location: Location, branches: Collection[Branch]) -> list[Waiter]:
    """See `ShowsWaiters.waiting`. Raises `DatabaseUnavailable`."""
    gids = {str(branch.xid): branch.id for branch in branches}
    try:
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            connection = await connect(location)
            try:
                cursor = await connection.execute(_QUEUE.encode(), [list(gids)])
                queue = msgspec.convert(await cursor.fetchall(), list[Queued])
            finally:
                await connection.close()
    except psycopg.Error as error:
        why = location.for_people(str(error))
        raise DatabaseUnavailable(f"{name} does not tell who waits: {why}") from error
    except TimeoutError as error:
        raise DatabaseUnavailable(f"{name} does not answer") from error
    waiters = [waiter for gid, branch in gids.items() for waiter in _line(queue, gid, branch)]
    return sorted(waiters, key=lambda each: -(each.seconds or 0))


def _line(queue: Sequence[Queued], gid: str, branch: BranchId) -> Iterator[Waiter]:
    """Who waits for the branch, then who waits for one of those, and so on."""
    before: Mapping[int, int | None] = {
        each.session: None for each in queue if _holds_up(gid, each)
    }
    seen: dict[int, int | None] = {}
    while before:
        seen |= before
        before = {
            each.session: next(b for b in each.blockers if b in before)
            for each in queue
            if each.session not in seen and before.keys() & set(each.blockers)
        }
    for each in queue:
        if each.session in seen:
            hidden = each.query == _HIDDEN
            yield Waiter(
                branch,
                each.session,
                each.seconds,
                "" if hidden else _shortened(each.query),
                seen[each.session],
                _HIDDEN_NOTE if hidden else "",
            )


def _holds_up(gid: str, waiter: Queued) -> bool:
    return any(holder == gid and _conflict(mode, waiter.mode) for holder, mode in waiter.held)


def _conflict(held: str, wanted: str) -> bool:
    if held not in _MODES or wanted not in _MODES:
        return False  # a predicate lock, which nobody waits for
    return str(_MODES.index(wanted)) in _CONFLICTS[_MODES.index(held)]


def _shortened(query: str) -> str:
    line = one_line(query)
    return line if len(line) <= QUERY_CHARACTERS_MAX else line[: QUERY_CHARACTERS_MAX - 1] + "…"
