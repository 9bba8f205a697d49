"""A branch is rolled back by hand after the decision: crashes around the report of it.

The one place where a person breaks agreement. It has to be shown, once, and the rest be committed.
"""

from __future__ import annotations

import secrets
import signal

import pytest

from coordinator import Coordinator
from tests.crash.accounting import Books
from tests.crash.place import Place
from tests.crash.process import Plan


@pytest.mark.parametrize("point", ["report:before", "report:after", ""])
async def test_what_somebody_ended_by_hand_is_shown(place: Place, point: str) -> None:
    account = secrets.token_hex(3)
    place.open_accounts([account])
    log = f"sqlite:///{place.folder / account}.db"
    plan = Plan(log=log, account=account, point=point, fate="kill", by_hand=True, **place.direct)
    service = await place.nursery.start(plan)
    service.go_on()
    code = await service.ended()
    if point:
        assert (code, service.said("reached")) == (-signal.SIGKILL, [""])
    else:
        told = service.said("told")[0]
        assert (code, told) == (0, f"heuristic {service.said('id')[0]}"), place.nursery.errors()
    config = place.config(log, plan.timeout)
    command = await place.nursery.start(
        Plan(role="recover", log=log, config=str(config), **place.direct)
    )
    await command.ended()
    assert command.said("exit") == ["4"], command.lines
    found = (await place.books(log, {account: service.said("id")[0]}))[account]
    assert _is_as_reported(found), found
    assert await _incidents(log) == ["accounts heuristic rollback"]


def _is_as_reported(found: Books) -> bool:
    """The ledger is committed, as decided; accounts is not, and nothing is left."""
    moved = found.balance == {"accounts": 100, "ledger": 130}
    ended = found.prepared == {"accounts": [], "ledger": []} and not found.locked
    return moved and ended and found.verdict == "commit"


async def _incidents(log: str) -> list[str]:
    coordinator = Coordinator(log, cluster="crash")
    await coordinator.open(sweep=False)
    try:
        incidents = await coordinator.engine().log.incidents()
        return [f"{each.participant} {each.kind}" for each in incidents]
    finally:
        await coordinator.close()
