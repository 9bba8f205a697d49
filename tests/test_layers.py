"""The tools that read the whole program: import-linter, mypy and ruff, each as one test.

They run as they are run by hand (`make check`), and print what they found when they fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("coordinator", "participants", "saga")
SECONDS_MAX = 240


def run(tool: str, *arguments: str) -> str:
    """Runs a tool of this environment on the repository; what it prints explains a failure."""
    program = shutil.which(tool, path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    if program is None:
        pytest.fail(f"{tool} is not installed: run `make setup`", pytrace=False)
    found = subprocess.run(
        [program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    if found.returncode != 0:
        told = f"{tool} {' '.join(arguments)}\n{found.stdout}{found.stderr}"
        pytest.fail(told, pytrace=False)
    return found.stdout


@pytest.mark.timeout(SECONDS_MAX)
def test_imports_point_one_way() -> None:
    told = run("lint-imports", "--no-cache")
    assert "KEPT" in told, "no contract was looked at"


@pytest.mark.timeout(SECONDS_MAX)
def test_types_hold() -> None:
    packages = [argument for package in PACKAGES for argument in ("-p", package)]
    run("mypy", "--strict", *packages)


@pytest.mark.timeout(SECONDS_MAX)
def test_lint_is_clean() -> None:
    run("ruff", "check", "--output-format", "concise", ".")


@pytest.mark.timeout(SECONDS_MAX)
def test_formatting_is_uniform() -> None:
    run("ruff", "format", "--check", "--output-format", "concise", ".")
