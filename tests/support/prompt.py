"""What goes at once, without a task and in one exchange, asked for as the driver does it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from coordinator.model import Branch, Ending, Vote, Xid
from coordinator.participant import Send
from participants.postgres import PostgreSQL
from tests.support.postgres import query

IN_TIME = "SET lock_timeout = '5s';"
"""A test that has failed leaves branches behind, whose locks its cleaning must not wait for."""


async def answer_to(send: Send) -> Any:
    """Send the request and wait for its answer."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    send(answer.set_result)
    assert not answer.done(), "it was answered within the call"
    return await answer


async def vote_at_once(participant: PostgreSQL, branch: Branch) -> Vote | None:
    """The vote in one exchange, None if the branch does not go at once; raises as `prepare`."""
    send = participant.prepare_at_once(branch.xid)
    if send is None:
        return None
    answer: Vote | Exception = await answer_to(send)
    if isinstance(answer, Exception):
        raise answer
    return answer


class AtOnce(PostgreSQL):
    """Does at once what can be done so; `went` tells how often that was."""

    went = 0

    async def prepare(self, xid: Xid) -> Vote:
        vote = await vote_at_once(self, Branch(xid, self.name))
        if vote is None:
            return await super().prepare(xid)
        AtOnce.went += 1
        return vote

    async def commit(self, branch: Branch) -> Ending:
        send = self.commit_at_once(branch)
        ending = None if send is None else await answer_to(send)
        if ending is None:
            return await super().commit(branch)
        AtOnce.went += 1
        assert isinstance(ending, Ending)
        return ending


@contextmanager
def watched(participant: PostgreSQL) -> Iterator[list[bool]]:
    """Whether each vote that is asked for in the block goes at once."""
    went: list[bool] = []
    real = participant.prepare_at_once

    def prepare_at_once(xid: Xid) -> Send | None:
        send = real(xid)
        went.append(send is not None)
        return send

    participant.prepare_at_once = prepare_at_once  # type: ignore[method-assign]
    try:
        yield went
    finally:
        del participant.prepare_at_once  # type: ignore[method-assign]


def assert_at_rest(participant: PostgreSQL) -> None:
    """Nothing of any branch is left here: no work, no doubt, no slot, no connection that is out."""
    opened = participant._open
    assert opened is not None
    assert (opened.by_branch, opened.in_doubt, opened.slots._holders) == ({}, {}, {})
    assert opened.pool._slots == opened.pool.size and not opened.finisher._sent_to
    assert opened._entries == {} and opened._transactions == {}


@contextmanager
def other_role(database: str) -> Iterator[str]:
    """The url for the role `app`, which may become `tenant`, who owns nothing of it."""
    query(database, "CREATE ROLE app LOGIN PASSWORD 'app'")
    if not query(database, "SELECT 1 FROM pg_roles WHERE rolname = 'tenant'"):
        query(database, "CREATE ROLE tenant")
    query(database, "GRANT tenant TO app")
    query(database, "GRANT ALL ON account, entry TO app, tenant")
    parts = urlsplit(database)
    place = parts.netloc.rpartition("@")[2]
    try:
        yield urlunsplit(parts._replace(netloc=f"app:app@{place}"))
    finally:
        query(database, f"{IN_TIME} DROP OWNED BY app, tenant")
        query(database, "DROP ROLE app")
