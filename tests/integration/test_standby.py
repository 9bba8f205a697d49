"""A primary with a standby that is lost or promoted while a branch is in doubt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator import HeuristicOutcome, Status, TransactionAborted
from coordinator.model import EndingKind, Outcome
from participants.postgres.embedded import EmbeddedServer
from tests.support.branches import end_the_wait, until, waiting
from tests.support.copies import STANDBY, UNSAFE_BUT_QUICK, Standby, once_at
from tests.support.lasting_bank import LastingBank
from tests.support.postgres import DATABASE, clean_database, gids, query


class Pair:
    """A primary and its standby, and a bank whose `accounts` are wherever the primary is."""

    def __init__(self, primary: EmbeddedServer, standby: Standby, bank: LastingBank) -> None:
        self.primary = primary
        self.standby = standby
        self.bank = bank
        self.on_primary = primary.url(DATABASE)
        self.on_standby = standby.url(DATABASE)

    async def transfer_while(self, act: Callable[[], None]) -> None:
        """A transfer during which something happens between the decision and the commits."""
        with once_at("commit:before", act) as reached:
            await self.bank.transfer()
        assert reached


@pytest.fixture
async def pair(tmp_path: Path, database: str) -> AsyncIterator[Pair]:
    """Asynchronous, with the coordinator open."""
    with EmbeddedServer(UNSAFE_BUT_QUICK) as primary:
        clean_database(primary)
        with Standby(primary) as standby:
            await until(standby.follows)
            bank = LastingBank(tmp_path, standby.url_of_either(DATABASE), database)
            async with bank.coordinator:
                yield Pair(primary, standby, bank)


@asynccontextmanager
async def synchronous(pair: Pair) -> AsyncIterator[Pair]:
    query(pair.on_primary, f"ALTER SYSTEM SET synchronous_standby_names = '{STANDBY}'")
    query(pair.on_primary, "SELECT pg_reload_conf()")
    state = f"SELECT sync_state FROM pg_stat_replication WHERE application_name = '{STANDBY}'"
    await until(lambda: query(pair.on_primary, state) == [("sync",)])
    yield pair


async def test_a_synchronous_standby_that_is_away_when_preparing_aborts(pair: Pair) -> None:
    async with synchronous(pair):
        await asyncio.to_thread(pair.standby.stop)
        transfer = asyncio.create_task(pair.bank.transfer())
        while not transfer.done():  # PREPARE waits, and then ROLLBACK PREPARED
            for process in waiting(pair.on_primary):
                query(pair.on_primary, f"SELECT pg_cancel_backend({process})")
            await asyncio.sleep(0.01)
        with pytest.raises(TransactionAborted, match="no synchronous standby") as raised:
            await transfer
        assert raised.value.retryable
        assert pair.bank.balances() == (100, 100) and pair.bank.in_doubt() == []
        await asyncio.to_thread(pair.standby.start)
        await pair.bank.transfer()
    assert pair.bank.balances() == (70, 130)


async def test_a_synchronous_standby_that_is_away_when_committing_keeps_the_decision(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """It is committed on the primary only; the standby, promoted, has it prepared still."""
    async with synchronous(pair):
        stopped: list[bool] = []

        def stop() -> None:
            pair.standby.stop()
            stopped.append(True)

        transfer = asyncio.create_task(pair.transfer_while(stop))
        await until(lambda: stopped)  # from now on it is COMMIT PREPARED that waits
        await end_the_wait(pair.on_primary)
        await transfer
        assert "no synchronous standby has confirmed it" in caplog.text
        assert query(pair.on_primary, "SELECT balance FROM account WHERE id = 'alice'") == [(70,)]
        await asyncio.to_thread(pair.standby.replace_origin)
        await until(lambda: gids(pair.on_standby) == [])
    assert pair.bank.balances() == (70, 130)
    assert await pair.bank.incidents() == []


async def test_a_synchronous_standby_promoted_in_doubt_commits(pair: Pair) -> None:
    async with synchronous(pair):
        await pair.transfer_while(pair.standby.replace_origin)
    assert query(pair.on_standby, "SELECT pg_is_in_recovery()") == [(False,)]
    assert pair.bank.balances() == (70, 130) and pair.bank.in_doubt() == []
    assert await pair.bank.incidents() == []


async def test_an_asynchronous_standby_promoted_in_doubt_may_lose_the_branch(pair: Pair) -> None:
    """The acknowledged PREPARE is gone: the caller and the log are told, with the evidence."""
    await pair.standby.catch_up()
    await asyncio.to_thread(pair.standby.stop)
    with pytest.raises(HeuristicOutcome, match="accounts: heuristic hazard") as raised:
        await pair.transfer_while(pair.standby.replace_origin)
    error = raised.value
    assert error.outcome is Outcome.COMMITTED
    ((branch, ending),) = error.endings
    assert branch.participant == "accounts" and ending.kind is EndingKind.HEURISTIC_HAZARD
    assert "pg_xact_status" in ending.evidence and "timeline 1 to 2" in ending.evidence
    assert pair.bank.balances() == (100, 130)
    (incident,) = await pair.bank.incidents()
    assert (incident.gid, incident.evidence) == (str(branch.xid), ending.evidence)
    assert await pair.bank.coordinator.status(error.transaction_id) is Status.COMMITTED


async def test_an_asynchronous_standby_promoted_after_the_commit_commits_again(pair: Pair) -> None:
    """The acknowledged COMMIT PREPARED is gone: as long as its record stands it is repeated."""
    with ThreadPoolExecutor(1) as thread:

        def stop_up_to_date() -> None:
            thread.submit(asyncio.run, pair.standby.catch_up()).result()
            pair.standby.stop()

        await pair.transfer_while(stop_up_to_date)
    assert pair.bank.balances() == (70, 130)
    await asyncio.to_thread(pair.standby.replace_origin)
    async with asyncio.timeout(20):
        while pair.bank.balances() != (70, 130) or pair.bank.in_doubt():
            await asyncio.sleep(0.02)
    assert await pair.bank.incidents() == []


async def test_a_person_who_rolls_back_what_is_decided_is_told_about(
    tmp_path: Path, database: str, second_database: str
) -> None:
    bank = LastingBank(tmp_path, database, second_database)

    def roll_back_by_hand() -> None:
        (gid,) = gids(database)
        query(database, f"ROLLBACK PREPARED '{gid}'")

    async with bank.coordinator:
        with (
            once_at("commit:before", roll_back_by_hand),
            pytest.raises(HeuristicOutcome, match="heuristic rollback") as raised,
        ):
            await bank.transfer()
        ((branch, ending),) = raised.value.endings
        assert branch.participant == "accounts" and "is aborted" in ending.evidence
        (incident,) = await bank.incidents()
        assert incident.kind is EndingKind.HEURISTIC_ROLLBACK
        assert incident.gid == str(branch.xid)
    assert bank.balances() == (100, 130)
