"""mypy and pyright agree: decorated functions keep their types, and mistakes are found."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SECONDS_MAX = 240


def run(tool: str, *arguments: str) -> str:
    """What a tool of this environment prints about the two files, whatever it finds there."""
    program = shutil.which(tool, path=str(Path(sys.executable).parent))
    assert program is not None, f"{tool} is not installed: run `make setup`"
    done = subprocess.run(
        [program, *arguments, *(str(HERE / name) for name in ("uses.py", "mistakes.py"))],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy() -> dict[tuple[str, int], str]:
    """The errors by file and line."""
    cache = ROOT / ".mypy_cache" / "typing"  # of its own: another mypy may run at the same time
    told = run("mypy", "--strict", "--no-pretty", "--cache-dir", str(cache))
    found = re.findall(r"^(\S+):(\d+): error: (.*)$", told, re.MULTILINE)
    assert found, told
    return {(Path(file).name, int(line)): message for file, line, message in found}


def pyright() -> dict[tuple[str, int], str]:
    """The errors by file and line."""
    told = json.loads(run("pyright", "--outputjson", "--pythonpath", sys.executable))
    assert told["summary"]["filesAnalyzed"] == 2, told["summary"]
    return {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1): each["message"]
        for each in told["generalDiagnostics"]
        if each["severity"] == "error"
    }


def marked() -> set[tuple[str, int]]:
    """The lines that are wrong."""
    lines = (HERE / "mistakes.py").read_text().splitlines()
    return {("mistakes.py", number) for number, line in enumerate(lines, 1) if "# wrong: " in line}


@pytest.mark.timeout(SECONDS_MAX)
@pytest.mark.parametrize("check", [mypy, pyright], ids=lambda check: check.__name__)
def test_uses_are_right_and_mistakes_are_found(
    check: Callable[[], dict[tuple[str, int], str]],
) -> None:
    found, wrong = check(), marked()
    assert {where: found[where] for where in found.keys() - wrong} == {}
    assert wrong - found.keys() == set(), "these mistakes were not found"
    assert len(wrong) > 20
