"""The commit of the only database that was written to is the decision, and its answer is lost.

The log knows nothing of it: whoever asks there must not be told that nothing was done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from coordinator import Coordinator, OutcomeUnknown, Status
from participants.postgres import PostgreSQL
from participants.postgres.embedded import EmbeddedServer
from tests.support.bank import TAKE
from tests.support.branches import BALANCE, until
from tests.support.postgres import query
from tests.support.proxy import Fault, Proxy


class Dying(Proxy):
    """Nothing passes any more once a fault has struck."""

    def _fault_of(self, data: bytes) -> Fault | None:
        fault = super()._fault_of(data)
        if fault is not None:  # what struck it still passes
            asyncio.get_running_loop().call_soon(self.black_hole)
        return fault


@pytest.fixture
async def proxy(postgres_server: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with Dying(postgres_server.port) as proxy:
        yield proxy


async def test_an_abort_does_not_answer_for_a_commit_that_is_out(
    proxy: Proxy, database: str
) -> None:
    accounts = PostgreSQL("accounts", proxy.url(database))
    shop = Coordinator("memory:", cluster="shop", participants=[accounts])
    async with shop:
        proxy.on(b"COMMIT", Fault.LOSE_ANSWER)
        with pytest.raises(OutcomeUnknown) as unknown:
            async with shop.transaction(timeout=1.5):
                await (await accounts.connection()).execute(TAKE)
        error = unknown.value
        assert not error.recorded
        assert str(error).startswith("accounts did not answer the commit within 1.5 s")
        assert "look into that database" in str(error) and "status" not in str(error)
        assert query(database, BALANCE) == [(99,)]
        for _ in range(2):
            assert await shop.abort(error.transaction_id) is Status.UNDECIDED
            assert await shop.status(error.transaction_id) is Status.UNDECIDED
        asked = await asyncio.to_thread(shop.blocking.abort, error.transaction_id)
        assert asked is Status.UNDECIDED
        proxy.heal()
        await until(lambda: not shop.engine().drivers)
        assert query(database, BALANCE) == [(99,)]
