"""The reply table once more: what goes at once reads every answer as the waiting way does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coordinator.model import FINISHED, Branch, VoteKind
from tests.integration.reply_rows import PREPARE
from tests.integration.reply_rows_finish import FINISH
from tests.support.branches import UPDATE, work
from tests.support.postgres import query
from tests.support.prompt import AtOnce, vote_at_once
from tests.support.reply_place import SLOTS, Place
from tests.support.versions import server_of

SETTLED = ("COMMIT: success", "COMMIT: 42704")  # the others are for whoever repeats it
ROWS = PREPARE.rows | {n: row for n, row in FINISH.rows.items() if n.startswith(SETTLED)}


@pytest.fixture(scope="module")
def shared_place() -> Iterator[Place]:
    with server_of(13, slots=SLOTS) as server:
        yield Place(server)


@pytest.fixture
def place(shared_place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr("tests.support.reply_place.PostgreSQL", AtOnce)
    shared_place.clean()
    return shared_place


@pytest.mark.parametrize("name", ROWS)
async def test_at_once(place: Place, name: str) -> None:
    await ROWS[name](place)


def test_most_of_the_table_went_at_once() -> None:
    assert AtOnce.went >= 20


SEE = """
CREATE TABLE seen (who text);
CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO seen VALUES (current_user); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER see AFTER UPDATE ON account
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION see();
CREATE ROLE tenant;
GRANT ALL ON account, seen TO tenant;
"""


async def test_deferred_work_is_done_as_the_role_that_caused_it(place: Place) -> None:
    """And the branch belongs to the role that logged in, who alone can be relied on to end it.

    Since version 18 the server sees to the first by itself.
    """
    query(place.url, SEE)
    async with place.participant() as participant:
        branch = await work(participant, "SET ROLE tenant", UPDATE)
        vote = await vote_at_once(participant, branch)
        assert vote is not None and vote.kind is VoteKind.PREPARED, vote
        assert query(place.url, "SELECT owner FROM pg_prepared_xacts") == [("postgres",)]
        assert await participant.commit(Branch(branch.xid, "accounts", vote.token)) == FINISHED
    assert query(place.url, "SELECT who FROM seen") == [("tenant",)]
    query(place.url, "DROP TABLE seen; DROP OWNED BY tenant; DROP ROLE tenant")
