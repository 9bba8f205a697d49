"""`syncpoint drain`: rounds of the sweep until nothing is prepared anywhere and nothing unfinished.

Nothing is left when every participant has answered and `syncpoint list` would be empty. Services
that go on beginning transactions are to be stopped first; what they still drive is waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec
from rich.markup import escape

from coordinator.commands.list_transactions import Picture, State, View, look
from coordinator.commands.output import messages, print_json, progress_bar, results
from coordinator.coordinator import Coordinator
from coordinator.errors import LogUnavailable, one_line

EXIT_DRAINED = 0
EXIT_LEFT = 3

PAUSE_SECONDS = 0.2
REOPEN_SECONDS = 1.0
LINES_MAX = 20

Progress = Callable[[int], None]


class _Left(msgspec.Struct):
    """What the last look saw; None when the log did not answer, and `log_error` says why."""

    picture: Picture | None = None
    log_error: str = ""

    @property
    def nothing(self) -> bool:
        picture = self.picture
        return picture is not None and not (picture.views or picture.unreachable)


def run(coordinator: Coordinator, *, timeout: float, as_json: bool) -> int:
    """Wait for at most `timeout` seconds, tell what is left, and return the exit code."""
    bar = progress_bar(messages())
    most = 0
    with bar:
        task = bar.add_task("draining", total=None)

        def progress(left: int) -> None:
            nonlocal most
            most = max(most, left)
            bar.update(task, completed=most - left, total=most)

        left = asyncio.run(_drain(coordinator, timeout, progress))
    code = EXIT_DRAINED if left.nothing else EXIT_LEFT
    if as_json:
        print_json(_as_plain(left, code))
    elif left.nothing:
        results().print("Nothing is prepared anywhere, and nothing is unfinished.", soft_wrap=True)
    for line in _what_is_left(left):
        messages().print(escape(f"syncpoint: {one_line(line)}"), soft_wrap=True)
    return code


async def _drain(coordinator: Coordinator, timeout: float, progress: Progress) -> _Left:
    give_up = time.monotonic() + timeout
    left = _Left()
    while True:
        try:
            await _drain_open(coordinator, left, give_up, progress)
            left.log_error = ""
        except LogUnavailable as error:
            left.picture, left.log_error = None, str(error)
        remaining = give_up - time.monotonic()
        if left.nothing or remaining <= 0:
            return left
        # The coordinator is opened anew, so that a participant which was down is found again.
        await asyncio.sleep(min(REOPEN_SECONDS, remaining))


async def _drain_open(
    coordinator: Coordinator, left: _Left, give_up: float, progress: Progress
) -> None:
    """Rounds until nothing is left, the time is over, or a participant cannot be reached.

    The coordinator stays open between them: a branch of a living member is acted on only by a
    sweeper that has watched it.
    """
    await coordinator.open(sweep=False, tolerate_unreachable=True)
    try:
        while True:
            await coordinator.recover()
            left.picture = await look(coordinator)
            progress(len(left.picture.views))
            over = time.monotonic() >= give_up
            if left.nothing or left.picture.unreachable or over:
                return
            await asyncio.sleep(PAUSE_SECONDS)
    finally:
        await coordinator.close()


def _what_is_left(left: _Left) -> list[str]:
    """A line each, with what to do about it."""
    if left.picture is None:
        return [f"{left.log_error}; once the log answers, run `syncpoint drain` again"]
    lines = [
        f"participant {name} cannot be reached: {why}; bring it back, then run `syncpoint drain` "
        "again"
        for name, why in sorted(left.picture.unreachable.items())
    ]
    views = left.picture.views
    lines += [_left_line(view) for view in views[:LINES_MAX]]
    if len(views) > LINES_MAX:
        lines.append(f"{len(views) - LINES_MAX} more are left; `syncpoint list` shows them")
    return lines


def _left_line(view: View) -> str:
    to_be_typed = f"`syncpoint show {view.transaction}` says what to type"
    advice = {
        State.IN_FLIGHT: "its service works on it: stop that, or wait longer with --timeout",
        State.IN_DOUBT: f"recovery could not end it: {to_be_typed}, then drain again",
        State.NEEDS_PERSON: f"it needs a person: {to_be_typed}",
        State.FINISHED: "run it again",
    }[view.state]
    where = ", ".join(f"{each.participant} {each.state}" for each in view.branches)
    return f"transaction {view.transaction} is left, {view.phase} ({where or 'empty'}): {advice}"


def _as_plain(left: _Left, code: int) -> dict[str, object]:
    picture = left.picture
    return {
        "drained": left.nothing,
        "left": [] if picture is None else msgspec.to_builtins(picture.views),
        "unreachable": {} if picture is None else picture.unreachable,
        "log_error": left.log_error,
        "exit_code": code,
    }
