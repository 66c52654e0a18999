"""Lines of the user's source files, highlighted, for the HTML report."""

from __future__ import annotations

import linecache
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

_NO_GAP = 2
"""A hole of so few lines between two shown ones is shown too."""


@dataclass(frozen=True)
class Line:
    """number: from 1; 0 stands for left out lines. html: escaped. hit: it is what is pointed at."""

    number: int
    html: Markup
    hit: bool = False


@dataclass(frozen=True)
class Excerpt:
    """lines: empty if the file cannot be read."""

    file: str
    lines: tuple[Line, ...]


class Sources:
    """Reads and highlights each file once."""

    def __init__(self) -> None:
        self._files: dict[str, list[Markup]] = {}

    def excerpts(self, sources: Iterable[str], context: int) -> list[Excerpt]:
        """The lines ``sources`` (each ``file:line``) name, with ``context`` more around each; one
        excerpt per file, in order of appearance."""
        hits: dict[str, set[int]] = {}
        for source in sources:
            file, _, line = source.rpartition(":")
            if file and line.isdigit():
                hits.setdefault(file, set()).add(int(line))
        return [Excerpt(file, self._lines(file, at, context)) for file, at in hits.items()]

    def _lines(self, file: str, hits: set[int], context: int) -> tuple[Line, ...]:
        text = self._highlighted(file)
        near = {n for hit in hits for n in range(hit - context, hit + context + 1)}
        lines: list[Line] = []
        last = 0
        for number in sorted(n for n in near if 1 <= n <= len(text)):
            if lines and number - last > _NO_GAP + 1:
                lines.append(Line(0, Markup("")))
                last = number - 1
            lines += [Line(n, text[n - 1]) for n in range(last + 1 if lines else number, number)]
            lines.append(Line(number, text[number - 1], number in hits))
            last = number
        return tuple(lines)

    def _highlighted(self, file: str) -> list[Markup]:
        if file not in self._files:
            linecache.checkcache(file)
            code = "".join(linecache.getlines(file))
            lexer = PythonLexer(stripnl=False, ensurenl=False)
            html = highlight(code, lexer, HtmlFormatter(nowrap=True)).removesuffix("\n")
            self._files[file] = [Markup(line) for line in html.split("\n")] if html else []
        return self._files[file]


def style_sheet(style: str, scope: str) -> str:
    """The CSS of the highlighting, for elements in ``scope``."""
    css: str = HtmlFormatter(style=style).get_style_defs(scope)
    return css
