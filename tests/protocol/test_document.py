"""The published table is the one that runs."""

from __future__ import annotations

from pathlib import Path

from tests.protocol.table import document

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"


def test_the_document_is_current(rewrite: bool) -> None:
    if rewrite:
        DOCUMENT.write_text(document(), "utf-8")
    assert DOCUMENT.read_text("utf-8") == document(), "see `pytest tests/protocol --rewrite`"
