"""Crashes to order: a program says where it is and waits there, and is killed with `kill -9`.

The program prints one line when it has reached the place and then waits for its standard input to
end. So it stays exactly there until it is killed, and never outlives the one who started it.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

REACHED = "reached"
REACH_SECONDS_MAX = 30.0


class CrashMissed(Exception):
    """The program ended, or went on for too long, without reaching the place."""


def kill_at(module: str, *arguments: str) -> int:
    """Run a Python module until it says that it has reached the place, and kill it there.

    Returns the process id that was killed; raises `CrashMissed` with what the program said.
    """
    with stopped_at(module, *arguments) as process:
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise CrashMissed(f"it ended with {process.returncode} before it could be killed")
        return process.pid


@contextmanager
def stopped_at(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a Python module that is alive at its place during the block, and killed at its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _wait_until_reached(process)
        yield process
    finally:
        process.kill()
        process.communicate()


def _wait_until_reached(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stderr is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        in_time = bool(selector.select(REACH_SECONDS_MAX))
    said = process.stdout.readline().strip() if in_time else ""
    if said != REACHED:
        process.kill()
        complaint = process.stderr.read().strip().splitlines()
        raise CrashMissed(complaint[-1] if complaint else f"the program said {said!r}")


def wait_to_be_killed() -> None:
    """Say that the place is reached, and do nothing more."""
    sys.stdout.write(REACHED + "\n")
    sys.stdout.flush()
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)  # whoever started this program is gone
