"""What people say: who says it and why, to be recorded and to be shown."""

from __future__ import annotations

import getpass
import os
import socket

from coordinator.commands.list_transactions import shown_age
from coordinator.engine import now_ms
from coordinator.errors import ConfigurationError, one_line
from coordinator.log.base import Word
from coordinator.model import Verdict, Xid


def read_reason(text: str) -> str:
    """Why a person does it, in one line; raises `ConfigurationError` for none."""
    if reason := one_line(text):
        return reason
    raise ConfigurationError("--reason is empty: say why, for those who ask later")


def said_now(subject: str, verdict: Verdict | None, reason: str) -> Word:
    """The word of the person at this terminal, who is told as user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container need not know its user by name
        user = str(os.getuid())
    return Word(subject, verdict, reason, f"{user}@{socket.gethostname()}", now_ms())


def shown_word(word: Word) -> str:
    """What a person said, who and when, in one line."""
    xid = Xid.parse(word.subject)
    about = "" if xid is None else f" branch {xid.branch}"
    verb = {None: "acknowledge", Verdict.COMMIT: "commit"}.get(word.verdict, "roll back")
    ago = shown_age(max(now_ms() - word.given_ms, 0) / 1000)
    return f"{verb}{about}, by {word.by} {ago} ago: {one_line(word.reason)}"
