"""Processes are killed, and paused beyond their deadline, at every effect boundary.

After a kill a repeat under the key comes at once, before any recovery. While a process sleeps a
service that sweeps ends what it has prepared; then it wakes and has to hear what became of it.
"""

from __future__ import annotations

import pytest

from tests.crash.batch import Batch, batches
from tests.crash.matrix import Case, Fault, all_cases
from tests.crash.place import Place

FAULTS = (Fault.KILLED, Fault.PAUSED)
BATCHES = list(batches(each for each in all_cases() if each.is_always_run and each.fault in FAULTS))


@pytest.mark.parametrize(
    "cases", BATCHES, ids=lambda cases: f"{cases[0].fault}, {len(cases)} cases"
)
async def test_money_markers_and_branches_agree(place: Place, cases: list[Case]) -> None:
    (await Batch(place, cases).run()).check()
