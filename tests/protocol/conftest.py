"""Lets a reader refresh the recorded transcripts: `pytest tests/protocol --rewrite`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="write what the core says now into the transcripts and docs/protocol.md; commit only "
        "changes that you understand",
    )


@pytest.fixture
def rewrite(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite", default=False))
