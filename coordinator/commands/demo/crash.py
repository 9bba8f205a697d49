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

REACHED = "reached"
REACH_SECONDS_MAX = 30.0


class CrashMissed(Exception):
    """The program ended, or went on for too long, without reaching the place."""


def kill_at(module: str, *arguments: str) -> int:
    """Run a Python module until it says that it has reached the place, and kill it there.

    Returns the process id that was killed; raises `CrashMissed` with what the program said.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            in_time = bool(selector.select(REACH_SECONDS_MAX))
        said = process.stdout.readline().strip() if in_time else ""
        process.send_signal(signal.SIGKILL)
        process.wait()
        if said != REACHED or process.returncode != -signal.SIGKILL:
            complaint = process.stderr.read().strip().splitlines()
            raise CrashMissed(complaint[-1] if complaint else f"it said {said!r}")
        return process.pid
    finally:
        process.kill()
        process.communicate()


def wait_to_be_killed() -> None:
    """Say that the place is reached, and do nothing more."""
    sys.stdout.write(REACHED + "\n")
    sys.stdout.flush()
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)  # whoever started this program is gone
