"""The story itself: chapters in their order, and what must be true in each.

It computes everything that it tells. `NotAsTold` ends it with exit code 1; the servers and the
processes that it started are gone at the end in any case.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import psycopg
from rich.console import Console

from coordinator.commands.demo.crash import CrashMissed, kill_at
from coordinator.commands.demo.narrator import Narrator, NotAsTold, comparison
from coordinator.commands.demo.stage import ACCOUNTS, BALANCE, Stage, set_stage
from coordinator.commands.demo.traffic import AT_ONCE, run_traffic, transfer_once
from coordinator.commands.demo.transfer import BEFORE_DECISION, BETWEEN_COMMITS
from coordinator.commands.output import progress_bar, results
from coordinator.errors import ConfigurationError, TransactionError, one_line
from coordinator.model import Xid

ACCOUNT = 7
AMOUNT = 100
NEXT_TRANSFER_SECONDS_MAX = 2.0


class Crash(msgspec.Struct):
    """What one killed transfer left, and what became of it."""

    who: str
    before: int
    after: int
    in_doubt: list[str]
    blocked: str
    at_the_end: int = 0
    in_doubt_left: int = 0
    locks_left: int = 0
    recovery_seconds: float | None = None
    next_transfer: str = ""


def run(*, transfers: int, keep: bool) -> int:
    """Tell the story; 0 if all of it was true, 1 if not."""
    narrator = Narrator(results())
    try:
        _tell(narrator, transfers, keep)
    except (ConfigurationError, BrokenPipeError):
        raise
    except (
        NotAsTold, CrashMissed, TransactionError, psycopg.Error, ExceptionGroup, OSError
    ) as error:  # fmt: skip
        narrator.bad(f"This did not come out as told: {one_line(error)}")
        return 1
    return 0


def _tell(narrator: Narrator, transfers: int, keep: bool) -> None:
    narrator.title("Syncpoint: all of it or none of it")
    narrator.say(
        """Money leaves one database and arrives in another. Both must happen, or neither,
        whatever is killed and whenever. This is what that takes, on real servers."""
    )
    narrator.chapter("Two real databases")
    began = time.monotonic()
    with set_stage() as stage, tempfile.TemporaryDirectory(prefix="syncpoint-demo-") as folder:
        _introduce(narrator, stage, time.monotonic() - began)
        config = stage.write_config(Path(folder))
        narrator.chapter(f"{transfers} transfers with Syncpoint")
        _run_traffic(narrator, stage, config, transfers)
        narrator.chapter("The crash, with code written by hand")
        by_hand = _crash_by_hand(narrator, stage)
        narrator.chapter("The same crash, with Syncpoint")
        between = _crash_between_commits(narrator, stage, config)
        narrator.chapter("Killed a little earlier, with Syncpoint")
        earlier = _crash_before_decision(narrator, stage, config)
        narrator.chapter("What was found")
        _compare(narrator, [by_hand, between, earlier])
        if keep:
            _keep(narrator, stage, config)


def _introduce(narrator: Narrator, stage: Stage, seconds: float) -> None:
    narrator.say(
        f"""Started two PostgreSQL {stage.version} servers in {seconds:.1f} s, without root and
        without Docker. They know nothing of each other."""
    )
    for database in stage.databases:
        where = f"127.0.0.1:{database.server.port}"
        narrator.good(
            f"{database.name}: {where}, {ACCOUNTS} accounts with {_money(BALANCE)} in each"
        )
    narrator.say(
        f"All the money in both together: {_money(stage.total())}. It must be the same at the end."
    )


def _run_traffic(narrator: Narrator, stage: Stage, config: Path, transfers: int) -> None:
    before = stage.total()
    with progress_bar(narrator.console) as bar:
        task = bar.add_task("transfers", total=transfers)
        seconds = asyncio.run(run_traffic(config, transfers, lambda: bar.advance(task)))
    narrator.say(
        f"""{transfers} transfers, {AT_ONCE} at a time, each of them a change in both databases:
        {seconds:.1f} s, {transfers / seconds:,.0f} a second."""
    )
    narrator.expect(stage.total() == before, "the transfers changed the amount of money")
    narrator.expect(not stage.prepared(), "a transfer that had ended left a branch in doubt")
    narrator.good(f"All the money together: {_money(stage.total())}. Nothing is left in doubt.")


def _crash_by_hand(narrator: Narrator, stage: Stage) -> Crash:
    narrator.say(
        f"""Databases have a tool for this. Each is asked to PREPARE, which is a promise that it can
        commit whatever happens; when both have promised, each is told to COMMIT. One transfer of
        {AMOUNT} from account {ACCOUNT} in accounts to account {ACCOUNT} in ledger, as the usual
        code does it:"""
    )
    before = stage.total()
    process = kill_at(
        "coordinator.commands.demo.handwritten",
        stage.accounts.url, stage.ledger.url, str(ACCOUNT), str(AMOUNT),
    )  # fmt: skip
    narrator.code(
        f"""
        accounts  BEGIN; UPDATE account ...; PREPARE TRANSACTION '...'
        ledger    BEGIN; UPDATE account ...; PREPARE TRANSACTION '...'
        accounts  COMMIT PREPARED '...'
                  kill -9 {process}
        ledger    COMMIT PREPARED '...'   never sent
        """
    )
    crash = _look(narrator, stage, "by hand", before)
    _expect_half(narrator, stage, crash)
    narrator.bad(f"Left behind in ledger: {crash.in_doubt[0]}")
    narrator.say(
        """Nothing says which transfer that name belongs to, whether its other half was committed
        or rolled back, or who should do what. The program is gone, and it had written nothing
        down."""
    )
    stage.ledger.restart()
    crash.in_doubt_left, crash.locks_left = len(stage.prepared()), stage.orphaned_locks()
    still_blocked, _ = stage.ledger.try_to_move(ACCOUNT)
    narrator.expect(
        crash.in_doubt_left == 1 and bool(still_blocked), "the restart ended the branch in doubt"
    )
    narrator.bad("The server was restarted: the branch and its lock are still there.")
    _guess(narrator, stage, crash)
    return crash


def _guess(narrator: Narrator, stage: Stage, crash: Crash) -> None:
    narrator.say(
        """It stays so until a person notices, and decides without knowing. We play that person,
        and believe in commit:"""
    )
    narrator.code(f"ledger    COMMIT PREPARED '{crash.in_doubt[0]}'")
    stage.ledger.commit_prepared(crash.in_doubt[0])
    crash.at_the_end, crash.next_transfer = stage.total(), crash.blocked
    narrator.expect(crash.at_the_end == crash.before, "the guess did not bring the money back")
    narrator.say(
        f"""All the money together: {_money(crash.at_the_end)} again. But that was a guess:
        rolled back, it would have stayed at {_money(crash.after)}."""
    )


def _crash_between_commits(narrator: Narrator, stage: Stage, config: Path) -> Crash:
    narrator.say("The same transfer on the same servers. This is the whole of its code:")
    narrator.code(
        """
        @coordinator.transactional(timeout=10)
        async def transfer(source: int, target: int, amount: int) -> None:
            connection = await accounts.connection()
            await connection.execute(MOVE, (-amount, source))
            connection = await ledger.connection()
            await connection.execute(MOVE, (amount, target))
        """
    )
    before = stage.total()
    process = _kill_service(config, BETWEEN_COMMITS)
    narrator.say(f"Killed with kill -9 (process {process}) at the same place: between the COMMITs.")
    crash = _look(
        narrator, stage, "Syncpoint, between the COMMITs", before, gone="gone for the moment"
    )
    _expect_half(narrator, stage, crash)
    narrator.bad(f"In doubt in ledger: {crash.in_doubt[0]}")
    narrator.expect(Xid.parse(crash.in_doubt[0]) is not None, "the branch does not name its log")
    narrator.say(
        """This name says whose it is: sp:<log>:<member>:<transaction>:<branch>. That log holds the
        decision on that transaction, and it was on the disk before the first COMMIT was sent.
        Nobody has to guess:"""
    )
    _recover(narrator, stage, config, crash, expected_total=before)
    narrator.say(
        """The transfer is complete: what was decided was done. A running service needs no command
        for this: the sweep of any of its processes does the same within seconds."""
    )
    return crash


def _crash_before_decision(narrator: Narrator, stage: Stage, config: Path) -> Crash:
    narrator.say("Once more, killed when both databases have promised but nothing is decided yet:")
    before, balance = stage.total(), stage.accounts.balance(ACCOUNT)
    process = _kill_service(config, BEFORE_DECISION)
    narrator.code(f"kill -9 {process}")
    crash = _look(narrator, stage, "Syncpoint, before the decision", before)
    narrator.expect(len(crash.in_doubt) == 2, f"{len(crash.in_doubt)} branches in doubt, not two")
    narrator.expect(crash.after == before, "money moved before the decision")
    for database in stage.databases:
        narrator.bad(f"In doubt in {database.name}: {', '.join(database.prepared())}")
    _recover(narrator, stage, config, crash, expected_total=before)
    # Recovery is followed by one transfer, which moves the amount once.
    undone = stage.accounts.balance(ACCOUNT) == balance - AMOUNT
    narrator.expect(undone, "the transfer that was never decided was applied")
    narrator.say("Rolled back on both sides, as if it had never begun: nobody had decided it.")
    return crash


def _kill_service(config: Path, point: str) -> int:
    return kill_at(
        "coordinator.commands.demo.transfer", str(config), point, str(ACCOUNT), str(AMOUNT)
    )


def _look(narrator: Narrator, stage: Stage, who: str, before: int, gone: str = "gone") -> Crash:
    """What is there right after a crash, and whether the next transfer gets through."""
    blocked, seconds = stage.ledger.try_to_move(ACCOUNT)
    crash = Crash(who, before, stage.total(), stage.prepared(), blocked)
    missing = before - crash.after
    money = f"All the money together: {_money(crash.after)}."
    narrator.bad(f"{money} {_money(missing)} are {gone}." if missing else money)
    narrator.expect(bool(blocked), "the branch in doubt does not block the next transfer")
    narrator.bad(f'The next transfer to that account fails after {seconds:.1f} s: "{blocked}"')
    return crash


def _expect_half(narrator: Narrator, stage: Stage, crash: Crash) -> None:
    """Killed between the two commits: the one side is done, the other in doubt."""
    narrator.expect(crash.after == crash.before - AMOUNT, f"{AMOUNT} should be gone for now")
    narrator.expect(
        len(crash.in_doubt) == 1 and crash.in_doubt == stage.ledger.prepared(),
        f"{len(crash.in_doubt)} branches are in doubt, not one in ledger",
    )


def _recover(
    narrator: Narrator, stage: Stage, config: Path, crash: Crash, expected_total: int
) -> None:
    """Run `syncpoint recover` as a person would, and look at everything again."""
    narrator.code("$ syncpoint recover --config syncpoint.toml")
    began = time.monotonic()
    finished = _run_recover(narrator.console, config)
    crash.recovery_seconds = time.monotonic() - began
    narrator.code(finished.stdout)
    narrator.expect(
        finished.returncode == 0,
        f"syncpoint recover ended with {finished.returncode}: {finished.stderr}",
    )
    crash.at_the_end = stage.total()
    crash.in_doubt_left, crash.locks_left = len(stage.prepared()), stage.orphaned_locks()
    narrator.expect(crash.at_the_end == expected_total, "recovery did not bring the money back")
    narrator.expect(not crash.in_doubt_left, "something is in doubt after the recovery")
    seconds = asyncio.run(transfer_once(config, ACCOUNT, AMOUNT))
    narrator.expect(seconds < NEXT_TRANSFER_SECONDS_MAX, "the next transfer had to wait")
    crash.next_transfer = f"done in {seconds * 1000:.0f} ms"
    narrator.good(
        f"""Recovered in {crash.recovery_seconds:.1f} s. All the money together:
        {_money(crash.at_the_end)}. The next transfer on that account: {crash.next_transfer}."""
    )


def _run_recover(console: Console, config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coordinator", "recover", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": str(max(console.width - 4, 40))},
    )


def _compare(narrator: Narrator, crashes: list[Crash]) -> None:
    def row(name: str, *cells: object) -> tuple[str, ...]:
        return (name, *(str(cell) for cell in cells))

    by_hand = crashes[0]
    recovered = ["never by itself", *(f"{crash.recovery_seconds:.1f}" for crash in crashes[1:])]
    at_the_end = [f"{_money(by_hand.after)} (or a guess)"]
    at_the_end += [_money(crash.at_the_end) for crash in crashes[1:]]
    rows = [
        row("money before the crash", *(_money(crash.before) for crash in crashes)),
        row("money after the crash", *(_money(crash.after) for crash in crashes)),
        row("seconds to recover", *recovered),
        row("money then", *at_the_end),
        row("branches in doubt then", *(crash.in_doubt_left for crash in crashes)),
        row("locks left then", *(crash.locks_left for crash in crashes)),
        row("the next transfer", *(crash.next_transfer for crash in crashes)),
    ]
    narrator.table(comparison("Killed with kill -9", [crash.who for crash in crashes], rows))


def _keep(narrator: Narrator, stage: Stage, config: Path) -> None:
    narrator.say("The servers stay until Ctrl-C:")
    for database in stage.databases:
        narrator.code(database.url)
    narrator.code(f"syncpoint recover --config {config}")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        narrator.say("Stopping the servers.")


def _money(amount: int) -> str:
    return f"{amount:,}"
