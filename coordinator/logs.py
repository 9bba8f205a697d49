"""What is written to the logs of a program, and how programs of our own show it.

Records go to loggers of the standard library, under the names in `docs/logs.md`. Every record about
a transaction has its id in the field `transaction`, and in `what` a word for what has happened.

A log never holds what the work of users holds. So it has the class of an exception that user code,
a user's statement or a vote has raised, its SQLSTATE and its place, but never its text, which may
quote a row; the same holds for the reason that comes with a vote. What is said of the statements
of the protocol itself, which carry nothing of users, is logged as it is.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any, Literal

from coordinator.model import Branch, TransactionId, Xid

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def note(
    logger: logging.Logger, level: int, what: str, message: str, *arguments: object, **fields: Any
) -> None:
    """Log a record; `fields` become attributes of it beside `what`, but for `exc_info`."""
    if logger.isEnabledFor(level):
        error = fields.pop("exc_info", None)
        logger.log(level, message, *arguments, exc_info=error, extra={"what": what, **fields})


def say(
    logger: logging.Logger,
    level: int,
    transaction: TransactionId,
    what: str,
    message: str,
    *arguments: object,
    **fields: Any,
) -> None:
    """Log a record about a transaction."""
    if logger.isEnabledFor(level):
        message = f"transaction {transaction}: {message}"
        note(logger, level, what, message, *arguments, transaction=transaction, **fields)


def say_of(
    logger: logging.Logger,
    level: int,
    participant: str,
    xid: Xid,
    what: str,
    message: str,
    **fields: Any,
) -> None:
    """Log a record about a branch. The participant and the fields fill in the message, in order."""
    if logger.isEnabledFor(level):
        arguments = (participant, *fields.values())
        named = {"participant": participant, "branch": xid.branch, **fields}
        say(logger, level, xid.transaction, what, message, *arguments, **named)


def retry_level(attempt: int) -> int:
    """At which level a failed attempt is said: the 1st, the 10th and the 100th are warnings."""
    return logging.WARNING if attempt in (1, 10, 100) else logging.DEBUG


def of(branch: Branch) -> dict[str, str]:
    """The fields that name a branch."""
    return {"participant": branch.participant, "branch": branch.id}


def kind_of(error: BaseException) -> str:
    """The exception's class, and the SQLSTATE that it or its causes carry; never its text."""
    cause: BaseException | None = error
    while cause is not None:
        state = getattr(cause, "sqlstate", None)
        if isinstance(state, str):
            return f"{type(error).__name__} (SQLSTATE {state})"
        cause = cause.__cause__
    return type(error).__name__


def place_of(error: BaseException) -> str:
    """Where it was raised, without the text that it and its causes carry."""
    frames = traceback.extract_tb(error.__traceback__)
    return " > ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)


_shown: logging.Handler | None = None


def show(level: Level | None, form: Format = "text") -> None:
    """Show our records from `level` on, and warnings of everybody else, on stderr.

    For programs of our own; the last call counts, and a level of None leaves it. Where a program
    has set up logging itself its handlers stay, and only the level of our loggers is set.
    """
    global _shown
    root = logging.getLogger()
    if _shown is not None:
        root.removeHandler(_shown)
    if not root.handlers:
        _shown = logging.StreamHandler()
        _shown.setFormatter(_json() if form == "json" else logging.Formatter(TEXT))
        root.addHandler(_shown)
    if level is not None:
        logging.getLogger("syncpoint").setLevel(level.upper())


def _json() -> logging.Formatter:
    """One object a line: time, level, logger, message, then the fields of the record."""
    import structlog  # only here, since it takes a while

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
    )
