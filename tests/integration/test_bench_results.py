"""The arithmetic of the benchmark: medians, ratios, the baseline, the order, the bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from coordinator.commands.bench import bars, growth
from coordinator.commands.bench.cases import CASES, UNBOUNDED, baselines, cases_for, parse_only
from coordinator.commands.bench.one_process import Order
from coordinator.commands.bench.results import Result, best, ratio, ratio_of_p50, summarise
from coordinator.commands.bench.tables import print_results
from coordinator.commands.bench.transfers import Transfers
from coordinator.commands.bench.workload import Databases, Measurement


def rounds(*rates: float, p50_ms: float = 1.0) -> list[Measurement]:
    return [Measurement(rate, p50_ms, 2.0, 0.5) for rate in rates]


def test_a_result_is_the_median_and_its_spread() -> None:
    found = summarise("case", 8, rounds(10, 50, 30))
    assert (found.per_second, found.per_second_lowest, found.per_second_highest) == (30, 10, 50)
    assert (found.rounds, found.log_writes, found.fsyncs) == (3, None, None)


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine was twice as fast in the second round, for both.
    assert ratio(rounds(90, 180, 110), rounds(100, 200, 100)) == 0.9
    assert ratio_of_p50(rounds(1, p50_ms=3), rounds(1, p50_ms=2)) == 1.5
    assert ratio(rounds(90, 180), rounds(100)) == 0.9
    assert ratio([], rounds(100)) is None


@pytest.mark.parametrize(
    ("clients", "names"),
    [
        (1, [UNBOUNDED]),
        (8, [UNBOUNDED]),
        (32, ["by-hand-8", "by-hand-16", UNBOUNDED]),
        (64, ["by-hand-8", "by-hand-16", "by-hand-32"]),
    ],
)
def test_the_baseline_is_the_best_of_the_bounded_loops(clients: int, names: list[str]) -> None:
    # With 32 clients a bound of 32 bounds nothing: it is the unbounded loop.
    assert list(baselines(clients)) == names
    measured = {name: rounds(place) for place, name in enumerate(CASES, 1)}
    assert best(names, measured) == max(names, key=list(CASES).index)
    assert best(names, {}) is None


def test_a_bound_that_bounds_nothing_is_left_out() -> None:
    everything = parse_only(None)
    plain = ["best-effort", "one-database"]
    assert cases_for(8, everything) == [UNBOUNDED, "syncpoint-sqlite", *plain]
    assert cases_for(64, everything) == list(CASES)
    assert cases_for(1, ["by-hand-16", "one-database"]) == [UNBOUNDED, "one-database"]
    assert cases_for(32, ["by-hand-16", "by-hand-32"]) == [UNBOUNDED, "by-hand-16"]
    assert cases_for(8, ["syncpoint-sqlite-8", "log"]) == []


def test_rounds_are_interleaved_and_the_order_turns() -> None:
    part = Transfers(Databases(()), [1, 2], 3, 1.0, ["by-hand-8", "best-effort", "one-database"])
    first, second, third = "by-hand-unbounded", "best-effort", "one-database"
    expected = [
        f"{name}, {clients} clients"
        for order in ((first, second, third), (second, third, first), (third, first, second))
        for clients in (1, 2)
        for name in order
    ]
    assert [step.label for step in part.steps()] == expected
    assert part.results() == []


def result(case: str, clients: int) -> Result:
    return summarise(case, clients, rounds(100))


def good() -> list[Result]:
    """Everything is met, if only just."""
    return [
        replace(result("syncpoint-sqlite", 1), p50_to_baseline=1.25, log_writes=1.0),
        replace(result("syncpoint-sqlite", 32), ratio_to_baseline=0.9, ratio_to_unbounded=1.1),
        replace(result("log", 64), fsyncs=0.05),
        replace(result(growth.KEPT, 32), ratio_to_baseline=0.95, memory_more_mb=20.0),
        replace(result(growth.FORGETTING, 32), ratio_to_baseline=0.95, memory_more_mb=1.0),
    ]


WORSE = [
    (0, "p50_to_baseline", 1.251),
    (0, "log_writes", 1.001),
    (0, "log_writes", 0.999),
    (1, "ratio_to_baseline", 0.899),
    (1, "ratio_to_unbounded", 1.099),
    (2, "fsyncs", 0.051),
    (3, "ratio_to_baseline", 0.949),
    (4, "ratio_to_baseline", 0.949),
    (3, "memory_more_mb", 20.1),
    (4, "memory_more_mb", 20.1),
]


def met(results: Sequence[Result]) -> list[bool]:
    return [bar.met for bar in bars.bars(results)]


def test_every_bar_is_met_at_its_limit_and_only_what_was_measured_is_told() -> None:
    assert met(good()) == [True] * 7
    assert met(good()[2:3]) == [True]
    assert met([result("syncpoint-sqlite", 32), result("by-hand-8", 32)]) == []


@pytest.mark.parametrize(("place", "field", "value"), WORSE)
def test_a_bar_is_not_met_beyond_its_limit(place: int, field: str, value: float) -> None:
    results = good()
    results[place] = replace(results[place], **{field: value})
    assert sorted(met(results)) == [False] + [True] * 6


def test_growth_compares_three_logs_of_which_one_is_forgotten_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[Order] = []
    memory = iter([40.0, 50.0, 41.5] * 2)

    def measured(order: Order) -> Measurement:
        orders.append(order)
        return replace(rounds(100)[0], memory_mb=next(memory))

    monkeypatch.setattr(growth, "measure_apart", measured)
    part = growth.Growth(Databases(()), 1, 3.0, 40, tmp_path)
    for step in part.steps():
        step.do()
    logs = [Path(order.log).name for order in orders]
    assert logs == ["growth-empty-0", "growth-kept", "growth-forgetting"]
    assert [Path(order.log).exists() for order in orders] == [False, True, True]
    kept, forgetting = (Path(order.log).read_bytes() for order in orders[1:])
    assert kept == forgetting
    # The transactions of the old logs are one to two hours old.
    assert [order.retention for order in orders[1:]] == [86_400, 900]
    assert {(order.clients, order.seconds) for order in orders} == {(32, 6.0)}
    assert [result.memory_more_mb for result in part.results()] == [None, 10.0, 1.5]


def test_the_widest_tables_fit_and_nothing_is_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    wide = {"per_second": 9999.9, "per_second_lowest": 9999.9, "per_second_highest": 9999.9}
    times = {"p50_ms": 999.99, "p99_ms": 9999.9, "cpu_ms": 99.99, "servers_cpu_ms": 99.99}
    compared = {"ratio_to_baseline": 0.99, "ratio_to_unbounded": 1.11, "memory_more_mb": -19.9}
    written = {"log_writes": 1.0, "lazy_writes": 0.99, "fsyncs": 1.99, "memory_mb": 999.9}
    everything = {**wide, **times, **compared, **written}
    names = [*((name, 64) for name in CASES), ("log", 64), *((each, 32) for each in growth.CASES)]
    found = [replace(result(*name), **everything) for name in names]
    print_results([*good()[:2], *found], "a machine", as_json=False)
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 100
    assert "…" not in output
    for name, clients in names:
        shown = str(clients) if name == "log" else name
        (line,) = [each for each in output.splitlines() if each.startswith(f" {shown} ")][-1:]
        assert "10,000-10,000" in line
    assert "met\n" in output
