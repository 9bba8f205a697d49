"""What the documentation and the examples show runs: every snippet, on real servers."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from participants.postgres.embedded import EmbeddedServer
from tests.support.postgres import gids

ROOT = Path(__file__).parents[2]
SNIPPET = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def environment(postgres_servers: tuple[EmbeddedServer, EmbeddedServer]) -> dict[str, str]:
    """Two empty databases, by the names under which services of the documentation expect them."""
    name = f"example{secrets.token_hex(6)}"
    first, second = (server.start().create_database(name) for server in postgres_servers)
    return {"ACCOUNTS_URL": first, "LEDGER_URL": second}


def run_pytest(where: Path, environment: Mapping[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=where,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(page: Path) -> dict[str, str]:
    """The snippets of a page of documentation, put together by the file that each names."""
    files: dict[str, str] = {}
    for language, text in SNIPPET.findall(page.read_text()):
        named = re.match(r"# (\S+\.py)\n", text)
        assert language == "python", f"{page.name}: a snippet in {language} is run by no test"
        assert named, f"{page.name}: a snippet names no file in its first line: {text[:40]!r}"
        files[named[1]] = files.get(named[1], "") + text
    return files


def test_every_snippet_of_the_page_about_tests_runs(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    files = files_of(ROOT / "docs" / "testing.md")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    told = run_pytest(
        tmp_path, environment, "-c", os.devnull, "--rootdir", ".",
        "-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function",
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", told)
    assert passed, told
    assert int(passed[1]) >= sum(text.count("def test_") for text in files.values()) > 10
    assert [gids(url) for url in environment.values()] == [[], []]


def test_the_tests_of_the_example_pass(environment: dict[str, str]) -> None:
    told = run_pytest(ROOT, environment, "examples/test_transfer.py")
    assert re.search(r"\b[1-9]\d* passed", told), told
    assert [gids(url) for url in environment.values()] == [[], []]
