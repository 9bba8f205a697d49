"""Plays every story in `testdata` and compares it with what was recorded.

After a change of the core, `pytest tests/protocol --rewrite` writes the new answers; read the
difference like a story, and commit only changes that you understand.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.protocol.script import Script

TESTDATA = Path(__file__).parent / "testdata"
STORIES = sorted(TESTDATA.glob("*.txt"))


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.stem)
def test_story(story: Path, rewrite: bool) -> None:
    recorded = story.read_text("utf-8")
    played = Script().play(recorded)
    if rewrite:
        story.write_text(played, "utf-8")
        return
    assert played == recorded, f"{story.name} no longer tells what the core does (see --rewrite)"


def test_each_story_has_a_title() -> None:
    untitled = [story.name for story in STORIES if not story.read_text("utf-8").startswith("# ")]
    assert not untitled
