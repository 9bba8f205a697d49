"""Search all states within bounds: `python -m tests.exhaustive --help`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.exhaustive.bounds import LARGE, SMALL, Bounds
from tests.exhaustive.moves import Searched
from tests.exhaustive.planted import PLANTED
from tests.exhaustive.search import search


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.exhaustive", description=__doc__)
    parser.add_argument("--small", action="store_true", help="only what the tests search")
    parser.add_argument("--only", help="only the searches whose name contains this")
    parser.add_argument("--states", type=int, help="give up behind so many states of a search")
    parser.add_argument("--list", action="store_true", help="show the searches and their bounds")
    parser.add_argument("--bug-table", action="store_true", help="find every planted bug")
    parser.add_argument("--bug", choices=[each.name for each in PLANTED], help="tell its trace")
    arguments = parser.parse_args()
    if arguments.bug_table:
        return bug_table()
    if arguments.bug:
        return tell_bug(arguments.bug)
    searches = [("small", SMALL)] if arguments.small else [("small", SMALL), ("large", LARGE)]
    chosen = [
        (size, name, bounds)
        for size, named in searches
        for name, bounds in named.items()
        if not arguments.only or arguments.only in name
    ]
    if arguments.list:
        for size, name, bounds in chosen:
            print(f"{size}: {name}\n    {bounds}")
        return 0
    return run(chosen, arguments.states)


def run(chosen: list[tuple[str, str, Bounds]], states_most: int | None) -> int:
    """0 when every search came to its end and found nothing."""
    print("| search | states | moves | seconds | found |\n|---|---|---|---|---|")
    bad = 0
    for size, name, bounds in chosen:
        began = time.process_time()
        found = search(Searched(bounds), states_most, _progress)
        seconds = time.process_time() - began
        what = "nothing" if found.complete else f"nothing, but stopped at {states_most}"
        if found.violation is not None:
            what = str(found.violation)
        print(
            f"| {size}: {name} | {found.states:,} | {found.moves:,} | {seconds:.0f} | {what} |",
            flush=True,
        )
        if found.violation is not None:
            print(found.story())
        bad += found.violation is not None or not found.complete
    return 1 if bad else 0


def _progress(states: int, waiting: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{states:,} states, {waiting:,} wait", end="\r", file=sys.stderr, flush=True)


def bug_table() -> int:
    print(
        "| planted bug | rule that it breaks | found by | states | steps |\n|---|---|---|---|---|"
    )
    missed = 0
    for planted in PLANTED:
        found = planted.find()
        name = "**nothing**" if found.violation is None else found.violation.name
        missed += found.violation is None
        steps = sum(not line.startswith(" ") for line in found.trace)
        print(
            f"| {planted.name} | {planted.rule} | {name} | {found.states} | {steps} |", flush=True
        )
    return 1 if missed else 0


def tell_bug(name: str) -> int:
    planted = next(each for each in PLANTED if each.name == name)
    print(f"{planted.name}, against the rule that {planted.rule}\n\n{planted.find().story()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
