"""A power cut of the log's disk, where this machine can make one; and that losses are noticed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture.power import (
    EXIT_CANNOT,
    EXIT_LOST,
    Answers,
    Cut,
    Held,
    Series,
    compare,
    conclude,
)

ROOT = Path(__file__).parents[2]
CANNOT = re.compile(r"power cuts cannot be tried here: \S+ .*\S+\n")


def power(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.torture.power", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_what_was_acknowledged_survives_a_power_cut() -> None:
    finished = power("--cuts", "1", "--controls", "1", "--kind", "ext4")
    told = finished.stdout + finished.stderr
    if finished.returncode == EXIT_CANNOT:
        assert CANNOT.fullmatch(finished.stderr), told
        return
    assert finished.returncode == 0, f"{told}\nrun it again: make powercuts CUTS=30"
    assert re.search(r"\| FULL \| 1 \| [1-9]\d+ \| 0 \| 0 \|", finished.stdout), told
    assert re.search(r"\| OFF \| 1 \| [1-9]\d+ \| 1 \| [1-9]\d* \|", finished.stdout), told


def test_a_machine_that_cannot_says_why() -> None:
    finished = power("--cuts", "1", PATH="/nowhere")
    assert finished.returncode == EXIT_CANNOT
    assert CANNOT.fullmatch(finished.stderr)


class TestComparison:
    ANSWERS = (
        b"1.0 decision t1 one\n2.0 decision t2 abort\n3.0 name order 1 t1\n"
        b"9.0 decision t9 one\n9.5 unavailable the log had an error\n2.5 decision t"
    )
    HELD = Held({"t1": "one", "t2": "abort", "t3": "two"}, {"order 1": "t1"}, "ok")

    @pytest.fixture
    def answers(self) -> Answers:
        answers = Answers()
        assert answers.add(self.ANSWERS, before=5.0) == 2
        return answers

    def test_what_stands_passes(self, answers: Answers) -> None:
        assert answers.add(b"1.5 decision t1 one\n", before=5.0) == 1
        assert compare(answers, self.HELD) == []

    @pytest.mark.parametrize(
        ("decisions", "names", "integrity", "wrong"),
        [
            ({"t1": "one"}, {"order 1": "t1"}, "ok", "t2 was acknowledged as abort: nothing"),
            ({"t1": "two", "t2": "abort"}, {"order 1": "t1"}, "ok", "t1 was acknowledged as one"),
            ({"t1": "one", "t2": "abort"}, {}, "ok", "order 1 was acknowledged as t1: nothing"),
            ({"t1": "one", "t2": "abort"}, {"order 1": "t1"}, "row 3 missing", "integrity_check"),
        ],
    )
    def test_each_loss_is_told(
        self,
        answers: Answers,
        decisions: dict[str, str],
        names: dict[str, str],
        integrity: str,
        wrong: str,
    ) -> None:
        (found,) = compare(answers, Held(decisions, names, integrity))
        assert wrong in found

    def test_two_answers_about_one_id_are_told(self, answers: Answers) -> None:
        answers.add(b"1.5 decision t1 abort\n", before=5.0)
        assert "t1 was answered one and abort" in compare(answers, self.HELD)


def test_a_control_that_loses_nothing_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Cut(10, 10, ()), Cut(10, 10, ("something",))
    full, off = Series("ext4", "FULL", (good,)), Series("ext4", "OFF", (bad,))
    assert conclude([full, off]) == 0
    assert conclude([full, Series("ext4", "OFF", (good,))]) == EXIT_LOST
    assert conclude([full]) == EXIT_LOST
    assert conclude([Series("ext4", "FULL", (good, bad)), off]) == EXIT_LOST
    assert "no control on ext4 lost anything" in capsys.readouterr().out
