"""The torture from the command line.

    python -m tests.torture --minutes 3 [--seed 7] [--clients 32]
    python -m tests.torture check FOLDER

The first runs it and says what was found; Ctrl-C ends the faults, and what ran so far is judged.
The second judges a folder once more. Exit code 0: nothing is wrong; 1: something is.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.torture.run import Judgement, judge, torture
from tests.torture.values import Options

VIOLATIONS_SHOWN = 20


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    if sys.argv[1:2] == ["check"]:
        parser = argparse.ArgumentParser(prog="python -m tests.torture check")
        parser.add_argument("folder", type=Path)
        return show(judge(parser.parse_args(sys.argv[2:]).folder))
    parser = argparse.ArgumentParser(prog="python -m tests.torture")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where to keep everything, also of a success")
    arguments = parser.parse_args()
    seed = random.randrange(1_000_000) if arguments.seed is None else arguments.seed
    options = Options(seed=seed, seconds=60 * arguments.minutes, clients=arguments.clients)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="syncpoint-torture-"))
    again = f"python -m tests.torture --minutes {arguments.minutes:g} --seed {seed}"
    again += f" --clients {arguments.clients}"
    say(f"seed {seed}: {options.clients} clients in {options.processes} processes, in {folder}")
    try:
        asyncio.run(_run(options, folder))
        code = show(judge(folder))
    except BaseException:
        say(f"the run itself failed; everything is in {folder}\nrun it again: {again}")
        raise
    if code:
        say(f"everything is in {folder}\ncheck it again: python -m tests.torture check {folder}")
        say(f"run it again: {again}")
    elif arguments.folder is None:
        shutil.rmtree(folder)
    return code


async def _run(options: Options, folder: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    await torture(options, folder, say, stop=stop)


def show(judgement: Judgement) -> int:
    """Say what was found; returns the exit code."""
    say(judgement.seen)
    for violation in judgement.violations[:VIOLATIONS_SHOWN]:
        say(f"VIOLATION {violation}")
    if len(judgement.violations) > VIOLATIONS_SHOWN:
        say(f"... and {len(judgement.violations) - VIOLATIONS_SHOWN} more")
    say("nothing is wrong" if not judgement.violations else "something is wrong")
    return 1 if judgement.violations else 0


if __name__ == "__main__":
    sys.exit(main())
