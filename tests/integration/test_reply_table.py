"""Every row of the reply table, on the oldest version and on the newest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.reply_rows import PREPARE
from tests.integration.reply_rows_finish import FINISH
from tests.support.reply_place import SLOTS, Place
from tests.support.versions import server_of


@pytest.fixture(scope="module", params=[13, 18])
def shared_place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with server_of(request.param, slots=SLOTS) as server:
        yield Place(server)


@pytest.fixture
def place(shared_place: Place) -> Place:
    shared_place.clean()
    return shared_place


@pytest.mark.parametrize("name", list(PREPARE.rows))
async def test_to_prepare(place: Place, name: str) -> None:
    await PREPARE.rows[name](place)


@pytest.mark.parametrize("name", list(FINISH.rows))
async def test_to_finish(place: Place, name: str) -> None:
    await FINISH.rows[name](place)
