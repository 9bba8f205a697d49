"""Names and values: what is written is read back, and what is not ours is seen not to be."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.errors import (
    AlreadyDecided,
    HeuristicOutcome,
    OutcomeUnknown,
    TransactionAborted,
    TransactionError,
)
from coordinator.model import (
    ABORT,
    FINISHED,
    Branch,
    BranchId,
    Claim,
    Decision,
    Ending,
    EndingKind,
    LogId,
    MemberId,
    Outcome,
    TransactionId,
    Verdict,
    Xid,
    id_floor,
    id_time_ms,
    parse_transaction_id,
)

ID = TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11")
NAME = Xid(
    LogId("0123456789abcdef"), MemberId("fedcba9876543210"), ID, BranchId("00000000000000ff")
)

repeatable = settings(derandomize=True, deadline=None)
"""The same examples every time, however slow the machine."""

hex16 = st.text("0123456789abcdef", min_size=16, max_size=16)
milliseconds = st.integers(0, 2**48 - 1)


@st.composite
def transaction_ids(draw: st.DrawFn) -> TransactionId:
    digits = f"{draw(milliseconds):012x}"
    tail = f"{draw(st.integers(0, 2**62 - 1)):016x}"
    variant = draw(st.sampled_from("89ab"))
    random_12 = f"{draw(st.integers(0, 2**12 - 1)):03x}"
    return TransactionId(f"{digits[:8]}-{digits[8:]}-7{random_12}-{variant}{tail[1:4]}-{tail[4:]}")


@st.composite
def xids(draw: st.DrawFn) -> Xid:
    return Xid(
        LogId(draw(hex16)),
        MemberId(draw(hex16)),
        draw(transaction_ids()),
        BranchId(draw(hex16)),
    )


@repeatable
@given(xids())
def test_a_name_is_read_back(xid: Xid) -> None:
    assert Xid.parse(str(xid)) == xid


@repeatable
@given(xids())
def test_a_name_fits_a_gid(xid: Xid) -> None:
    text = str(xid)
    assert len(text.encode()) <= 199
    assert not set(text) & set("'\"\\%_")


@repeatable
@given(xids(), hex16)
def test_the_prefix_tells_our_branches_from_others(xid: Xid, other: str) -> None:
    assert str(xid).startswith(Xid.prefix(xid.log))
    assert str(xid).startswith(Xid.prefix(LogId(other))) == (other == xid.log)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sp:",
        "orders-4711",
        str(NAME) + " ",
        str(NAME) + ":1",
        "x" + str(NAME),
        str(NAME).upper(),
        str(NAME).replace("sp:", "dx:"),
        str(NAME).replace(ID, "0199f3c2-7a10-4cc2-98a4-6c1c2f5d8a11"),
        str(NAME) + "\n",
    ],
)
def test_what_is_not_ours_has_no_name(text: str) -> None:
    assert Xid.parse(text) is None


@repeatable
@given(st.binary(max_size=200).map(lambda raw: raw.decode("latin-1")))
def test_no_text_breaks_the_parser(text: str) -> None:
    xid = Xid.parse(text)
    assert xid is None or str(xid) == text


@repeatable
@given(transaction_ids())
def test_an_id_is_read_back(transaction: TransactionId) -> None:
    assert parse_transaction_id(transaction) == transaction
    assert parse_transaction_id(f"  {transaction.upper()}\n") == transaction


@pytest.mark.parametrize(
    "text", ["", "order-42", ID[:-1], ID + "0", ID.replace("-7cc2", "-4cc2"), ID.replace("-", "")]
)
def test_what_is_no_id_is_answered_with_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="expected a UUIDv7 such as"):
        parse_transaction_id(text)


@repeatable
@given(transaction_ids(), transaction_ids())
def test_ids_sort_by_their_time(one: TransactionId, other: TransactionId) -> None:
    if id_time_ms(one) < id_time_ms(other):
        assert one < other


@repeatable
@given(transaction_ids())
def test_the_floor_is_the_smallest_id_of_its_millisecond(transaction: TransactionId) -> None:
    floor = id_floor(id_time_ms(transaction))
    assert floor <= transaction
    assert id_time_ms(floor) == id_time_ms(transaction)
    assert parse_transaction_id(floor) == floor


@repeatable
@given(milliseconds)
def test_the_floor_rises_with_time(moment: int) -> None:
    assert id_floor(moment) < id_floor(moment + 1) or moment == 2**48 - 1
    assert id_time_ms(id_floor(moment)) == moment


def test_time_before_the_epoch_has_the_first_floor() -> None:
    assert id_floor(-1) == id_floor(0)


def test_a_branch_knows_its_id() -> None:
    assert Branch(NAME, "accounts").id == NAME.branch


def test_values_are_compared_by_content_and_cannot_change() -> None:
    branch = Branch(NAME, "accounts", b"7711")
    assert branch == Branch(NAME, "accounts", b"7711")
    assert len({branch, Branch(NAME, "accounts", b"7711"), Branch(NAME, "accounts")}) == 2
    with pytest.raises(AttributeError):
        branch.token = b""  # type: ignore[misc]


def test_claims_have_an_order() -> None:
    claims = [Claim("step", "a"), Claim("key", "b"), Claim("key", "a")]
    assert sorted(claims) == [Claim("key", "a"), Claim("key", "b"), Claim("step", "a")]


def test_the_shared_values() -> None:
    assert Decision(Verdict.ABORT) == ABORT
    assert Ending(EndingKind.FINISHED) == FINISHED


def test_errors_say_what_to_do_next() -> None:
    unknown = OutcomeUnknown("the log did not answer", transaction_id=ID)
    assert ID in str(unknown)
    assert "ask coordinator.status(id)" in str(unknown)
    decided = AlreadyDecided("order-7", transaction_id=ID, outcome=Outcome.COMMITTED)
    assert str(decided) == f"idempotency key 'order-7' is committed by transaction {ID}"
    aborted = TransactionAborted("deadlock detected", transaction_id=ID, retryable=True)
    assert (str(aborted), aborted.retryable) == ("deadlock detected", True)


def test_a_heuristic_outcome_shows_the_evidence() -> None:
    ending = Ending(EndingKind.HEURISTIC_ROLLBACK, "pg_xact_status says aborted")
    error = HeuristicOutcome(
        transaction_id=ID,
        outcome=Outcome.COMMITTED,
        endings=((Branch(NAME, "ledger"), ending),),
    )
    assert "ledger: heuristic rollback (pg_xact_status says aborted)" in str(error)
    assert isinstance(error, TransactionError)


def test_values_travel_between_processes() -> None:
    decision = Decision(Verdict.COMMIT, (Branch(NAME, "accounts", b"7711"),))
    assert pickle.loads(pickle.dumps(decision)) == decision
