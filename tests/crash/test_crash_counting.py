"""The counting of the crash tests finds what is wrong: planted bugs, doctored books, missed points.

Also: the matrix has every effect boundary there is.
"""

from __future__ import annotations

import msgspec
import pytest

from coordinator.model import Status
from coordinator.testing import POINTS
from tests.crash.accounting import Books, Facts, of_the_whole, violations
from tests.crash.batch import Batch
from tests.crash.matrix import BOUNDARIES, Case, Fault, Way, all_cases
from tests.crash.place import Place
from tests.crash.planted import PLANTED

BOTH = frozenset({"accounts", "ledger"})
NOT_IN_THE_MATRIX = {"report", "ask", "record-answer"}


@pytest.mark.parametrize("name", PLANTED)
async def test_a_planted_bug_is_found(place: Place, name: str) -> None:
    bug = PLANTED[name]
    result = await Batch(place, [bug.case], planted=name).run()
    found = [wrong for each in result.wrong.values() for wrong in each]
    assert any(wrong.startswith(f"{bug.found_by}:") for wrong in found), found


def test_without_the_bugs_their_cases_are_in_the_matrix() -> None:
    assert {bug.case for bug in PLANTED.values()} <= set(all_cases())


@pytest.mark.parametrize("fault", [Fault.KILLED, Fault.CUT])
async def test_a_point_that_is_not_reached_fails_the_case(place: Place, fault: Fault) -> None:
    point = "rollback:before" if fault is Fault.KILLED else "accounts ROLLBACK PREPARED"
    case = Case(Way.COMMIT, point, 1, fault)
    result = await Batch(place, [case]).run()
    assert result.cases[case.name][0].startswith("vacuous")


def test_the_matrix_has_every_effect_boundary() -> None:
    wanted = {point for point in POINTS if point.partition(":")[0] not in NOT_IN_THE_MATRIX}
    assert {point for boundaries in BOUNDARIES.values() for point, _ in boundaries} == wanted
    for fault in Fault:
        met = {case.point.partition(":")[0] for case in all_cases() if case.fault is fault}
        assert met, fault


def books(**changes: object) -> Books:
    """Of a transfer that is committed and ended."""
    fine = Books(
        balance={"accounts": 70, "ledger": 130},
        markers={"accounts": ["one"], "ledger": ["one"]},
        prepared={"accounts": [], "ledger": []},
        locked=frozenset(),
        verdict="commit",
        named=BOTH,
        status=Status.COMMITTED,
    )
    return msgspec.structs.replace(fine, **changes)


FINE = Facts(
    case=Case(Way.COMMIT, "commit:before", 1, Fault.FIRST_KILLED),
    transaction="one",
    hit=True,
    said=(),
    told="committed",
    told_transaction="",
    late=False,
    left=False,
    repeat=None,
    before=books(),
    after=books(),
    later=books(balance={"accounts": 40, "ledger": 160}),
)
HALF = {"accounts": ["one"], "ledger": []}
TWICE = {"accounts": ["one", "one"], "ledger": ["one", "one"]}
KEYED = msgspec.structs.replace(FINE.case, way=Way.KEYED)


def doctored(**changes: object) -> Facts:
    return msgspec.structs.replace(FINE, **changes)


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        (doctored(hit=False), "vacuous"),
        (doctored(after=books(markers=HALF, balance={"accounts": 70, "ledger": 100})), "I1"),
        (doctored(after=books(markers=TWICE, balance={"accounts": 40, "ledger": 160})), "I1"),
        (doctored(after=books(balance={"accounts": 70, "ledger": 131})), "I1"),
        (doctored(after=books(verdict="abort")), "I1"),
        (doctored(before=books(markers=HALF)), "I2"),
        (doctored(before=books(named=frozenset({"ledger"}))), "I2"),
        (doctored(before=books(verdict="abort", status=Status.ABORTED)), "I3"),
        (doctored(told="aborted"), "I4"),
        (doctored(told=""), "I4"),
        (doctored(case=KEYED, told="unknown", told_transaction="two"), "I4"),
        (doctored(after=books(status=Status.ABORTED)), "I4"),
        (doctored(case=KEYED, repeat=("committed", "two")), "I4"),
        (doctored(case=KEYED, repeat=("before", "two")), "I4"),
        (doctored(before=books(verdict="", status=Status.UNDECIDED)), "I5"),
        (doctored(late=True), "I6"),
        (doctored(left=True), "I6"),
        (doctored(after=books(prepared={"accounts": ["a"], "ledger": []})), "I6"),
        (doctored(after=books(locked=BOTH)), "I6"),
        (doctored(later=books()), "I6"),
        (doctored(after=books(status=Status.UNDECIDED)), "I11"),
    ],
)
def test_doctored_books_are_found(facts: Facts, named: str) -> None:
    assert violations(FINE) == []
    assert named in {wrong.partition(":")[0] for wrong in violations(facts)}


def test_doctored_batches_are_found() -> None:
    nothing: dict[str, list[str]] = {"accounts": [], "ledger": []}
    assert of_the_whole(0, nothing, [True, True]) == []
    for wrong, named in (
        (of_the_whole(3, nothing, [True, True]), "I6"),
        (of_the_whole(0, nothing | {"ledger": ["x"]}, [True, True]), "I7"),
        (of_the_whole(0, nothing, [True, False]), "I8"),
    ):
        assert [each.partition(":")[0] for each in wrong] == [named]
