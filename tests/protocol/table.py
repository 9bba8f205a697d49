"""Writes `docs/protocol.md` from the table `RULES`: the document cannot say anything else."""

from __future__ import annotations

from collections import defaultdict
from typing import get_args

from coordinator.events import Action, Event
from coordinator.protocol import RULES, Phase
from tests.protocol.explore import Step, steps

INTRODUCTION = """\
# The protocol

Generated from `RULES` in `coordinator/protocol.py` by `tests/protocol/table.py`; refresh it with
`pytest tests/protocol --rewrite`. The words are explained in the [glossary](glossary.md), and
`tests/protocol/testdata` tells the same as stories.

`Transaction.step(event)` looks the pair of phase and event up in one table, changes the phase, and
returns the actions that are now to be performed. The answer to an action is the next event. A pair
that is absent below is refused with `ProtocolError` and changes nothing.

Four things to read off it:

* `Commit` leaves only after `Decided` or `Resolved` (or in a transaction that wrote nothing and
  that nobody else knows). `Decide` is an action and `Decided` an event: between them lies the
  answer of the log.
* While a commit is proposed, an `AbortRequested` yields at most another `Decide`.
* Recovery enters at `in doubt` with `AbortRequested`, and then takes the same way as everybody.
* `ended` may be left again: a vote that comes after its rollback reopens it for one more rollback.
"""


def document() -> str:
    """The whole text of the document, as it must be."""
    return "\n".join([INTRODUCTION, _diagram(), _table()])


def _transitions() -> dict[tuple[Phase, Phase], set[str]]:
    found: dict[tuple[Phase, Phase], set[str]] = defaultdict(set)
    for step in steps():
        if step.actions is not None and step.before.phase is not step.after.phase:
            found[step.before.phase, step.after.phase].add(type(step.event).__name__)
    return found


def _diagram() -> str:
    order = list(Phase)
    lines = ["## Phases", "", "```mermaid", "stateDiagram-v2"]
    lines += [f"    [*] --> {_id(phase)}" for phase in (Phase.ACTIVE, Phase.IN_DOUBT)]
    transitions = _transitions()
    for before, after in sorted(transitions, key=lambda pair: [order.index(p) for p in pair]):
        events = ", ".join(sorted(transitions[before, after]))
        lines.append(f"    {_id(before)} --> {_id(after)}: {events}")
    lines += [f"    {_id(phase)} --> [*]" for phase in (Phase.ENDED, Phase.UNKNOWN)]
    return "\n".join([*lines, "```", ""])


def _id(phase: Phase) -> str:
    return phase.value.replace(" ", "_")


def _table() -> str:
    lines = [
        "## Every legal pair",
        "",
        "| phase | event | next phase | actions that may follow |",
        "|---|---|---|---|",
    ]
    events = list(get_args(Event))
    kinds = list(get_args(Action))
    order = list(Phase)
    taken: dict[tuple[Phase, type], list[Step]] = defaultdict(list)
    for step in steps():
        if step.actions is not None:
            taken[step.before.phase, type(step.event)].append(step)
    for pair in sorted(RULES, key=lambda p: (order.index(p[0]), events.index(p[1]))):
        reached = {step.after.phase for step in taken[pair]}
        produced = {type(action) for step in taken[pair] for action in step.actions or ()}
        after = ", ".join(phase for phase in order if phase in reached)
        actions = ", ".join(kind.__name__ for kind in kinds if kind in produced)
        lines.append(f"| {pair[0]} | {pair[1].__name__} | {after} | {actions or 'none'} |")
    return "\n".join([*lines, ""])
