"""The command `syncpoint`: its options, and how it ends.

Exit codes: 0 done, 1 it went wrong, 2 a wrong option or file, 130 interrupted by Ctrl-C, 143 by
SIGTERM; a command's own codes stand in its help. An error is one line on stderr that says what to
do next. Commands are imported when they run, so that help needs nothing but the core.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from coordinator.commands.log_file import log_app
from coordinator.commands.options import Application, ConfigFile, Json, with_logs
from coordinator.errors import ConfigurationError, TransactionError, one_line
from coordinator.logs import show as show_logs

PROGRAM = "syncpoint"
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

app = typer.Typer(
    name=PROGRAM,
    help=(
        "Distributed transactions for Python: all of it or none of it, whoever crashes and "
        "whenever.\n\nNew here? `syncpoint demo` shows in half a minute what it is for."
    ),
    epilog="Errors are one line on stderr. A wrong option or file exits 2, Ctrl-C 130.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(log_app)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]

Transaction = Annotated[str, typer.Argument(metavar="ID", help="The transaction's id.")]

Reason = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Why; recorded with your name and the time.")
]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; the console script's entry point."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        if code == EXIT_INTERRUPTED:  # what Typer makes of KeyboardInterrupt
            raise KeyboardInterrupt
    except typer.TyperException as error:
        return _failed(_with_hint(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _failed(
            "interrupted; nothing is left running, and it can be run again", EXIT_INTERRUPTED
        )
    except ConfigurationError as error:
        return _failed(str(error), EXIT_USAGE)
    except TransactionError as error:
        return _failed(str(error), EXIT_FAILED)
    except BrokenPipeError:
        return _reader_gone()
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def _global(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="The same as --log-level debug of a command.")
    ] = False,
) -> None:
    if show_version:
        print(f"{PROGRAM} {version('syncpoint')}")
        raise typer.Exit
    show_logs("debug" if verbose else "warning")
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    transfers: Annotated[
        int, typer.Option(min=1, max=100_000, help="How many transfers to run before the crashes.")
    ] = 400,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the two servers running at the end, until Ctrl-C.")
    ] = False,
) -> int:
    """Show the problem and the answer on two real PostgreSQL servers, in half a minute.

    Starts two servers of its own (no root, no Docker), moves money between them, kills a process
    with `kill -9` between the two commits, with hand-written code and with Syncpoint, and recovers.
    Exits 0 if everything came out as told, 1 if not.
    """
    with _packages_of_demo():
        from coordinator.commands.demo import story

    return story.run(transfers=transfers, keep=keep)


@app.command()
def recover(
    config: ConfigFile = None,
    application: Application = None,
    dry_run: DryRun = False,
    wait: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", help="Keep trying for so long, until nothing is in doubt."
        ),
    ] = 0,
    json: Json = False,
) -> int:
    """Finish what crashes have left behind: one recovery run, now.

    Commits what the log says is committed, rolls back what nobody decided, leaves alone what a
    living process still works on. Safe to run at any time and several times at once. A participant
    that cannot be reached does not stop the recovery of the others.

    Exits 0 when nothing is left, 3 when something is still in doubt, 4 when a person is needed.
    """
    from coordinator.commands.recover import run
    from coordinator.commands.target import load

    return run(load(config, application), dry_run=dry_run, wait=wait, as_json=json)


@app.command("list")
def list_transactions(
    config: ConfigFile = None,
    application: Application = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="Also what began a moment ago, and what finished and is still recorded."
        ),
    ] = False,
    state: Annotated[
        str | None,
        typer.Option(
            "--state",
            metavar="STATE",
            help="Only those that are in-flight, in-doubt, needs-person or finished.",
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Show the transactions in flight for more than a second and those in doubt, oldest first.

    Asks the living members, every participant and the log, and changes nothing; safe to run at any
    time beside services. A participant that cannot be reached is named, and the rest is shown.
    """
    from coordinator.commands.list_transactions import parse_state, run
    from coordinator.commands.target import load

    wanted = parse_state(state)
    coordinator = load(config, application)
    return run(coordinator, everything=everything, state=wanted, as_json=json)


@app.command()
def show(
    transaction: Transaction,
    config: ConfigFile = None,
    application: Application = None,
    json: Json = False,
) -> int:
    """Show one transaction: its decision, its branches, whom they block, what will happen next.

    Of every branch, what the log has recorded and what the participant really holds now, with the
    sessions that wait for it; who does what next, when, and what you may type. Changes nothing;
    safe to run at any time beside services.

    Exits 0, or 5 when there is no such transaction.
    """
    from coordinator.commands.show import run
    from coordinator.commands.target import load

    return run(load(config, application), transaction, as_json=json)


