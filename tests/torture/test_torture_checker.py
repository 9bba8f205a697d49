"""The checker of the torture: it passes what is right, and finds every damage that is planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.torture.checker import GAP_SECONDS_MAX, INVARIANTS, check
from tests.torture.damage import DAMAGE, change, found, markers, records, without
from tests.torture.evidence import load
from tests.torture.history import HistoryFile, read, read_folder
from tests.torture.story import Story, transaction
from tests.torture.values import Change, Ended, Invoked, Told


class TestChecker:
    def test_what_is_right_passes(self) -> None:
        assert check(Story().evidence()) == []

    @pytest.mark.parametrize("name", DAMAGE)
    def test_damage_is_found(self, name: str) -> None:
        invariant, do = DAMAGE[name]
        violations = check(do(Story().evidence()))
        assert invariant in {violation.name for violation in violations}, violations

    def test_each_invariant_has_damage_that_only_it_finds(self) -> None:
        alone = set()
        for _, do in DAMAGE.values():
            names = {violation.name for violation in check(do(Story().evidence()))}
            if len(names) == 1:
                alone |= names
        assert alone == INVARIANTS.keys()

    def test_who_was_cut_off_may_have_done_nothing(self) -> None:
        evidence = markers(Story().evidence(), without("silent"))
        evidence = records(evidence, lambda r: iter([] if r.transaction == transaction(4) else [r]))
        assert check(evidence) == []

    def test_a_log_that_was_not_looked_at_for_long_proves_nothing(self) -> None:
        _, do = DAMAGE["two databases without a record"]
        evidence = do(Story().evidence())
        assert check(found(evidence, longest_gap=GAP_SECONDS_MAX + 1)) == []


class TestHistoryFile:
    """What a kill explains is no damage; everything else is."""

    @pytest.fixture
    def data(self, tmp_path: Path) -> bytes:
        path = tmp_path / "client-0-0.jsonl"
        history = HistoryFile(str(path))
        for op in ("one", "two"):
            history.write(Invoked, op=op, how="", changes=(Change("ledger", 1, 2),))
            history.write(Told, op=op, outcome="committed")
        history.write(Ended)
        (read_back,) = read_folder(tmp_path)
        assert read_back.name == "client-0-0"
        assert [type(line) for line in read_back.lines] == [Invoked, Told, Invoked, Told, Ended]
        assert read_back.damage == ()
        return path.read_bytes()

    def test_the_last_line_may_be_torn_by_a_kill(self, data: bytes) -> None:
        *_, last = data.splitlines()
        history = read("client", data[: -len(last) // 2])
        assert history.damage == ()
        assert len(history.lines) == 4

    @pytest.mark.parametrize(
        "edit",
        [
            lambda lines: [lines[0], lines[1][:20], *lines[2:]],
            lambda lines: [lines[0], *lines[2:]],
            lambda lines: lines[1:],
            lambda lines: [lines[0], lines[0], *lines[1:]],
            lambda lines: [*lines, lines[1]],
            lambda lines: [*lines[:2], b"", *lines[2:]],
        ],
        ids=["torn inside", "missing", "beheaded", "doubled", "after the end", "empty"],
    )
    def test_damage_is_told(self, data: bytes, edit: Callable[[list[bytes]], list[bytes]]) -> None:
        damaged = b"\n".join(edit(data.splitlines())) + b"\n"
        history = read("client", damaged)
        assert history.damage
        evidence = Story().evidence()
        evidence = change(evidence, histories=(*evidence.histories, history))
        assert "history" in {violation.name for violation in check(evidence)}


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    evidence = Story().evidence()
    for name in ("options", "exits", "found"):
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(getattr(evidence, name)))
    (tmp_path / "faults.jsonl").write_bytes(
        b"".join(msgspec.json.encode(fault) + b"\n" for fault in evidence.faults)
    )
    (tmp_path / "history").mkdir()
    (history,) = evidence.histories
    (tmp_path / "history" / f"{history.name}.jsonl").write_bytes(
        b"".join(msgspec.json.encode(line) + b"\n" for line in history.lines)
    )
    assert load(tmp_path) == evidence
