"""A short torture of real processes and servers, with every kind of fault.

The seed draws the faults; what the clients are doing when they come is different each time. A
failure keeps its folder, and says how to check it and to run it again.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.torture.faults import KINDS
from tests.torture.run import judge, torture
from tests.torture.values import Options

OPTIONS = Options(
    seed=5, seconds=8.0, clients=9, clients_each=3, interval=(0.3, 0.6), longest=1.2, accounts=60
)


@pytest.mark.timeout(180)
def test_a_short_torture_is_survived() -> None:
    folder = Path(tempfile.mkdtemp(prefix="syncpoint-torture-"))
    told: list[str] = []
    asyncio.run(torture(OPTIONS, folder, told.append))
    judgement = judge(folder)
    seen = "\n".join((*told, judgement.seen, *map(str, judgement.violations)))
    again = f"{seen}\ncheck it again: python -m tests.torture check {folder}"
    assert not judgement.violations, again
    # It must have happened at all.
    assert judgement.faults.keys() == KINDS.keys(), again
    assert judgement.outcomes["committed"] >= 30, again
    assert judgement.outcomes["aborted"] >= 10, again
    assert judgement.outcomes["repeat"] >= 1, again
    assert judgement.outcomes["cut off"] + judgement.outcomes.get("unknown", 0) >= 3, again
    assert judgement.recovered_by_sweeps + judgement.recovered_by_command >= 3, again
    assert judgement.recovered_by_command >= 1, again
    assert judgement.statuses >= 10, again
    assert judgement.records >= 30, again
    shutil.rmtree(folder)
