"""The page of how-tos, taken apart: what it shows of which file, and the commands it gives."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "how-to.md"
SECTION = re.compile(r"^## (.*)$", re.MULTILINE)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections() -> dict[str, str]:
    """The text of each section by its title."""
    parts = SECTION.split(PAGE.read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text: str, language: str) -> list[str]:
    return [block for found, block in BLOCK.findall(text) if found == language]


def snippets(text: str) -> list[tuple[str, str]]:
    """Each snippet of Python with the file that its first line names."""
    found = []
    for block in blocks(text, "python"):
        first, _, rest = block.partition("\n")
        assert re.fullmatch(r"# \S+\.py", first), f"a snippet names no file: {first!r}"
        found.append((first[2:], rest.strip("\n") + "\n"))
    return found


def snippet(file: str) -> str:
    """The one snippet of a file."""
    [text] = [text for name, text in snippets(PAGE.read_text()) if name == file]
    return text


def commands() -> list[str]:
    """Every line of the blocks without a language."""
    return [line for block in blocks(PAGE.read_text(), "") for line in block.splitlines()]
