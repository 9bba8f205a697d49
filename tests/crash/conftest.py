"""The place of the crash tests: two servers of their own, which are killed and paused at will."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.nursery import Nursery
from tests.crash.place import Place, two_servers


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("crash")
    with two_servers() as servers, Nursery(folder) as nursery:
        yield Place(servers, nursery, folder)
