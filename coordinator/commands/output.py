"""Where commands print: results on stdout, progress and errors on stderr.

Colour, width and moving bars follow what is at the other end: a terminal gets all of them, a file
or a CI log gets plain lines.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

WIDTH_MAX = 100


def results() -> Console:
    """The console for stdout; lines of prose stay readable on a very wide terminal."""
    console = Console(highlight=False)
    if console.width > WIDTH_MAX:
        console = Console(highlight=False, width=WIDTH_MAX)
    return console


def messages() -> Console:
    """The console for stderr."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One object on one line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def progress_bar(console: Console) -> Progress:
    """A bar that is drawn on a terminal only, and leaves nothing behind."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
