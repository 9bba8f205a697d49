"""How a transactional function relates to the transaction that it is called in.

The six kinds and their meanings are those of Jakarta Transactions (`@Transactional.TxType`).
"""

from __future__ import annotations

from enum import Enum, StrEnum

from coordinator.context import running
from coordinator.engine import Engine
from coordinator.errors import ConfigurationError, TransactionError
from coordinator.transactional import GlobalTransaction


class Propagation(StrEnum):
    """What a call does inside a transaction, and outside one."""

    REQUIRED = "required"
    """Joins; outside, begins."""
    REQUIRES_NEW = "requires_new"
    """Begins one of its own, which ends by itself, while the one outside waits."""
    MANDATORY = "mandatory"
    """Joins; outside, raises."""
    SUPPORTS = "supports"
    """Joins; outside, runs without."""
    NOT_SUPPORTED = "not_supported"
    """Runs without, while the one outside waits."""
    NEVER = "never"
    """Raises; outside, runs without."""

    @classmethod
    def read(cls, value: str) -> Propagation:
        """The kind of that name; `ConfigurationError` lists them all."""
        try:
            return cls(value)
        except ValueError:
            kinds = ", ".join(cls)
            raise ConfigurationError(f"propagation is {value!r}: it is one of {kinds}") from None


class Place(Enum):
    """Where a call runs."""

    JOINS = "in the transaction that runs"
    BEGINS = "in a transaction of its own"
    WITHOUT = "in no transaction"


def place_of(propagation: Propagation, what: str) -> Place:
    """Where a call of `what` runs just now; raises `TransactionError` where it must not run."""
    inside = running() is not None
    match propagation:
        case Propagation.REQUIRES_NEW:
            return Place.BEGINS
        case Propagation.NOT_SUPPORTED:
            return Place.WITHOUT
        case Propagation.REQUIRED:
            return Place.JOINS if inside else Place.BEGINS
        case Propagation.SUPPORTS:
            return Place.JOINS if inside else Place.WITHOUT
        case Propagation.MANDATORY:
            if not inside:
                raise TransactionError(
                    f"{what} has the propagation 'mandatory', but no transaction runs: call it "
                    "from a transactional function"
                )
            return Place.JOINS
        case Propagation.NEVER:
            if inside:
                raise TransactionError(
                    f"{what} has the propagation 'never', but it was called in a transaction"
                )
            return Place.WITHOUT


def joined(engine: Engine) -> GlobalTransaction:
    """The transaction that runs, if a call may join it; raises `TransactionError` if not."""
    outer = running()
    assert outer is not None
    if outer.is_over:
        raise TransactionError(
            f"{outer!r} is ending: a function that a stray task calls now can neither join it nor "
            "begin another in its place"
        )
    if not outer.belongs_to(engine):
        raise ConfigurationError(
            "a transaction of another coordinator is running here: two coordinators cannot make "
            "one atomic commit; use one coordinator for all participants"
        )
    return outer
