"""Decisions and ids <-> bytes, as every decision log stores them.

A record begins with one byte, the version of its format; a MessagePack array follows. What the
place of a record implies (its log and its transaction) is not repeated in it, and ids are stored as
the bytes that their digits name, so that the order of packed ids is the order of ids.

The last element of the array is a checksum of everything before it and of the transaction's id: a
changed bit could otherwise name another branch, and the one that was meant would be rolled back.
Records of five elements come from the first programs, which wrote none and pass it over.

A later version may add fields before the checksum: decoding ignores what it does not know, and a
log never rewrites the bytes of a record, so nothing is lost by an older program. Whatever cannot be
encoded or decoded raises `ValueError` saying why.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec

from coordinator.model import (
    Branch,
    BranchId,
    Decision,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    Xid,
)

FORMAT_VERSION = 1
RECORD_BYTES_MAX = 1024 * 1024

TRANSACTION_BYTES = 16
BRANCH_BYTES = 8


class _Part(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a branch holds besides its ids."""

    participant: str
    token: bytes


class _Body(msgspec.Struct, array_like=True, frozen=True):
    """How a record is laid out; `encode` writes plain tuples of the same layout, for speed.

    `ids` holds the member and the id of each branch, sixteen bytes together, in the order of
    `parts`; those of the last resource come at the end.
    """

    verdict: Verdict
    ids: bytes = b""
    parts: tuple[_Part, ...] = ()
    last_resource: _Part | None = None
    attachment: bytes = b""


_VERSION = bytes([FORMAT_VERSION])
_WITHOUT_CHECKSUM = b"\x95"
"""How MessagePack begins an array of five elements; a longer one, of up to fifteen, is above."""
_CHECKSUM_BYTES = 4
_NO_CHECKSUM = bytes(_CHECKSUM_BYTES)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Body)


def encode(
    decision: Decision, attachment: bytes, *, log: LogId, transaction: TransactionId
) -> bytes:
    """The bytes of a record of this log under this id, at most `RECORD_BYTES_MAX`.

    Raises `ValueError` for a branch of another log or transaction, for ids that are not in their
    canonical form, and for a record that is too large; nothing has been recorded then.
    """
    last = decision.last_resource
    branches = decision.branches if last is None else (*decision.branches, last)
    for branch in branches:
        if branch.xid.transaction != transaction or branch.xid.log != log:
            raise ValueError(
                f"branch {branch.xid} cannot be recorded under transaction {transaction} of log "
                f"{log}: it belongs to another one"
            )
    body = (
        decision.verdict,
        pack_branches(
            [text for branch in branches for text in (branch.xid.member, branch.xid.branch)]
        ),
        [(branch.participant, branch.token) for branch in decision.branches],
        None if last is None else (last.participant, last.token),
        attachment,
        _NO_CHECKSUM,
    )
    data = (_VERSION + _encoder.encode(body))[:-_CHECKSUM_BYTES]
    data += checksum(data, transaction)
    if len(data) > RECORD_BYTES_MAX:
        raise ValueError(
            f"the record of transaction {transaction} has {len(data)} bytes, more than the "
            f"{RECORD_BYTES_MAX} that a log takes: {len(decision.branches)} branches and an "
            f"attachment of {len(attachment)} bytes; enlist fewer branches or attach less"
        )
    return data


def decode(data: bytes, *, log: LogId, transaction: TransactionId) -> tuple[Decision, bytes]:
    """The decision and the attachment that `encode` was given.

    Raises `ValueError` for bytes that this version of the program cannot read.
    """
    body = _body(data, transaction)
    parts = body.parts if body.last_resource is None else (*body.parts, body.last_resource)
    digits = body.ids.hex()
    branches = [
        Branch(
            Xid(
                log,
                MemberId(digits[start : start + 16]),
                transaction,
                BranchId(digits[start + 16 : start + 32]),
            ),
            part.participant,
            part.token,
        )
        for start, part in zip(range(0, len(digits), 32), parts, strict=True)
    ]
    last = None if body.last_resource is None else branches.pop()
    decision = Decision(body.verdict, tuple(branches), last)
    return decision, body.attachment


def verdict_of(data: bytes, *, transaction: TransactionId) -> Verdict:
    """The verdict alone, for less; raises `ValueError` where `decode` does."""
    return _body(data, transaction).verdict


def checksum(data: bytes, transaction: TransactionId) -> bytes:
    """What follows `data` in a record of this transaction."""
    return zlib.crc32(data, zlib.crc32(transaction.encode())).to_bytes(_CHECKSUM_BYTES, "big")


def _body(data: bytes, transaction: TransactionId) -> _Body:
    if data[:1] != _VERSION:
        found = f"format {data[0]}" if data else "no bytes"
        raise ValueError(
            f"the record of transaction {transaction} has {found}, and this version of Syncpoint "
            f"reads format {FORMAT_VERSION}: it is damaged, or a newer version wrote it"
        )
    try:
        if data[1:2] > _WITHOUT_CHECKSUM and _is_changed(data, transaction):
            raise ValueError("its checksum is another one")
        body = _decoder.decode(memoryview(data)[1:])
        count = len(body.parts) + (body.last_resource is not None)
        if len(body.ids) != 2 * BRANCH_BYTES * count:
            raise ValueError(f"{len(body.ids)} bytes of ids for {count} branches")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ValueError(f"the record of transaction {transaction} is damaged: {error}") from error
    return body


def _is_changed(data: bytes, transaction: TransactionId) -> bool:
    return data[-_CHECKSUM_BYTES:] != checksum(data[:-_CHECKSUM_BYTES], transaction)


def pack_transaction(transaction: TransactionId) -> bytes:
    """Sixteen bytes in the order of ids; raises `ValueError` for what is not an id."""
    packed = _from_hexadecimal(transaction.replace("-", ""))
    if len(packed) != TRANSACTION_BYTES:
        raise ValueError(f"{transaction!r} is not a transaction id: it needs 32 digits")
    return packed


def unpack_transaction(packed: bytes) -> TransactionId:
    """The id that `pack_transaction` was given."""
    if len(packed) != TRANSACTION_BYTES:
        raise ValueError(f"a transaction id has {TRANSACTION_BYTES} bytes, not {len(packed)}")
    digits = packed.hex()
    return TransactionId(
        f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
    )


def pack_branches(branches: Sequence[BranchId | MemberId]) -> bytes:
    """Eight bytes for each; raises `ValueError` for an id that is not in its canonical form."""
    digits = " ".join(branches)
    packed = _from_hexadecimal(digits)
    if packed.hex(" ", BRANCH_BYTES) != digits:
        raise ValueError(f"{digits!r} are not ids of sixteen lower-case hexadecimal digits")
    return packed


def unpack_branch(packed: bytes) -> BranchId:
    """One of the ids that `pack_branches` was given."""
    if len(packed) != BRANCH_BYTES:
        raise ValueError(f"a branch id has {BRANCH_BYTES} bytes, not {len(packed)}")
    return BranchId(packed.hex())


def _from_hexadecimal(digits: str) -> bytes:
    try:
        return bytes.fromhex(digits)
    except ValueError as error:
        raise ValueError(f"{digits!r} is no id: {error}") from error
