"""What was measured, as tables for people and as JSON, an object a line, for programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from coordinator.commands.bench import growth
from coordinator.commands.bench.bars import Bar, bars
from coordinator.commands.bench.cases import LOG
from coordinator.commands.bench.results import Result
from coordinator.commands.output import WIDTH_MAX, print_json, results

_BARS = "bars"

_NOTE = """\
per second, p50 and p99: medians of the rounds; spread: the lowest and the highest round
CPU ms: processor time a transaction, of this process / of both servers
log writes: those a transaction waits for; + those written later for many at once
to best, to unbounded: the rate against the fastest bounded loop by hand (the loop itself where no
bound bounds), and against the unbounded one; medians of the rounds' own ratios"""


def print_results(found: Sequence[Result], machine: str, *, as_json: bool) -> None:
    """Everything that was measured, and the bars that it meets or not."""
    told = bars(found)
    if as_json:
        for result in found:
            print_json({**msgspec.to_builtins(result), "machine": machine})
        if told:
            print_json(_bars_row(told, machine))
        return
    console = results()
    if console.is_terminal:
        _print_tables(console, found, told, machine)
        return
    # A file has no width, and what stands in it is to be pasted: without spaces at line ends.
    console.width = WIDTH_MAX
    with console.capture() as captured:
        _print_tables(console, found, told, machine)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _print_tables(
    console: Console, found: Sequence[Result], told: Sequence[Bar], machine: str
) -> None:
    console.print(machine, soft_wrap=True)
    transfers = [each for each in found if each.case != LOG and each.case not in growth.CASES]
    for clients in dict.fromkeys(each.clients for each in transfers):
        rows = [each for each in transfers if each.clients == clients]
        console.print(_transfers(clients, rows))
    if transfers:
        console.print(_NOTE, style="dim")
    log = [each for each in found if each.case == LOG]
    if log:
        console.print(_log(log))
    grown = [each for each in found if each.case in growth.CASES]
    if grown:
        console.print(_growth(grown))
    if told:
        console.print(_bars(told))


def _bars_row(told: Sequence[Bar], machine: str) -> dict[str, object]:
    """The keys of every other line are there too, for who reads only those."""
    keys = ("clients", "per_second", "p50_ms", "p99_ms")
    row: dict[str, object] = {"case": _BARS, **dict.fromkeys(keys)}
    return {**row, "bars": msgspec.to_builtins(told), "machine": machine}


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE, padding=0, collapse_padding=True
    )
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _transfers(clients: int, rows: Sequence[Result]) -> Table:
    table = _table(
        f"Transfers over two databases, {_count(clients, 'client')}",
        "case", "per\nsecond", "spread", "p50\nms", "p99\nms", "CPU ms\nours/theirs", "log\nwrites",
        "fsyncs", "to\nbest", "to un-\nbounded",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.case,
            *_rates(row),
            f"{row.cpu_ms:.2f} / {_shown(row.servers_cpu_ms)}",
            _writes(row),
            _shown(row.fsyncs),
            _shown(row.ratio_to_baseline),
            _shown(row.ratio_to_unbounded),
        )
    return table


def _log(rows: Sequence[Result]) -> Table:
    table = _table(
        "The decision log alone",
        "proposers", "decisions\nper second", "spread", "p50\nms", "p99\nms", "CPU µs",
        "writes\na decision", "fsyncs\na decision",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            str(row.clients),
            *_rates(row),
            f"{row.cpu_ms * 1000:.0f}",
            _shown(row.log_writes, 3),
            _shown(row.fsyncs, 3),
        )
    return table


def _growth(rows: Sequence[Result]) -> Table:
    table = _table(
        f"A log that has long been in use, {_count(rows[0].clients, 'client')}",
        "log", "per\nsecond", "spread", "p50\nms", "p99\nms", "CPU\nms", "to a\nnew one",
        "peak memory\nMB", "more\nMB",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.case,
            *_rates(row),
            f"{row.cpu_ms:.2f}",
            _shown(row.ratio_to_baseline),
            _shown(row.memory_mb, 1),
            _shown(row.memory_more_mb, 1),
        )
    return table


def _bars(told: Sequence[Bar]) -> Table:
    table = _table("Bars", _BARS, "wanted", "measured", "")
    for bar in told:
        shown = f"{bar.measured:.3f}".rstrip("0").rstrip(".")
        table.add_row(bar.name, bar.wanted, shown, "met" if bar.met else "not met")
    return table


def _rates(row: Result) -> tuple[str, str, str, str]:
    return (
        f"{row.per_second:,.0f}",
        f"{row.per_second_lowest:,.0f}-{row.per_second_highest:,.0f}",
        f"{row.p50_ms:.2f}",
        f"{row.p99_ms:.1f}",
    )


def _writes(row: Result) -> str:
    if row.log_writes is None or row.lazy_writes is None:
        return ""
    return f"{row.log_writes:.2f}+{row.lazy_writes:.2f}"


def _shown(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
