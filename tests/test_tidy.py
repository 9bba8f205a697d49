"""Style as tests: what a reviewer would otherwise have to say again and again.

Whole files are read, not differences, so that a rule holds everywhere or has its exception written
down here with a reason. `CONTRIBUTING.md` says what the rules are for.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("coordinator", "participants", "saga")
FOLDERS = (*PACKAGES, "tests", "examples")

COLUMNS_MAX = 100
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70

LONGER_FILES: dict[str, str] = {
    "coordinator/protocol.py": "the table and all of its rules are read together or not at all",
    "tests/integration/test_postgres_leases.py": "one list of what a lease refuses and survives",
    "tests/simulation/bugs.py": "one list of planted bugs",
    "tests/simulation/world.py": "the world of the simulation, its clock and its phases",
}
"""Files that may be longer, each with its reason. An entry that is not needed is a failure."""

UNFINISHED = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")))

BANNED_NAMES = {
    "txn": "transaction",
    "tx": "transaction",
    "cfg": "settings",
    "mgr": "a name that says what it does",
    "utils": "a name that says what it does",
    "helpers": "a name that says what it does",
}
"""Identifiers of the packages, and the word of the glossary that belongs there."""

BANNED_WORDS = {
    r"\b2pc\b": "two-phase commit",
    r"\bcohort\b": "participant",
    r"\bsubordinate\b": "participant",
    r"\bsub-?transaction\b": "branch",
    r"\brollbacked\b": "rolled back",
    r"\bundo log\b": "compensation",
    r"\bwatermark\b": "horizon",
}
"""Synonyms in prose, and the word of the glossary that belongs there."""


@cache
def python_files(*folders: str) -> tuple[Path, ...]:
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return tuple(path for path in found if "__pycache__" not in path.parts)


@cache
def markdown_files() -> tuple[Path, ...]:
    inside = (ROOT / folder for folder in ("docs", "docker", "examples"))
    return (*sorted(ROOT.glob("*.md")), *(p for f in inside for p in sorted(f.rglob("*.md"))))


@cache
def text_of(path: Path) -> str:
    return path.read_text("utf-8")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_there_is_something_to_look_at() -> None:
    assert len(python_files(*FOLDERS)) > 20
    assert markdown_files()


def test_lines_fit_the_screen() -> None:
    long = [
        f"{name_of(path)}:{number}"
        for path in python_files(*FOLDERS)
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if len(line) > COLUMNS_MAX
    ]
    assert not long


def test_files_can_be_read_in_one_go() -> None:
    lengths = {name_of(p): len(text_of(p).splitlines()) for p in python_files(*FOLDERS)}
    long = {name for name, lines in lengths.items() if lines > FILE_LINES_MAX}
    assert long - LONGER_FILES.keys() == set(), "split along what is said, not along the line count"
    assert LONGER_FILES.keys() - long == set(), "no longer needs its exception"


def test_functions_fit_the_screen() -> None:
    long = [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for path in python_files(*FOLDERS)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    assert not long


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{name_of(path)}: {match.group()}"
        for path in (*python_files(*FOLDERS), *markdown_files())
        for match in UNFINISHED.finditer(text_of(path))
    ]
    assert not found, "finish it, or write an issue that says who will"


def _identifiers(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.alias(name=name):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.Attribute(attr=name):
                yield name


def test_names_are_words_of_the_glossary() -> None:
    found = {
        f"{name_of(path)}: {name} (say {BANNED_NAMES[part]})"
        for path in python_files(*PACKAGES)
        for name in _identifiers(tree_of(path))
        for part in name.lower().split("_")
        if part in BANNED_NAMES
    }
    assert not found


def test_prose_has_one_word_for_a_thing() -> None:
    found = [
        f"{name_of(path)}: {match.group()} (say {instead})"
        for path in (*python_files(*PACKAGES), *markdown_files())
        for pattern, instead in BANNED_WORDS.items()
        for match in re.finditer(pattern, text_of(path), re.IGNORECASE)
    ]
    assert not found


def test_text_is_plain() -> None:
    # Control characters hide things from reviewers; so do bidirectional overrides.
    hidden = re.compile("[\x00-\x08\x0b-\x1f\x7f\u200b\u202a-\u202e\u2066-\u2069\ufeff\t]")
    wrong = [
        name_of(path)
        for path in (*python_files(*FOLDERS), *markdown_files())
        if hidden.search(text_of(path)) or (text_of(path) and not text_of(path).endswith("\n"))
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is(package: str) -> None:
    silent = [
        name_of(path) for path in python_files(package) if ast.get_docstring(tree_of(path)) is None
    ]
    assert not silent


def test_every_test_file_says_what_it_is_about() -> None:
    silent = [
        name_of(path)
        for path in python_files("tests")
        if text_of(path) and ast.get_docstring(tree_of(path)) is None
    ]
    assert not silent


def test_markdown_has_a_title() -> None:
    untitled = [
        name_of(path)
        for path in markdown_files()
        if not re.match(r"(<[^>]*>\s*)*# \S", text_of(path))
    ]
    assert not untitled


def _imported_by(path: Path) -> Iterator[str]:
    """Every module that a file imports, also when it is only named in a string."""
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Constant(value=str(text)) if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+(:\w+)?", text):
                yield text.partition(":")[0]


def _entry_points() -> set[str]:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    targets = set(project.get("scripts", {}).values())
    for group in project.get("entry-points", {}).values():
        targets |= set(group.values())
    return {target.partition(":")[0] for target in targets}


def test_no_module_is_an_orphan() -> None:
    needed = _entry_points()
    for path in python_files(*FOLDERS):
        needed |= set(_imported_by(path)) - {module_of(path)}
    orphans = [
        name_of(path)
        for path in python_files(*PACKAGES)
        if path.name not in ("__init__.py", "__main__.py") and module_of(path) not in needed
    ]
    assert not orphans, "nothing imports them: delete them"
