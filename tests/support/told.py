"""What happened to a transaction, told again from captured log records and from nothing else."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

ID = re.compile(r"\btransaction ([0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12})")


@dataclass
class Told:
    """One transaction. `decided` is each answer of the log: what stands, and whether we wrote it.

    `heard` is what the caller was told: the outcome, and the exception's class.
    """

    took_part: set[str] = field(default_factory=set)
    votes: dict[str, str] = field(default_factory=dict)
    proposed: list[str] = field(default_factory=list)
    decided: list[tuple[str, bool | None]] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)
    outcome: str | None = None
    heard: tuple[str, str | None] | None = None


class Records(logging.Handler):
    """Everything that our loggers say, from DEBUG on."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append(record)

    def of(self, transaction: str) -> list[Any]:
        """By the field, never by the text."""
        return [each for each in self.all if getattr(each, "transaction", None) == transaction]

    def whats(self, transaction: str) -> list[str]:
        return [record.what for record in self.of(transaction)]

    def one(self, what: str, transaction: str | None = None) -> Any:
        """The only record of that word; fails if there are others, or none."""
        records = self.all if transaction is None else self.of(transaction)
        (record,) = [each for each in records if getattr(each, "what", None) == what]
        return record

    def transactions(self) -> list[str]:
        """Every id, in the order of the first record."""
        ids = [getattr(each, "transaction", None) for each in self.all]
        return list(dict.fromkeys(each for each in ids if each is not None))

    def told(self, transaction: str) -> Told:
        """Read in order, by the fields alone."""
        told = Told()
        for record in self.of(transaction):
            match record.what:
                case "enlisted":
                    told.took_part.add(record.participant)
                case "voted":
                    assert record.participant not in told.votes, "told twice"
                    told.votes[record.participant] = str(record.vote)
                case "proposed":
                    told.proposed.append(str(record.verdict))
                case "decided":
                    told.decided.append((str(record.verdict), record.ours))
                case "finished":
                    told.ended[record.participant] = str(record.ending)
                case "ended":
                    told.outcome = str(record.outcome)
                case "told":
                    assert told.heard is None, "told twice"
                    told.heard = (str(record.outcome), record.error)
        return told

    def texts(self) -> str:
        """Every record as any handler could see it: message, arguments, fields, traceback."""
        formatter = logging.Formatter()
        return "\n".join(f"{formatter.format(each)} {vars(each)!r}" for each in self.all)


@contextmanager
def recording() -> Iterator[Records]:
    """Records at DEBUG. At the end: each record has a word, and the id that its text names."""
    records, logger = Records(), logging.getLogger("syncpoint")
    level = logger.level
    logger.addHandler(records)
    logger.setLevel(logging.DEBUG)
    try:
        yield records
    finally:
        logger.setLevel(level)
        logger.removeHandler(records)
    for record in records.all:
        assert getattr(record, "what", None), f"{record.name} said {record.getMessage()!r} alone"
        named = ID.search(record.getMessage())
        assert named is None or named[1] == getattr(record, "transaction", None), (
            record.getMessage()
        )


@pytest.fixture
def records() -> Iterator[Records]:
    """What our loggers say during the test."""
    with recording() as records:
        yield records
