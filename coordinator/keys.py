"""Idempotency keys: one key commits once, whichever process it comes to.

A key names its current attempt in the log before that attempt may prepare. The next attempt begins
only when the former's abort stands recorded, by compare-and-set on the name; within the owner's
time a second caller waits. A commit takes the key as a claim in the same log write, and the claim
outlives the record. `docs/design.md` section 4 has the reasons.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from coordinator.driver import Driver
from coordinator.engine import Engine, now_ms
from coordinator.errors import (
    AlreadyDecided,
    ConfigurationError,
    TransactionAborted,
    TransactionError,
)
from coordinator.log.base import Attempt, BelowHorizon, KeyState, Proposal
from coordinator.logs import say
from coordinator.model import ABORT, Claim, Outcome, TransactionId, id_time_ms

logger = logging.getLogger("syncpoint.keys")

KEY_BYTES_MAX = 512
RESULT_BYTES_MAX = 64 * 1024
POLL_SECONDS_FIRST = 0.01
POLL_SECONDS_MOST = 0.25
SPACE = "key"


def check_key(key: object) -> str:
    """The key, or `ConfigurationError` saying what a key may be."""
    if not isinstance(key, str):
        raise ConfigurationError(
            f"an idempotency key is text, not {type(key).__name__} ({key!r:.80}): convert it, for "
            "instance with str()"
        )
    try:
        size = len(key.encode())
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"idempotency key {key!r:.80} is no text: {error}") from None
    if not 1 <= size <= KEY_BYTES_MAX:
        raise ConfigurationError(
            f"an idempotency key has 1 to {KEY_BYTES_MAX} bytes, this one {size}: {key!r:.80}"
        )
    return key


def refuse_to_join(key: str | None) -> None:
    """A key decides about a whole transaction, so a body that has one cannot join another."""
    if key is not None:
        raise TransactionError(
            f"idempotency key {key!r} needs a transaction of its own, but one is running: call it "
            "outside, or with propagation='requires_new'"
        )


async def begin_under(engine: Engine, key: str, timeout: float) -> Driver:
    """Begin the key's next attempt when its turn has come; `timeout` in seconds from now.

    Raises `AlreadyDecided` if the key has committed, `TransactionAborted` (retryable) if another
    attempt had it until the deadline, and what `engine.begin` raises.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    claim, expected = Claim(SPACE, check_key(key)), None
    while True:
        transaction = engine.draw()
        attempt = Attempt(transaction, int(timeout * 1000), engine.member)
        state = await engine.log.name_attempt(claim, attempt, expected)
        if state.committed and state.holder is not None:
            _say(state.holder, "repeated", "key %r was committed by it: a repeat ends here", key)
            raise AlreadyDecided(
                key,
                transaction_id=state.holder,
                outcome=Outcome.COMMITTED,
                attachment=state.attachment,
            )
        if state.holder is None and state.attempt == attempt:
            left = deadline - loop.time()
            _say(transaction, "attempt", "has its turn under key %r", key)
            return engine.begin(left, (claim,), transaction)
        expected = await _Former(engine, key, state, deadline).ended()


class _Former:
    """The attempt that has the key now, waited for and then ended."""

    def __init__(self, engine: Engine, key: str, state: KeyState, deadline: float) -> None:
        self._engine = engine
        self._key = key
        self._state = state
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._free_at = self._loop.time() + _seconds_left(state.attempt)

    async def ended(self) -> TransactionId | None:
        """Its id once it can commit no more or has; None if there is no name at all."""
        attempt = self._state.attempt
        transaction = self._state.holder or (attempt.transaction if attempt is not None else None)
        if transaction is None:
            return None
        _say(transaction, "awaited", "has key %r, for which another attempt waits", self._key)
        pause = POLL_SECONDS_FIRST
        while True:
            reading = await self._engine.log.read(transaction)
            record = reading.record
            if record is None and transaction < reading.horizon:
                return transaction
            if record is not None and not record.unresolved:
                return transaction
            if record is None and await self._is_over():
                message = "its time under key %r is over, or its owner dead: abort is proposed"
                _say(transaction, "superseded", message, self._key)
                answer = await self._engine.log.propose(Proposal(transaction, ABORT))
                if isinstance(answer, BelowHorizon):
                    return transaction
                continue
            await self._sleep(pause, transaction)
            pause = min(pause * 2, POLL_SECONDS_MOST)

    async def _is_over(self) -> bool:
        """Its owner's time is over, or its owner dead.

        To be wrong about that, by a clock or about a member, harms only the former attempt.
        """
        if self._loop.time() >= self._free_at:
            return True
        attempt = self._state.attempt
        return attempt is not None and attempt.member not in await self._engine.members.alive()

    async def _sleep(self, pause: float, transaction: TransactionId) -> None:
        left = self._deadline - self._loop.time()
        if left <= 0:
            raise TransactionAborted(
                f"idempotency key {self._key!r} is in use by transaction {transaction}, which did "
                "not end before the deadline",
                retryable=True,
            )
        await asyncio.sleep(min(pause, left))


def _say(transaction: TransactionId, what: str, message: str, key: str) -> None:
    say(logger, logging.DEBUG, transaction, what, message, key, key=key)


def _seconds_left(attempt: Attempt | None) -> float:
    if attempt is None:
        return 0.0
    age_ms = max(now_ms() - id_time_ms(attempt.transaction), 0)
    return max(attempt.timeout_ms - age_ms, 0) / 1000


def encode_result(result: object, what: str) -> bytes:
    """A result as bytes; raises `TransactionError` for what cannot be recorded."""
    try:
        data = msgspec.json.encode(result)
    except (TypeError, ValueError, OverflowError) as error:
        raise TransactionError(
            f"the result of {what} cannot be recorded ({error}): return plain values, dataclasses "
            "or msgspec structs, or leave record_result out"
        ) from error
    if len(data) > RESULT_BYTES_MAX:
        raise TransactionError(
            f"the result of {what} has {len(data)} bytes: at most {RESULT_BYTES_MAX} can be "
            "recorded; return an id and read the rest by it"
        )
    return data


def decode_result(attachment: bytes, kind: Any, what: str) -> Any:
    """The first result of that type; raises `TransactionError` if it does not fit any more."""
    try:
        return msgspec.json.decode(attachment, type=kind)
    except msgspec.MsgspecError as error:
        raise TransactionError(
            f"the recorded result of {what} does not fit its return type: {error}"
        ) from error
