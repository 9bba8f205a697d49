"""How the story is printed: chapters, sentences, facts, and what programs said.

It reads the same on a terminal, in a narrow window, in a CI log and without colour.
"""

from __future__ import annotations

import textwrap

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

INDENT = 4


class NotAsTold(Exception):
    """What was found on the servers is not what the story says."""


class Narrator:
    def __init__(self, console: Console) -> None:
        self.console = console
        self._chapter = 0

    def title(self, text: str) -> None:
        self.console.print()
        self.console.print(Text(text, style="bold"))

    def chapter(self, text: str) -> None:
        self._chapter += 1
        self.console.print()
        self.console.print(Text(f"{self._chapter}. {text}", style="bold cyan"))

    def say(self, text: str) -> None:
        """A paragraph; line ends in it do not count."""
        self.console.print(Text(" ".join(text.split())))

    def good(self, text: str) -> None:
        self._fact(text, "green")

    def bad(self, text: str) -> None:
        self._fact(text, "red")

    def code(self, text: str) -> None:
        """Lines as they are, for instance what a program printed."""
        lines = textwrap.dedent(text).strip("\n")
        self.console.print(Padding.indent(Text(lines, style="dim", overflow="fold"), INDENT))

    def table(self, table: Table) -> None:
        self.console.print()
        self.console.print(table)

    def expect(self, came_out: bool, told: str) -> None:
        """Go on only if the story is true; raises `NotAsTold`."""
        if not came_out:
            raise NotAsTold(told)

    def _fact(self, text: str, style: str) -> None:
        body = Text(" ".join(text.split()), style=style, overflow="fold")
        self.console.print(Padding.indent(body, INDENT))


def comparison(title: str, columns: list[str], rows: list[tuple[str, ...]]) -> Table:
    """A table whose first column says what the others hold."""
    table = Table("", *columns, title=title, title_justify="left", box=box.SIMPLE)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
