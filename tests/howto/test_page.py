"""The page of how-tos shows what is in the examples, and gives the commands that the tests run."""

from __future__ import annotations

import pytest

from tests.howto import page
from tests.howto.serving import ACCOUNTS, COMMANDS, EXAMPLES, LEDGER

CODE_LINES_MAX = 40
EXAMPLE_FILES = {"celery_app.py", "django_app.py", "fastapi_app.py", "flask_app.py", "script.py"}
CONFIGURATION = "gunicorn.conf.py"  # run by test_flask


def test_every_snippet_is_in_the_file_that_it_names() -> None:
    found = page.snippets(page.PAGE.read_text())
    assert {file for file, _ in found} == EXAMPLE_FILES | {CONFIGURATION}
    for file, text in found:
        if file != CONFIGURATION:
            assert f"\n\n{text}" in (EXAMPLES / file).read_text(), f"{file} does not hold:\n{text}"


def test_the_page_gives_the_commands_and_the_tables_of_the_tests() -> None:
    assert sorted(page.commands()) == sorted(COMMANDS.values())
    [tables] = page.blocks(page.PAGE.read_text(), "sql")
    for line in tables.splitlines():
        assert line in ACCOUNTS + LEDGER


@pytest.mark.parametrize("title", page.sections())
def test_a_section_can_be_read_in_one_go(title: str) -> None:
    text = page.sections()[title]
    shown = "".join(code for _, code in page.snippets(text))
    assert len(shown.splitlines()) <= CODE_LINES_MAX
