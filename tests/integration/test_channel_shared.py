"""The same sessions in threads and on a loop by turns, many at a time, and beside a fork."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import pytest

from coordinator.errors import TransactionAborted, TransactionError
from participants.postgres import channel
from tests.support.bank import GIVE, SLOW, TAKE, Bank, blocking_bank, running, wait_until
from tests.support.branches import until
from tests.support.prompt import assert_at_rest, watched


async def _transfer(bank: Bank) -> None:
    async with bank.coordinator.transaction():
        await (await bank.accounts.connection()).execute(TAKE)
        await (await bank.ledger.connection()).execute(GIVE)


def _transfer_blocking(bank: Bank) -> None:
    with bank.coordinator.blocking.transaction():
        bank.accounts.blocking.connection().execute(TAKE)
        bank.ledger.blocking.connection().execute(GIVE)


async def test_threads_and_the_loop_take_turns_on_one_session(
    database: str, second_database: str
) -> None:
    bank = Bank((database, second_database), pool_size=1)
    async with bank.coordinator:
        with watched(bank.accounts) as went:
            for _ in range(5):
                await _transfer(bank)
                await asyncio.to_thread(_transfer_blocking, bank)
            with ThreadPoolExecutor(2) as threads:
                loop = asyncio.get_running_loop()
                await asyncio.gather(
                    *(loop.run_in_executor(threads, _transfer_blocking, bank) for _ in range(4)),
                    *(_transfer(bank) for _ in range(4)),
                )
        assert went == [True] * 18 and bank.balances() == (82, 118)
        await until(lambda: not bank.coordinator.engine().drivers)
        assert_at_rest(bank.accounts)


async def test_a_thread_whose_time_is_up_and_the_loop_beside_it(
    database: str, second_database: str
) -> None:
    """Its session is shut under it by the loop; the next one is sound on either face."""
    bank = Bank((database, second_database), pool_size=1)

    def late() -> None:
        with bank.coordinator.blocking.transaction(timeout=0.3):
            bank.ledger.blocking.connection().execute(GIVE)
            bank.accounts.blocking.connection().execute(SLOW)

    async with bank.coordinator:
        for _ in range(2):
            with pytest.raises(TransactionAborted, match="deadline"):
                await asyncio.to_thread(late)
            await _transfer(bank)
            await asyncio.to_thread(_transfer_blocking, bank)
        assert bank.balances() == (96, 104) and not running(database, "pg_sleep")


async def test_whatever_is_cancelled_leaks_nothing(database: str, second_database: str) -> None:
    """Cancelled at any moment: no connection is lost from the pool, no slot, nothing in doubt."""
    seed = random.randrange(2**32)
    print(f"seed {seed}: put it in the place of the random one to see the same again")
    drawn = random.Random(seed)
    bank = Bank((database, second_database), pool_size=3)
    async with bank.coordinator:
        for _ in range(25):
            callers = [asyncio.create_task(_transfer(bank)) for _ in range(6)]
            await asyncio.sleep(drawn.uniform(0, 0.03))
            for caller in drawn.sample(callers, 4):
                caller.cancel()
            for caller in callers:
                with suppress(asyncio.CancelledError, TransactionError):
                    await caller
        await until(lambda: not bank.coordinator.engine().drivers)
        for participant in (bank.accounts, bank.ledger):
            assert_at_rest(participant)
        assert bank.nothing_is_prepared()
        alice, bob = bank.balances()
        assert alice + bob == 200 and alice < 100
        await _transfer(bank)
    assert bank.balances() == (alice - 1, bob + 1)


def test_many_threads_leak_nothing(database: str, second_database: str) -> None:
    with blocking_bank((database, second_database), pool_size=2) as bank:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: _transfer_blocking(bank), range(20)))
        engine = bank.coordinator.engine()
        wait_until(lambda: not engine.drivers)
        for participant in (bank.accounts, bank.ledger):
            assert_at_rest(participant)
        assert bank.balances() == (80, 120) and bank.nothing_is_prepared()


_request: ContextVar[object] = ContextVar("request", default=None)


async def test_each_exchange_goes_on_in_the_context_of_who_began_it(
    database: str, second_database: str
) -> None:
    """And no registration keeps one, which may hold all that an application knows of a request."""
    heard: list[object] = []
    say = "DO $$ BEGIN PERFORM pg_sleep(0.02); RAISE NOTICE 'heard'; END $$"

    async def serve(request: str) -> None:
        _request.set(request)
        async with bank.coordinator.transaction():
            connection = await bank.accounts.connection()
            connection.add_notice_handler(lambda _: heard.append(_request.get()))
            await connection.execute(say)
            await connection.execute(TAKE)
            await (await bank.ledger.connection()).execute(GIVE)

    bank = Bank((database, second_database), pool_size=1)
    async with bank.coordinator:
        for request in ("first", "second"):
            await asyncio.create_task(serve(request))
        assert heard == ["first", "second"]
        loop: Any = asyncio.get_running_loop()
        handles = [key.data[0] for key in loop._selector.get_map().values()]
        handles.append(channel._alarms[loop]._timer)
        assert len(handles) > 2
        assert not any(_request in each._context for each in handles if each is not None)
        for participant in (bank.accounts, bank.ledger):
            assert participant._open is not None
            for idle in participant._open.pool._idle:
                assert _request not in idle.channel._context


PROGRAM = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore")
from tests.support.bank import GIVE, TAKE, Bank

bank = Bank(tuple(sys.argv[1:3]))

async def transfer():
    async with bank.coordinator.transaction():
        await (await bank.accounts.connection()).execute(TAKE)
        await (await bank.ledger.connection()).execute(GIVE)

async def child():
    async with bank.coordinator:
        await transfer()

async def parent():
    async with bank.coordinator:
        await transfer()
        forked = await asyncio.to_thread(fork)
        await transfer()  # its sockets are still registered, and still its own
        status = (await asyncio.to_thread(os.waitpid, forked, 0))[1]
        assert status == 0, status
        await transfer()

def fork():
    forked = os.fork()
    if forked == 0:
        try:
            asyncio.run(child())
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return forked

asyncio.run(asyncio.wait_for(parent(), 30))
"""


def test_a_forked_child_leaves_the_sockets_of_its_parent_alone(
    database: str, second_database: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, database, second_database],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    bank = Bank((database, second_database))
    assert bank.balances() == (96, 104) and bank.nothing_is_prepared()