@app.command()
def resolve(
    transaction: Transaction,
    verdict: Annotated[str, typer.Argument(metavar="abort|commit|rollback")],
    reason: Reason,
    branch: Annotated[
        str | None,
        typer.Option("--branch", metavar="B", help="The quarantined branch to end, by its id."),
    ] = None,
    dry_run: DryRun = False,
    config: ConfigFile = None,
    application: Application = None,
    json: Json = False,
) -> int:
    """End what waits: an undecided transaction by abort, or one quarantined branch by your word.

    `resolve ID abort` proposes abort; if it stands, the branches are rolled back now. `resolve ID
    --branch B commit` (or `rollback`) records your word, which cannot be changed, and ends the
    branch: compare the databases before. Nothing that the log has decided can be contradicted.

    Exits 0, 3 when abort stands and a branch could not be rolled back yet, 4 when it contradicts
    what stands.
    """
    from coordinator.commands.resolve import read_order, run
    from coordinator.commands.target import load

    order = read_order(transaction, verdict, branch, reason, dry_run=dry_run)
    return run(load(config, application), order, as_json=json)


@app.command()
def forget(
    transaction: Transaction,
    reason: Reason,
    config: ConfigFile = None,
    application: Application = None,
    json: Json = False,
) -> int:
    """Acknowledge branches that ended against the decision, once you have mended the databases.

    They are no longer shown as needing a person; who acknowledged them, when and why, is kept. A
    quarantined branch that is still prepared is ended with `resolve` instead.

    Exits 0, 4 when something of it still needs a person, 5 when there is no such transaction.
    """
    from coordinator.commands.forget import run
    from coordinator.commands.target import load

    return run(load(config, application), transaction, reason, as_json=json)


@app.command()
def drain(
    config: ConfigFile = None,
    application: Application = None,
    timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait for so long at most.")
    ] = 60,
    json: Json = False,
) -> int:
    """Wait until nothing is prepared anywhere: before a dump, a backup, an upgrade.

    Stop the services first, or their traffic. What crashes have left is ended as by `recover`.

    Exits 0 when nothing is prepared and nothing unfinished, 3 when the time is over; then what is
    left is named.
    """
    from coordinator.commands.drain import run
    from coordinator.commands.target import load

    return run(load(config, application), timeout=timeout, as_json=json)


@app.command()
def check(
    config: ConfigFile = None,
    application: Application = None,
    role_sql: Annotated[
        bool,
        typer.Option(
            "--role-sql", help="Print instead the SQL that makes a role of the least rights."
        ),
    ] = False,
    json: Json = False,
) -> int:
    """Compare the settings of every participant and of the log with what is needed.

    Looks at versions, roles, slots, connections, standbys, timeouts, poolers, disks and clocks,
    and tells the fix of each problem. Changes nothing; safe to run at any time, beside services
    and before the first one. A participant that is down does not stop the check of the others.

    Exits 0 when all is as it must be, 2 when something must change.
    """
    from coordinator.commands.check import run, show_role_sql
    from coordinator.commands.target import load

    ask = show_role_sql if role_sql else run
    return ask(load(config, application), as_json=json)


@app.command()
def bench(
    clients: Annotated[
        str, typer.Option(metavar="N,N,…", help="How many transfers run at once, in turn.")
    ] = "1,8,32,64",
    rounds: Annotated[
        int, typer.Option(min=1, max=1000, help="Rounds; the medians over them are told.")
    ] = 5,
    seconds: Annotated[
        float, typer.Option(min=0.05, max=3600, help="Length of one measurement.")
    ] = 3.0,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Only these parts (transfers, log, growth) or cases of transfers.",
        ),
    ] = None,
    finished: Annotated[
        int,
        typer.Option(min=1, max=100_000_000, help="Transactions in the log of the part growth."),
    ] = 1_000_000,
    json: Json = False,
) -> int:
    """Measure transfers over two databases, against hand-written loops on the same servers.

    Starts two servers of its own. The hand-written loops prepare and commit on both sides in
    parallel, without any log, so they lose money in a crash: they are what the databases allow,
    with 8, 16 or 32 transfers let in at once, and unbounded. Then the decision log alone, and
    whether a log with a million finished transactions is slower or needs more memory.

    All of it takes a quarter of an hour; Ctrl-C ends it and tells what was measured until then.
    `docs/performance.md` says what each figure means.
    """
    with _packages_of_demo():
        from coordinator.commands.bench import cases, run

    return run.run(
        clients=cases.parse_clients(clients),
        rounds=rounds,
        seconds=seconds,
        only=cases.parse_only(only),
        finished=finished,
        as_json=json,
    )


for _command in (*app.registered_commands, *log_app.registered_commands):
    if _command.callback is not None:
        _command.callback = with_logs(_command.callback)


@contextmanager
def _packages_of_demo() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f"{error}; this command needs more packages: pip install 'syncpoint[demo]'"
        ) from error


def _failed(message: str, code: int) -> int:
    print(f"{PROGRAM}: {one_line(message)}", file=sys.stderr)
    return code


def _with_hint(error: typer.TyperException) -> str:
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context is not None else PROGRAM
    return f"{error.format_message().rstrip('.')}; see `{path} --help`"


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C, through every `finally`, so that no server is left running."""
    sys.exit(EXIT_TERMINATED)


def _reader_gone() -> int:
    """Whoever read our output has had enough; Python must not complain about it at exit."""
    sys.stdout = None
    return EXIT_FAILED
