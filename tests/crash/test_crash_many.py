"""Hundreds of branches are in doubt when the first process starts: it drains them, bounded.

Half of the transactions are decided and no branch has heard of it, half are not. Recovery reads the
log in pages and takes no more connections than its pool has. The rate is printed, not judged.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import time

import pytest

from tests.crash.accounting import OPENING_BALANCE
from tests.crash.place import Place
from tests.crash.process import AMOUNT, POOL_SIZE, Plan
from tests.support.postgres import query, sessions

OWN_CONNECTIONS = 4
"""What a participant has beside its pool, to end branches."""
PAGE = 20


async def leave_in_doubt(place: Place, plan: Plan, processes: int, each: int) -> list[str]:
    """Kill so many processes with so many transactions in doubt each; returns their accounts."""
    name = secrets.token_hex(3)
    everybody = [f"{name}-{number}" for number in range(processes * each)]
    place.open_accounts(everybody)
    for first in range(0, len(everybody), each):
        many = tuple(everybody[first : first + each])
        crowd = await place.nursery.start(
            Plan(role="crowd", log=plan.log, many=many, **place.direct)
        )
        assert await crowd.ended() == -signal.SIGKILL, place.nursery.errors()
        assert crowd.said("reached")
    return everybody


@pytest.mark.parametrize(
    ("who", "processes"), [("recover", 5), ("sweeper", 2)], ids=["syncpoint recover", "a service"]
)
async def test_it_drains_what_many_processes_left(
    place: Place, who: str, processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    log = f"sqlite:///{place.folder / secrets.token_hex(4)}.db"
    plan = Plan(log=log, role=who, page=PAGE, **place.direct)
    everybody = await leave_in_doubt(place, plan, processes, each=30)
    branches = sum(len(gids) for gids in place.prepared().values())
    assert branches == 2 * len(everybody)

    config = str(place.config(log, plan.timeout))
    began = time.monotonic()
    process = await place.nursery.start(
        Plan(log=log, role=who, page=PAGE, config=config, **place.direct)
    )
    most = 0
    while any(place.prepared().values()):
        assert time.monotonic() < began + 60
        most = max(most, *(sessions(url) for url in place.direct.values()))
        await asyncio.sleep(0.01)
    seconds = time.monotonic() - began
    process.go_on()
    await process.ended()
    with capsys.disabled():
        print(f"\n{who}: {branches} branches in {seconds:.2f} s, at most {most} connections")

    assert 0 < most <= POOL_SIZE + OWN_CONNECTIONS
    if who == "recover":
        assert process.said("exit") == ["0"], process.lines
        half = len(everybody) // 2
        assert f"{half} committed, {half} rolled back, 0 still in doubt" in "".join(process.lines)
    assert moved(place, everybody) == ([-AMOUNT, 0], [AMOUNT, 0])


def moved(place: Place, everybody: list[str]) -> tuple[list[int], list[int]]:
    """What each database lost or won on which accounts; they must be the same ones in both."""
    names = ", ".join(f"'{account}'" for account in everybody)
    statement = f"SELECT id, balance FROM account WHERE id IN ({names})"
    changed = [
        {account: int(str(balance)) - OPENING_BALANCE for account, balance in query(url, statement)}
        for url in place.direct.values()
    ]
    assert all(changed[0][account] == -changed[1][account] for account in everybody)
    assert sum(1 for change in changed[0].values() if change) == len(everybody) // 2
    return sorted(set(changed[0].values())), sorted(set(changed[1].values()), reverse=True)
