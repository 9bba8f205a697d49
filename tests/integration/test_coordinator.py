"""`Coordinator` as a service author uses it, on real servers and a real log file."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import apsw
import pytest

from coordinator import (
    ConfigurationError,
    Coordinator,
    LogUnavailable,
    Settings,
    Status,
    TransactionAborted,
    TransactionError,
)
from coordinator.engine import now_ms
from coordinator.model import id_floor
from participants.postgres import PostgreSQL
from tests.support.postgres import gids, query

QUICK = Settings(timeout=10, timeout_max=20, retention=60, sweep_interval=0.05, beat_interval=0.05)


class Bank:
    """Two databases, a log file, and the coordinator of a service."""

    def __init__(self, log: str, accounts: str, ledger: str) -> None:
        self.urls = accounts, ledger
        self.accounts = PostgreSQL("accounts", accounts, pool_size=4)
        self.ledger = PostgreSQL("ledger", ledger, pool_size=4)
        self.coordinator = Coordinator(
            log, cluster="bank", participants=[self.accounts, self.ledger], settings=QUICK
        )

    async def take(self, amount: int, who: str = "alice") -> None:
        connection = await self.accounts.connection()
        await connection.execute(
            "UPDATE account SET balance = balance - %s WHERE id = %s", (amount, who)
        )

    async def give(self, amount: int, who: str = "alice") -> None:
        async with self.ledger.connection() as connection:
            await connection.execute(
                "UPDATE account SET balance = balance + %s WHERE id = %s", (amount, who)
            )

    def balances(self, who: str = "alice") -> tuple[object, object]:
        statement = f"SELECT balance FROM account WHERE id = '{who}'"
        return tuple(query(url, statement)[0][0] for url in self.urls)  # type: ignore[return-value]

    def in_doubt(self) -> list[str]:
        return [gid for url in self.urls for gid in gids(url)]


@pytest.fixture
def log_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'log.db'}"


@pytest.fixture
def bank(log_url: str, database: str, second_database: str) -> Bank:
    return Bank(log_url, database, second_database)


async def test_both_databases_commit_and_the_log_says_so(bank: Bank) -> None:
    async with bank.coordinator as coordinator, coordinator.transaction() as transaction:
        await bank.take(30)
        await bank.give(30)
        known = transaction.id
    async with bank.coordinator as coordinator:
        assert await coordinator.status(known) is Status.COMMITTED
        assert await coordinator.abort(known) is Status.COMMITTED
    assert bank.balances() == (70, 130)
    assert bank.in_doubt() == []


async def test_an_exception_leaves_both_as_they_were(bank: Bank) -> None:
    @bank.coordinator.transactional(timeout=5)
    async def transfer(amount: int) -> None:
        await bank.take(amount)
        await bank.give(amount)
        raise ValueError("changed my mind")

    async with bank.coordinator:
        with pytest.raises(ValueError, match="changed my mind"):
            await transfer(30)
    assert bank.balances() == (100, 100)


async def test_a_constraint_of_one_database_aborts_both(bank: Bank) -> None:
    @bank.coordinator.transactional
    async def transfer() -> None:
        await bank.give(30)
        connection = await bank.accounts.connection()
        await connection.execute("INSERT INTO entry (note) VALUES ('twice'), ('twice')")

    async with bank.coordinator:
        with pytest.raises(TransactionAborted, match="23505"):
            await transfer()
    assert bank.balances() == (100, 100)
    assert bank.in_doubt() == []


async def test_a_decorated_function_keeps_its_result_and_nested_ones_join(bank: Bank) -> None:
    @bank.coordinator.transactional
    async def take(amount: int) -> int:
        await bank.take(amount)
        return amount

    @bank.coordinator.transactional
    async def transfer(amount: int) -> int:
        taken = await take(amount)
        await bank.give(taken)
        return taken

    async with bank.coordinator:
        assert await transfer(10) == 10
    assert bank.balances() == (90, 110)


async def test_concurrent_tasks_share_the_branch_and_transactions_do_not(bank: Bank) -> None:
    @bank.coordinator.transactional
    async def transfer(who: str) -> None:
        await asyncio.gather(bank.take(1, who), bank.give(1, who), bank.take(1, who))

    async with bank.coordinator:
        await asyncio.gather(transfer("alice"), transfer("bob"))
    assert bank.balances("alice") == (98, 101)
    assert bank.balances("bob") == (98, 101)


async def test_an_undecided_transaction_can_be_ended_by_its_id(bank: Bank) -> None:
    async with bank.coordinator as coordinator:
        with pytest.raises(TransactionAborted, match="recorded an abort first"):
            async with coordinator.transaction() as transaction:
                await bank.take(30)
                assert await coordinator.status(transaction.id) is Status.UNDECIDED
                assert await coordinator.abort(transaction.id) is Status.ABORTED
    assert bank.balances() == (100, 100)


async def test_what_is_older_than_the_log_reads_forgotten(bank: Bank) -> None:
    async with bank.coordinator as coordinator:
        ancient = id_floor(now_ms() - 86_400_000)
        assert await coordinator.status(ancient) is Status.FORGOTTEN
        assert await coordinator.abort(ancient) is Status.FORGOTTEN
        with pytest.raises(ValueError, match="is not a transaction id"):
            await coordinator.status("order-42")


async def test_the_running_sweep_ends_an_orphan_by_itself(bank: Bank) -> None:
    async with bank.coordinator as coordinator:
        engine = coordinator.engine()
        orphan = f"sp:{engine.identity.id}:{'d' * 16}:{id_floor(now_ms())}:{'0' * 16}"
        foreign = orphan.replace(engine.identity.id, "f" * 16)
        for gid in (orphan, foreign):
            query(bank.urls[0], f"BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION '{gid}'")
        async with asyncio.timeout(10):
            while orphan in bank.in_doubt():
                await asyncio.sleep(0.01)
        assert bank.in_doubt() == [foreign]
    query(bank.urls[0], f"ROLLBACK PREPARED '{foreign}'")


async def test_it_can_be_opened_again_on_another_loop_but_not_used_from_there(bank: Bank) -> None:
    def open_elsewhere() -> None:
        async def use() -> None:
            with pytest.raises(TransactionError, match="another event loop"):
                async with bank.coordinator.transaction():
                    pass

        asyncio.run(use())

    async with bank.coordinator:
        await asyncio.to_thread(open_elsewhere)

    def transfer_elsewhere() -> None:
        async def transfer() -> None:
            async with bank.coordinator as coordinator, coordinator.transaction():
                await bank.take(5)
                await bank.give(5)

        asyncio.run(transfer())

    await asyncio.to_thread(transfer_elsewhere)
    await asyncio.to_thread(transfer_elsewhere)
    assert bank.balances() == (90, 110)


def test_a_loop_that_ended_without_closing_it_does_not_keep_it(bank: Bank) -> None:
    """As in test suites with a loop for each test, whose fixtures forget to close."""

    async def open_only() -> None:
        await bank.coordinator.open()

    async def use() -> None:
        with pytest.raises(TransactionError, match="has ended"):
            await bank.coordinator.status("0199c82c-be12-7003-8000-000000000003")
        async with bank.coordinator as coordinator, coordinator.transaction():
            await bank.take(30)
            await bank.give(30)

    asyncio.run(open_only())
    asyncio.run(use())
    assert bank.balances() == (70, 130)
    asyncio.run(open_only())
    with bank.coordinator.blocking, bank.coordinator.blocking.transaction():
        bank.accounts.blocking.connection().execute("UPDATE account SET balance = 1")
    assert bank.balances()[0] == 1


async def test_closed_it_says_how_to_use_it(bank: Bank) -> None:
    with pytest.raises(TransactionError, match="async with coordinator"):
        async with bank.coordinator.transaction():
            pass
    async with bank.coordinator:
        with pytest.raises(TransactionError, match="open already"):
            await bank.coordinator.open()
    await bank.coordinator.close()


async def test_after_a_fork_the_child_is_told_to_open_its_own() -> None:
    coordinator = Coordinator("memory:", cluster="bank", settings=QUICK)
    async with coordinator:
        coordinator._process = os.getppid()
        with pytest.raises(TransactionError, match="before a fork"):
            async with coordinator.transaction():
                pass


async def test_one_database_under_two_names_is_refused(log_url: str, database: str) -> None:
    twice = [PostgreSQL("accounts", database), PostgreSQL("ledger", database)]
    coordinator = Coordinator(log_url, cluster="bank", participants=twice)
    with pytest.raises(ConfigurationError, match="'accounts' and 'ledger' are one resource"):
        await coordinator.open()
    assert repr(coordinator) == "<Coordinator bank closed: accounts, ledger>"


def test_two_participants_of_one_name_are_refused(database: str) -> None:
    twice = [PostgreSQL("accounts", database), PostgreSQL("accounts", database)]
    with pytest.raises(ConfigurationError, match="two participants are named 'accounts'"):
        Coordinator("memory:", cluster="bank", participants=twice)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log": "etcd://a:2379/shop"}, "not built"),
        ({"log": "sqlite://file.db"}, "sqlite:///"),
        ({"log": "postgres://db"}, "no log of the kind postgres"),
        ({"cluster": "  "}, "cluster is empty"),
        ({"settings": Settings(timeout=400)}, "timeout is 400 s, above timeout_max"),
        ({"settings": Settings(retention=600)}, "more than twice timeout_max"),
        ({"settings": Settings(sweep_interval=0)}, "sweep_interval is 0"),
    ],
)
def test_wrong_arguments_are_answered_at_once(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Coordinator(**{"log": "memory:", "cluster": "bank", **arguments})  # type: ignore[arg-type]


def test_a_deadline_beyond_the_longest_one_is_refused() -> None:
    coordinator = Coordinator("memory:", cluster="bank")
    with pytest.raises(ConfigurationError, match="timeout is 1000"):
        coordinator.transaction(timeout=1000)


async def test_a_record_that_cannot_be_read_parks_its_own_transaction_only(
    bank: Bank, tmp_path: Path
) -> None:
    async with bank.coordinator as coordinator, coordinator.transaction() as transaction:
        await bank.take(1)
        await bank.give(1)
        damaged = transaction.id
    connection = apsw.Connection(str(tmp_path / "log.db"))
    connection.execute("UPDATE record SET decision = x'ff00ff', unfinished = 1")
    connection.close()
    async with bank.coordinator as coordinator:
        report = await coordinator.recover()
        assert list(report.unreadable) == [damaged] and not report.clean
        with pytest.raises(LogUnavailable, match=damaged):
            await coordinator.status(damaged)
        async with coordinator.transaction():
            await bank.take(1)
            await bank.give(1)
    assert bank.balances() == (98, 102)


async def test_several_coordinators_share_one_log_file(
    log_url: str, database: str, second_database: str
) -> None:
    banks = [Bank(log_url, database, second_database) for _ in range(3)]

    async def transfer(bank: Bank) -> None:
        async with bank.coordinator.transaction():
            await bank.take(1)
            await bank.give(1)

    async with banks[0].coordinator, banks[1].coordinator, banks[2].coordinator:
        await asyncio.gather(*(transfer(bank) for bank in banks for _ in range(10)))
        identities = {bank.coordinator.engine().identity for bank in banks}
        alive = await banks[0].coordinator.engine().members.alive()
    assert len(identities) == 1 and len(alive) == 3
    assert banks[0].balances() == (70, 130)


async def test_a_configuration_file_builds_the_same(
    tmp_path: Path, database: str, second_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ledger-url").write_text(second_database + "\n")
    monkeypatch.setenv("ACCOUNTS_URL", database)
    file = tmp_path / "syncpoint.toml"
    file.write_text(
        f"""
        cluster = "bank"
        log = "sqlite:///{tmp_path / "log.db"}"
        [participants.accounts]
        kind = "postgresql"
        url = "${{ACCOUNTS_URL}}"
        pool_size = 3
        [participants.ledger]
        kind = "postgresql"
        url = "file:ledger-url"
        [settings]
        retention = 1200
        """
    )
    coordinator = Coordinator.from_config(file)
    assert coordinator.settings.retention == 1200
    async with coordinator:
        assert (await coordinator.recover()).clean


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster = ", "Invalid value"),
        ("cluster = 'c'\nlog = 7", "log is 7: give a text"),
        ("log = 'memory:'", "cluster is None"),
        ("cluster = 'c'\nlog = 'memory:'\nlogs = 1", "unknown key 'logs'"),
        ("cluster = 'c'\nlog = '${NOWHERE}'", "log: the environment has no variable NOWHERE"),
        ("cluster = 'c'\nlog = 'file:none'", "log: the secret"),
        ("cluster = 'c'\nlog = 'memory:'\n[settings]\ntimeuot = 3", "timeuot"),
        ("cluster = 'c'\nlog = 'memory:'\n[participants.a]\nurl = 'x'", "a: name its kind"),
        (
            "cluster = 'c'\nlog = 'memory:'\n[participants.a]\nkind = 'mysql'",
            "unknown kind 'mysql': there are",
        ),
        (
            "cluster = 'c'\nlog = 'memory:'\n[participants.a]\nkind = 'postgresql'\nuri = 'x'",
            "uri",
        ),
    ],
)
def test_a_wrong_configuration_names_the_file_and_the_field(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "syncpoint.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(message)) as raised:
        Coordinator.from_config(file)
    assert str(file) in str(raised.value)


def test_a_missing_configuration_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such file"):
        Coordinator.from_config(tmp_path / "syncpoint.toml")
