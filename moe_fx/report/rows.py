"""A table for people that stays readable where it does not fit.

Contract. Cells are plain text: brackets are no markup. A word (a file name with its line, a number)
is not cut in two, nor a short text into many lines: where the columns are too narrow for that, each
row becomes a block of lines ``heading  text`` instead.
"""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_AROUND_CELL = 3
"""Columns of the screen that a table needs beside each cell: a border and two spaces."""

_WIDE_ENOUGH = 40
"""A column that is to be so wide need not hold its text in two lines."""


class Rows:
    """Rows under headings. Columns without any text are left out."""

    def __init__(self, title: str, headings: tuple[str, ...]) -> None:
        self.title = title
        self.headings = headings
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """One cell for each heading."""
        if len(cells) != len(self.headings):
            raise ValueError(f"expected {len(self.headings)} cells, got {len(cells)}")
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = [
            (heading, [row[at] for row in self._rows])
            for at, heading in enumerate(self.headings)
            if any(row[at] for row in self._rows)
        ]
        sizes = [
            [Measurement.get(console, options, Text(text)) for text in (heading, *cells)]
            for heading, cells in shown
        ]
        least = [max(size.minimum for size in column) for column in sizes]
        wanted = [max(size.maximum for size in column) for column in sizes]
        readable = [
            max(low, min(high // 2, _WIDE_ENOUGH)) for low, high in zip(least, wanted, strict=True)
        ]
        room = options.max_width - _AROUND_CELL * len(shown) - 1
        if sum(readable) <= room:
            yield self._table(shown, _shared_out(room, readable, wanted))
        else:
            yield from self._blocks(shown)

    def _table(self, shown: list[tuple[str, list[str]]], widths: list[int]) -> Table:
        table = Table(title=Text(self.title), title_style="table.title", title_justify="left")
        for (heading, _), width in zip(shown, widths, strict=True):
            table.add_column(Text(heading), width=width)
        for row in zip(*(cells for _, cells in shown), strict=True):
            table.add_row(*(Text(cell) for cell in row))
        return table

    def _blocks(self, shown: list[tuple[str, list[str]]]) -> RenderResult:
        blocks = Table.grid(padding=(0, 2, 0, 0))
        blocks.add_column(style="bold", no_wrap=True)
        blocks.add_column(style="dim", no_wrap=True)
        blocks.add_column(overflow="fold")
        for number, row in enumerate(zip(*(cells for _, cells in shown), strict=True), 1):
            filled = [
                (heading, cell) for (heading, _), cell in zip(shown, row, strict=True) if cell
            ]
            for at, (heading, cell) in enumerate(filled):
                blocks.add_row("" if at else f"{number}.", Text(heading), Text(cell))
        yield Text(self.title, style="table.title")
        yield blocks


def _shared_out(room: int, least: list[int], wanted: list[int]) -> list[int]:
    """Widths of columns, from ``least`` up to ``wanted``: whichever wants most gets the next."""
    widths = list(least)
    for _ in range(min(room, sum(wanted)) - sum(least)):
        at = max(range(len(widths)), key=lambda at: wanted[at] - widths[at])
        widths[at] += 1
    return widths
