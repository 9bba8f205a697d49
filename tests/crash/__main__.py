"""Run the matrix of crash points, or part of it: `python -m tests.crash --help`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.crash.batch import Batch, batches
from tests.crash.matrix import Case, Fault, Way, all_cases
from tests.crash.nursery import Nursery
from tests.crash.place import Place, two_servers
from tests.crash.planted import PLANTED


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--all", action="store_true", help="the whole matrix, then the table")
    parser.add_argument("--rounds", type=int, default=1, help="how often")
    parser.add_argument("--only", default="", help="the cases whose names contain this text")
    parser.add_argument("--list", action="store_true", help="name the cases and run nothing")
    parser.add_argument("--bugs", action="store_true", help="what finds each planted bug")
    arguments = parser.parse_args()
    cases = [case for case in all_cases() if arguments.only in case.name]
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not (arguments.all or arguments.only or arguments.bugs):
        parser.error("give --all, --only TEXT, --list or --bugs")
    with (
        tempfile.TemporaryDirectory() as folder,
        two_servers() as servers,
        Nursery(Path(folder)) as nursery,
    ):
        place = Place(servers, nursery, Path(folder))
        return show_bugs(place) if arguments.bugs else run(place, cases, arguments.rounds)


def run(place: Place, cases: list[Case], rounds: int) -> int:
    """Run them, print what is wrong as it is found, and the table; 1 if anything was wrong."""
    began = time.monotonic()
    wrong: Counter[tuple[Way, Fault]] = Counter()
    failures = 0
    for number in range(rounds):
        for batch in batches(cases):
            result = asyncio.run(Batch(place, batch).run())
            failures += len(result.wrong)
            wrong.update((case.way, case.fault) for case in batch if case.name in result.wrong)
            for name, found in result.wrong.items():
                print(f"round {number + 1}: {name}:", *found, sep="\n    ", flush=True)
    seconds = time.monotonic() - began
    print_table(cases, rounds, wrong)
    print(f"{rounds * len(cases)} cases in {seconds:.0f} s, {failures} wrong")
    return 1 if failures else 0


def print_table(cases: list[Case], rounds: int, wrong: Counter[tuple[Way, Fault]]) -> None:
    """Ways against faults: how many cases, and how many of them were wrong."""
    counted = Counter((case.way, case.fault) for case in cases)
    print("|", " | ".join(["way", *Fault, "all"]), "|")
    print("|", "---|" * (len(Fault) + 2))
    for way in Way:
        cells = [
            f"{rounds * counted[way, fault] or ''}"
            + (f" ({wrong[way, fault]} wrong)" if wrong[way, fault] else "")
            for fault in Fault
        ]
        total = rounds * sum(counted[way, fault] for fault in Fault)
        print("|", " | ".join([way, *cells, str(total)]), "|")
    totals = [str(rounds * sum(counted[way, fault] for way in Way)) for fault in Fault]
    print("|", " | ".join(["all", *totals, str(rounds * len(cases))]), "|")


def show_bugs(place: Place) -> int:
    """A line for each planted bug; 1 if one was not found by what must find it."""
    missed = 0
    for name, bug in PLANTED.items():
        result = asyncio.run(Batch(place, [bug.case], planted=name).run())
        found = [each for wrong in result.wrong.values() for each in wrong]
        names = sorted({each.partition(":")[0] for each in found if ":" in each})
        hit = any(each.startswith(f"{bug.found_by}:") for each in found)
        missed += not hit
        print(f"| {name} | {bug.case.name} | {', '.join(names)}{'' if hit else ' MISSED'} |")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
