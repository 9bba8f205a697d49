"""A service's whole way on older versions: commit, abort, and recovery after a crash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from coordinator import Status, TransactionAborted, TransactionError
from participants.postgres.embedded import EmbeddedServer
from tests.support.copies import once_at
from tests.support.lasting_bank import LastingBank
from tests.support.postgres import new_database
from tests.support.versions import server_of


@pytest.fixture(scope="module", params=[13, 15])
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    with server_of(request.param) as server:
        yield server


@pytest.fixture
def bank(tmp_path: Path, server: EmbeddedServer) -> LastingBank:
    return LastingBank(tmp_path, new_database(server), new_database(server))


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


async def test_both_databases_commit(bank: LastingBank) -> None:
    async with bank.coordinator as coordinator:
        assert await coordinator.status(await bank.transfer()) is Status.COMMITTED
    assert bank.balances() == (70, 130) and bank.in_doubt() == []


async def test_a_constraint_of_one_aborts_both(bank: LastingBank) -> None:
    async with bank.coordinator as coordinator:
        with pytest.raises(TransactionAborted, match="23505"):
            async with coordinator.transaction():
                accounts, ledger = [await each.connection() for each in bank.participants]
                await accounts.execute("UPDATE account SET balance = 0 WHERE id = 'alice'")
                await ledger.execute("INSERT INTO entry (note) VALUES ('x'), ('x')")
    assert bank.balances() == (100, 100) and bank.in_doubt() == []


@pytest.mark.parametrize(
    ("point", "balances"), [("decide:before", (100, 100)), ("commit:before", (70, 130))]
)
async def test_what_a_crash_left_is_recovered(
    bank: LastingBank, tmp_path: Path, point: str, balances: tuple[int, int]
) -> None:
    await bank.coordinator.open(sweep=False)
    try:
        with once_at(point, crash) as reached, suppress(TransactionError):
            await bank.transfer()
        assert reached and bank.in_doubt()
    finally:
        await bank.coordinator.close()
    successor = LastingBank(tmp_path, *bank.urls)
    await successor.coordinator.open(sweep=False)
    try:
        assert (await successor.coordinator.recover()).clean
        assert await successor.incidents() == []
    finally:
        await successor.coordinator.close()
    assert successor.balances() == balances and successor.in_doubt() == []
