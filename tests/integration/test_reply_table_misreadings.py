"""Every planted misreading of an answer is found by the row of the reply table that is named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coordinator.errors import TransactionError
from participants.postgres.replies import Meaning, Reply, read_commit, read_finish, read_prepare
from tests.integration.planted_misreadings import MISREADINGS
from tests.integration.reply_rows import PREPARE
from tests.integration.reply_rows_finish import FINISH
from tests.support.reply_place import SLOTS, Place
from tests.support.versions import server_of

ROWS = PREPARE.rows | FINISH.rows


@pytest.fixture(scope="module")
def shared_place() -> Iterator[Place]:
    with server_of(18, slots=SLOTS) as server:
        yield Place(server)


@pytest.mark.parametrize("name", list(MISREADINGS))
async def test_the_table_finds(
    shared_place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_place.clean()
    planted = MISREADINGS[name]
    monkeypatch.setattr(planted.function, planted.wrong)
    with pytest.raises((AssertionError, TransactionError, pytest.fail.Exception)):
        await ROWS[planted.row](shared_place)


def test_what_no_row_can_produce() -> None:
    assert read_prepare(Reply(tag="PREPARE TRANSACTION", connected=False)) is Meaning.IN_DOUBT
    assert read_prepare(Reply(sqlstate="53200", connected=False)) is Meaning.IN_DOUBT
    assert read_commit(Reply(tag="COMMIT", connected=False)) is Meaning.IN_DOUBT
    for verb in ("COMMIT PREPARED", "ROLLBACK PREPARED"):
        for sqlstate in ("40001", "40P01", "55P03", "53100", "53200", "58030"):
            assert read_finish(Reply(sqlstate=sqlstate), verb) is Meaning.SOON
        assert read_finish(Reply(sqlstate="42704", connected=False), verb) is Meaning.SOON


def test_tags_that_no_server_gives_are_bugs() -> None:
    assert read_prepare(Reply(tag="COMMIT")) is Meaning.BUG
    assert read_commit(Reply(tag="BEGIN")) is Meaning.BUG
    for verb in ("COMMIT PREPARED", "ROLLBACK PREPARED"):
        assert read_finish(Reply(tag="ROLLBACK"), verb) is Meaning.BUG
