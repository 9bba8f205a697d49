"""Records survive the way to bytes and back; what cannot be read says so."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import codec
from coordinator.model import (
    ABORT,
    Branch,
    BranchId,
    Decision,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    Xid,
)

LOG = LogId("00000000000000aa")
TRANSACTION = TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11")

hexadecimal = st.binary(min_size=8, max_size=8).map(bytes.hex)
transactions = st.binary(min_size=16, max_size=16).map(codec.unpack_transaction)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def branches(transaction: TransactionId) -> st.SearchStrategy[Branch]:
    def build(member: str, branch: str, participant: str, token: bytes) -> Branch:
        xid = Xid(LOG, MemberId(member), transaction, BranchId(branch))
        return Branch(xid, participant, token)

    return st.builds(build, hexadecimal, hexadecimal, names, st.binary(max_size=40))


def branch(name: str = "orders", token: bytes = b"", number: int = 1) -> Branch:
    xid = Xid(LOG, MemberId("0" * 16), TRANSACTION, BranchId(f"{number:016x}"))
    return Branch(xid, name, token)


@given(st.data(), transactions, st.sampled_from(Verdict), st.binary(max_size=100))
def test_a_record_comes_back_as_it_was(
    data: st.DataObject, transaction: TransactionId, verdict: Verdict, attachment: bytes
) -> None:
    one = branches(transaction)
    decision = Decision(
        verdict, tuple(data.draw(st.lists(one, max_size=4))), data.draw(st.none() | one)
    )
    encoded = codec.encode(decision, attachment, log=LOG, transaction=transaction)
    assert encoded[0] == codec.FORMAT_VERSION
    assert codec.decode(encoded, log=LOG, transaction=transaction) == (decision, attachment)


@given(transactions, transactions)
def test_packed_ids_are_in_the_order_of_ids(one: TransactionId, other: TransactionId) -> None:
    packed = codec.pack_transaction(one)
    assert codec.unpack_transaction(packed) == one
    assert (packed < codec.pack_transaction(other)) == (one < other)


@given(st.lists(hexadecimal.map(BranchId), max_size=5))
def test_branch_ids_come_back_in_order(ids: list[BranchId]) -> None:
    packed = codec.pack_branches(ids)
    parts = [packed[start : start + 8] for start in range(0, len(packed), codec.BRANCH_BYTES)]
    assert [codec.unpack_branch(part) for part in parts] == ids


def read_or_refused(data: bytes) -> None:
    why = ""
    try:
        codec.decode(data, log=LOG, transaction=TRANSACTION)
    except ValueError as error:
        why = str(error)
    assert not why or TRANSACTION in why


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_with_one_error(data: bytes) -> None:
    read_or_refused(data)
    read_or_refused(b"\x01" + data)


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_record_with_a_changed_byte_is_refused(place: int, value: int) -> None:
    decision = Decision(Verdict.COMMIT, (branch(token=b"token"), branch("stock", number=2)))
    whole = codec.encode(decision, b"result", log=LOG, transaction=TRANSACTION)
    data = bytearray(whole)
    data[place % len(data)] = value
    for read in (codec.decode, verdict_and_log):
        if bytes(data) == whole:
            read(whole, log=LOG, transaction=TRANSACTION)
        else:
            with pytest.raises(ValueError, match=TRANSACTION):
                read(bytes(data), log=LOG, transaction=TRANSACTION)


def verdict_and_log(data: bytes, *, log: LogId, transaction: TransactionId) -> object:
    return codec.verdict_of(data, transaction=transaction)


def test_a_record_under_another_id_is_refused() -> None:
    data = codec.encode(ABORT, b"", log=LOG, transaction=TRANSACTION)
    other = TransactionId(TRANSACTION[:-1] + "2")
    with pytest.raises(ValueError, match=f"{other} is damaged: its checksum"):
        codec.decode(data, log=LOG, transaction=other)


def test_a_record_of_the_first_programs_is_read() -> None:
    """They wrote five elements, and pass over the sixth."""
    written = msgspec.msgpack.encode(
        ("commit", bytes.fromhex("00" * 8 + "11" * 8), [("orders", b"token")], None, b"result")
    )
    decision, attachment = codec.decode(b"\x01" + written, log=LOG, transaction=TRANSACTION)
    assert attachment == b"result"
    (found,) = decision.branches
    assert (found.participant, found.token, found.id) == ("orders", b"token", "11" * 8)
    now = codec.encode(decision, attachment, log=LOG, transaction=TRANSACTION)
    assert now[0] == 1, "a later format would be refused by them"
    assert msgspec.msgpack.decode(now[1:])[:5] == msgspec.msgpack.decode(written)


def test_a_record_is_small() -> None:
    decision = Decision(Verdict.COMMIT, (branch(token=b"123456"), branch("stock", b"123456", 2)))
    assert len(codec.encode(decision, b"", log=LOG, transaction=TRANSACTION)) <= 86
    assert len(codec.encode(ABORT, b"", log=LOG, transaction=TRANSACTION)) <= 24


def test_fields_of_a_later_version_are_passed_over() -> None:
    decision = Decision(Verdict.DELEGATED, (branch(),), branch("kafka", number=2))
    data = codec.encode(decision, b"result", log=LOG, transaction=TRANSACTION)
    fields = msgspec.msgpack.decode(data[1:])
    fields[2][0].append("a field of each branch")
    fields[3].append({"of": "the last resource"})
    fields[5:] = [["of the record"], bytes(4)]
    later = (data[:1] + msgspec.msgpack.encode(fields))[:-4]
    later += codec.checksum(later, TRANSACTION)
    assert codec.decode(later, log=LOG, transaction=TRANSACTION) == (decision, b"result")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no bytes"),
        (b"\x02\x93", "format 2"),
        (b"\x01", "damaged"),
        (b"\x01\x91\xa6commit\x00", "damaged"),
        (b"\x01" + msgspec.msgpack.encode(["maybe"]), "maybe"),
        (b"\x01" + msgspec.msgpack.encode(["commit", b"short", [["orders", b""]]]), "5 bytes"),
        (b"\x01" + msgspec.msgpack.encode(["commit", b"", [["orders", b""]]]), "0 bytes"),
    ],
)
def test_what_cannot_be_read_says_why(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        codec.decode(data, log=LOG, transaction=TRANSACTION)
    assert TRANSACTION in str(caught.value)


def test_a_branch_of_another_log_or_transaction_is_refused() -> None:
    decision = Decision(Verdict.COMMIT, (branch(),))
    with pytest.raises(ValueError, match="belongs to another"):
        codec.encode(decision, b"", log=LogId("b" * 16), transaction=TRANSACTION)
    other = TransactionId("0199f3c2-7a10-7cc2-98a4-000000000000")
    with pytest.raises(ValueError, match="belongs to another"):
        codec.encode(decision, b"", log=LOG, transaction=other)


@pytest.mark.parametrize("text", ["", "0" * 15, "A" * 16, "0" * 17, "g" * 16, "00 00" * 4])
def test_a_malformed_branch_id_is_refused(text: str) -> None:
    xid = Xid(LOG, MemberId("0" * 16), TRANSACTION, BranchId(text))
    with pytest.raises(ValueError, match="hexadecimal"):
        codec.encode(
            Decision(Verdict.COMMIT, (Branch(xid, "orders"),)),
            b"",
            log=LOG,
            transaction=TRANSACTION,
        )


def test_ids_of_unequal_length_are_not_mixed_up() -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        codec.pack_branches([BranchId("0" * 14), BranchId("0" * 18)])


@pytest.mark.parametrize("text", ["", "0199f3c2", str(TRANSACTION) + "00", "no id at all"])
def test_a_malformed_transaction_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="id"):
        codec.pack_transaction(TransactionId(text))


def test_a_record_has_a_limit() -> None:
    decision = Decision(Verdict.COMMIT, (branch(),))
    room = codec.RECORD_BYTES_MAX - 100
    assert codec.encode(decision, b"x" * room, log=LOG, transaction=TRANSACTION)
    with pytest.raises(ValueError, match="attach less"):
        codec.encode(decision, b"x" * codec.RECORD_BYTES_MAX, log=LOG, transaction=TRANSACTION)
