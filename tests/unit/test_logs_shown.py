"""Records as people and programs see them: the page that lists them, the formats, the options."""

from __future__ import annotations

import inspect
import io
import json
import logging
import re
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from coordinator import logs
from coordinator.cli import app, main
from coordinator.commands.log_file import log_app
from tests.support.told import recording
from tests.support.witness import WitnessedShop

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/logs.md").read_text("utf-8")
CODE_BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ROW = re.compile(r"^\| `(syncpoint\.\w+)` \| ([A-Z, ]+) \| (.+?) \| .+ \| .*\|$", re.MULTILINE)


def documented() -> set[tuple[str, str, str]]:
    """Logger, level and word of every row."""
    return {
        (logger, level, what)
        for logger, levels, whats in ROW.findall(PAGE)
        for level in levels.split(", ")
        for what in re.findall(r"`([a-z-]+)`", whats)
    }


def sources() -> str:
    files = [*(ROOT / "coordinator").rglob("*.py"), *(ROOT / "participants").rglob("*.py")]
    return "\n".join(path.read_text("utf-8") for path in files)


def test_the_page_lists_all_loggers_and_no_other() -> None:
    named = set(re.findall(r'getLogger\(\s*"(syncpoint\.\w+)"', sources()))
    assert named == {logger for logger, _, _ in documented()}
    assert "getLogger(__name__)" not in sources()


def test_every_word_of_the_page_is_said_somewhere_and_no_other() -> None:
    said = set(
        re.findall(
            r"""(?x) \b(?:say|note|say_of|_note|_say)\(\s* (?:[\w.]+(?:\([\w.]*\))?,\s*|\*\w+,\s*)*
            "([a-z]+(?:-[a-z]+)*)" \s*,""",
            sources(),
        )
    )
    words = {what for _, _, what in documented()}
    assert words - said == set(), "the page lists what nobody says"
    assert said - words == set(), "the page does not list it"


async def test_the_levels_of_the_page_are_those_of_the_records() -> None:
    with recording() as records:
        shop = WitnessedShop()
        async with shop.coordinator:
            await shop.sell()
    found = {(each.name, each.levelname, vars(each)["what"]) for each in records.all}
    assert found - documented() == set() and len(found) > 8


@pytest.mark.parametrize("form", ["stdlib", "structlog"])
async def test_the_page_shows_how_to_render_them(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = CODE_BLOCKS[0 if form == "stdlib" else 1]
    root, ours = logging.getLogger(), logging.getLogger("syncpoint")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    shop = WitnessedShop()
    level = ours.level
    try:
        with redirect_stderr(io.StringIO()) as errors:
            exec(code, {})
            async with shop.coordinator:
                await shop.sell()
    finally:
        ours.setLevel(level)
    lines = [line for line in errors.getvalue().splitlines() if "commit requested" in line]
    if form == "stdlib":
        message = f"transaction {shop.id}: commit requested"
        assert lines == [f"DEBUG {shop.id} {message}"]
        return
    (shown,) = [json.loads(line) for line in lines]
    assert (shown["transaction"], shown["what"]) == (shop.id, "commit-requested")


def test_json_is_an_object_a_line_with_every_field() -> None:
    record = logging.getLogger("syncpoint.trial").makeRecord(
        "syncpoint.trial", logging.WARNING, "file", 1, "é\n%s", ("it",), _raised("boom"),
        extra={"transaction": "t", "what": "seen", "participants": ["a"], "verdict": None},
    )  # fmt: skip
    line = logs._json().format(record)
    assert "\n" not in line
    shown = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", shown.pop("time"))
    assert "ZeroDivisionError: boom" in shown.pop("exception")
    assert shown == {
        "level": "warning", "logger": "syncpoint.trial", "message": "é\nit",
        "transaction": "t", "what": "seen", "participants": ["a"], "verdict": None,
    }  # fmt: skip


def _raised(text: str) -> Any:
    try:
        raise ZeroDivisionError(text)
    except ZeroDivisionError:
        return sys.exc_info()


def test_every_command_takes_the_options_of_logs() -> None:
    commands = [*app.registered_commands, *log_app.registered_commands]
    assert len(commands) > 8
    for command in commands:
        assert command.callback is not None
        parameters = inspect.signature(command.callback).parameters
        assert {"log_level", "log_format"} <= parameters.keys(), command.callback.__name__


def run(*options: str, place: Path) -> tuple[str, str]:
    (place / "syncpoint.toml").write_text('cluster = "shop"\nlog = "memory:"\n')
    command = [sys.executable, "-m", "coordinator", "recover", *options]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_command_logs_json_to_stderr(tmp_path: Path) -> None:
    output, errors = run("--log-level", "info", "--log-format", "json", "--json", place=tmp_path)
    json.loads(output)
    shown = [json.loads(line) for line in errors.splitlines()]
    assert [(each["logger"], each["level"], each["what"]) for each in shown] == [
        ("syncpoint.coordinator", "info", "opened"),
        ("syncpoint.coordinator", "info", "closed"),
    ]
    assert shown[0]["message"].startswith("open: cluster shop, ")


def test_a_command_logs_text(tmp_path: Path) -> None:
    _, errors = run("--log-level", "debug", place=tmp_path)
    assert re.search(r"^\S+ \S+ INFO syncpoint\.coordinator: open: cluster shop", errors, re.M)


@pytest.mark.parametrize(("options", "level"), [([], "WARNING"), (["-v"], "DEBUG")])
def test_the_level_unless_told_otherwise(
    options: list[str], level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("syncpoint")
    before = logger.level
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SYNCPOINT_CONFIG", "absent.toml")
    try:
        assert main([*options, "recover"]) == 2
        assert logging.getLevelName(logger.level) == level
    finally:
        logger.setLevel(before)
