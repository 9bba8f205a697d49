"""Power cuts: what the log in a file acknowledged is there afterwards.

    python -m tests.torture.power --cuts 30 [--controls 10] [--seed 1] [--kind ext4]

Two processes with sixteen proposers each decide on one log; then its file system loses power, comes
back, and everything that they were answered is looked for, also what former cuts left there. The
control is the same with `synchronous` OFF or NORMAL, a planted bug: it must lose something, or the
cuts would be none.

Exit code 0: nothing was lost, and the controls did lose. 1: otherwise. 3: this machine cannot do
it; what is missing is said.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import apsw
import msgspec

from coordinator.log.base import Unreadable, every_record
from coordinator.log.sqlite import SQLiteLog
from coordinator.model import Claim
from tests.crash.sqlite_process import shown
from tests.torture.disk import KINDS, CannotHere, Disk, enter_namespace, kinds_here

ROOT = Path(__file__).parents[2]
EXIT_LOST = 1
EXIT_CANNOT = 3
CUTS_A_DISK = 5
WORK_SECONDS = (0.1, 1.2)
START_SECONDS_MAX = 30.0
LINES_SHOWN = 5


class Answers(msgspec.Struct):
    """What was acknowledged until now, and what is wrong with that in itself."""

    decisions: dict[str, str] = msgspec.field(default_factory=dict)
    names: dict[str, str] = msgspec.field(default_factory=dict)
    wrong: list[str] = msgspec.field(default_factory=list)

    def add(self, data: bytes, before: float) -> int:
        """Take what one process was answered before a moment; returns how many decisions.

        A torn last line is none. What came later is left out: a process goes on for a moment after
        the cut, which no process does when the power is really gone.
        """
        count = 0
        for line in data.decode().split("\n")[:-1]:
            at, kind, rest = line.split(" ", 2)
            if kind == "unavailable" or float(at) >= before:
                continue
            name, _, value = rest.rpartition(" ")
            known = self.decisions if kind == "decision" else self.names
            count += kind == "decision"
            if known.setdefault(name, value) != value:
                self.wrong.append(f"{name} was answered {known[name]} and {value}")
        return count


class Held(msgspec.Struct, frozen=True):
    """What a log holds when it is opened again."""

    decisions: dict[str, str]
    names: dict[str, str]
    integrity: str


class Cut(msgspec.Struct, frozen=True):
    """One power cut: how many answers with a decision came before it, and what is wrong now."""

    acknowledged: int
    known: int
    """Decisions of this disk that were acknowledged until now, by all its cuts together."""
    wrong: tuple[str, ...]


async def held_by(path: Path, names: list[str]) -> Held:
    """Open the log as a service does, and read all of it."""
    log = SQLiteLog(path)
    await log.open()
    decisions, named = {}, {}
    async for record in every_record(log, unfinished_only=False):
        unreadable = isinstance(record, Unreadable)
        decisions[str(record.transaction)] = "?" if unreadable else shown(record.decision)
    for name in names:
        state = await log.read_key(Claim("key", name))
        if state.attempt is not None:
            named[name] = str(state.attempt.transaction)
    await log.close()
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    integrity = str(connection.pragma("integrity_check"))
    connection.close()
    return Held(decisions, named, integrity)


def compare(answers: Answers, held: Held) -> list[str]:
    """What does not stand as it was acknowledged. Pure."""
    wrong = list(answers.wrong)
    for kind, told, found in (
        ("decision of", answers.decisions, held.decisions),
        ("name under", answers.names, held.names),
    ):
        for name, value in told.items():
            if found.get(name) != value:
                stands = found.get(name, "nothing")
                wrong.append(f"the {kind} {name} was acknowledged as {value}: {stands} stands")
    if held.integrity != "ok":
        wrong.append(f"integrity_check says {held.integrity}")
    return wrong


class Place:
    """A disk with a log on it, which is cut again and again."""

    def __init__(self, disk: Disk, folder: Path, synchronous: str, draw: random.Random) -> None:
        self._disk = disk
        self._folder = folder
        self._synchronous = synchronous
        self._draw = draw
        self._answers = Answers()
        self._count = 0
        self._log = disk.place / "syncpoint.db"

    def cut(self) -> Cut:
        """Let two processes work for a while, cut the power, and see what is there."""
        self._count += 1
        files = [self._folder / f"answers-{self._count}-{name}" for name in ("one", "two")]
        asyncio.run(held_by(self._log, []))  # the file is there, as that of a running service
        first = str(self._count * 1_000_000)
        processes = [self._start(path, first) for path in files]
        try:
            self._wait_for(files)
            time.sleep(self._draw.uniform(*WORK_SECONDS))
            before = time.monotonic()
            self._disk.cut()
        finally:
            for process in processes:
                process.kill()
                process.wait()
        self._disk.unmount()
        self._disk.mount()
        acknowledged = sum(self._answers.add(path.read_bytes(), before) for path in files)
        try:
            held = asyncio.run(held_by(self._log, list(self._answers.names)))
        except Exception as error:
            wrong = [f"the log cannot be opened: {error}"]
        else:
            wrong = compare(self._answers, held)
        return Cut(acknowledged, len(self._answers.decisions), tuple(wrong))

    def _start(self, answers: Path, first: str) -> subprocess.Popen[bytes]:
        name = answers.name.rpartition("-")[2]
        arguments = [str(self._log), str(answers), self._synchronous, first, name]
        module = [sys.executable, "-m", "tests.torture.power_writer"]
        return subprocess.Popen([*module, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)

    def _wait_for(self, files: list[Path]) -> None:
        """Both work."""
        give_up = time.monotonic() + START_SECONDS_MAX
        while not all(path.exists() and path.stat().st_size for path in files):
            if time.monotonic() > give_up:
                raise RuntimeError("the processes that were to write the log did not start")
            time.sleep(0.01)


class Series(msgspec.Struct, frozen=True):
    """All cuts of one kind of file system with one setting."""

    kind: str
    synchronous: str
    cuts: tuple[Cut, ...]

    @property
    def bad(self) -> list[Cut]:
        return [cut for cut in self.cuts if cut.wrong]

    @property
    def row(self) -> str:
        acknowledged = sum(cut.acknowledged for cut in self.cuts)
        return (
            f"| {self.kind} | {self.synchronous} | {len(self.cuts)} | {acknowledged} "
            f"| {len(self.bad)} | {sum(len(cut.wrong) for cut in self.cuts)} |"
        )


def run_series(kind: str, synchronous: str, cuts: int, seed: int) -> Series:
    """A fresh disk for every few cuts; a control gets one for each, since it loses everything."""
    draw = random.Random(f"{seed} {kind} {synchronous}")
    each = CUTS_A_DISK if synchronous == "FULL" else 1
    done: list[Cut] = []
    while len(done) < cuts:
        with tempfile.TemporaryDirectory(prefix="syncpoint-power-") as name:
            folder = Path(name)
            with Disk(kind, folder) as disk:
                place = Place(disk, folder, synchronous, draw)
                for _ in range(min(each, cuts - len(done))):
                    done.append(place.cut())
                    _tell(kind, synchronous, len(done), done[-1])
    return Series(kind, synchronous, tuple(done))


def _tell(kind: str, synchronous: str, number: int, cut: Cut) -> None:
    wrong = f"{len(cut.wrong)} WRONG" if cut.wrong else "all there"
    print(
        f"{kind}, synchronous = {synchronous}, cut {number}: {cut.acknowledged} answers, "
        f"{cut.known} decisions with those of the cuts before: {wrong}",
        flush=True,
    )
    if synchronous == "FULL":
        for line in cut.wrong[:LINES_SHOWN]:
            print(f"    {line}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.power")
    parser.add_argument("--cuts", type=int, default=30)
    parser.add_argument("--controls", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, help="every one that is there, if not given")
    arguments = parser.parse_args()
    try:
        enter_namespace()
        kinds = kinds_here([arguments.kind] if arguments.kind else list(KINDS))
    except CannotHere as reason:
        print(f"power cuts cannot be tried here: {reason}", file=sys.stderr)
        return EXIT_CANNOT
    found: list[Series] = []
    for kind in kinds:
        found.append(run_series(kind, "FULL", arguments.cuts, arguments.seed))
        for number, planted in enumerate(("OFF", "NORMAL")):
            controls = (arguments.controls + 1 - number) // 2
            found.append(run_series(kind, planted, controls, arguments.seed))
    return conclude([series for series in found if series.cuts])


def conclude(found: list[Series]) -> int:
    """Print the table; returns the exit code."""
    print("\n| file system | synchronous | cuts | answers | cuts with losses | losses |")
    print("|---|---|---|---|---|---|")
    for series in found:
        print(series.row)
    lost = [series for series in found if series.synchronous == "FULL" and series.bad]
    real = {series.kind for series in found if series.synchronous != "FULL" and series.bad}
    unreal = {series.kind for series in found} - real
    if lost:
        print("acknowledged decisions were lost")
    if unreal:
        print(f"no control on {', '.join(sorted(unreal))} lost anything: these cuts are none")
    if not lost and not unreal:
        print("nothing acknowledged was lost; the controls lost, so the cuts are real")
    return EXIT_LOST if lost or unreal else 0


if __name__ == "__main__":
    sys.exit(main())
