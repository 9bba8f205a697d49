"""The one seam for crash tests: named points between effects, which do nothing in production.

A test, or the demonstration, installs a handler in its own process; the handler is called with the
name of each point as it is reached, and may end the process, pause it, or raise.
"""

from __future__ import annotations

from collections.abc import Callable

_handler: Callable[[str], None] | None = None
owner: object = None
"""While the handler runs: whose point it is, a driver or an engine."""


def install(handler: Callable[[str], None] | None) -> None:
    """Call `handler` at every point of this process from now on; None removes it."""
    global _handler
    _handler = handler


def reach(point: str, whose: object) -> None:
    """Mark that `point` is reached: `<effect>:before` or `<effect>:after`."""
    global owner
    if _handler is not None:
        owner = whose
        _handler(point)
