"""Servers are killed and paused, answers lost, links cut and silent, at every effect boundary.

`tests/crash/matrix.py` says which faults meet which boundaries; processes that are killed and
paused themselves are in `test_process_crashes.py`.
"""

from __future__ import annotations

import pytest

from tests.crash.batch import Batch, batches
from tests.crash.matrix import NETWORK_FAULTS, SERVER_FAULTS, Case, all_cases
from tests.crash.place import Place

FAULTS = (*SERVER_FAULTS, *NETWORK_FAULTS)
BATCHES = list(batches(each for each in all_cases() if each.is_always_run and each.fault in FAULTS))


@pytest.mark.parametrize(
    "cases", BATCHES, ids=lambda cases: f"{cases[0].fault}, {len(cases)} cases"
)
async def test_money_markers_and_branches_agree(place: Place, cases: list[Case]) -> None:
    (await Batch(place, cases).run()).check()
