"""What is said of a graph that the backend compiled, to whoever wants to know.

The report goes to ``on_report``, to the log and to torch's trace; a line goes to the terminal; a
layer that was declined at a price is a warning. All of it at the end, also where compiling fails,
and nothing of it where the graph is to be captured anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch.fx import GraphModule

from moe_fx.compat import CaptureAgain
from moe_fx.entry.costly import warn_of_declined
from moe_fx.entry.net import log_report
from moe_fx.entry.progress import Progress
from moe_fx.options import Options
from moe_fx.report import Report


class Announcement:
    """Of one graph, around its compilation. ``graph``: it, as far as it has been made."""

    def __init__(
        self, graph: GraphModule, inputs: Sequence[Any], report: Report, options: Options
    ) -> None:
        self.graph = graph
        self._inputs = inputs
        self._report = report
        self._options = options
        self._progress = Progress(options)

    @contextmanager
    def base_compiles(self) -> Iterator[None]:
        with self._progress.base_compiles(self._report):
            yield

    def __enter__(self) -> Announcement:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, CaptureAgain):
            self._progress.clear()
            return
        if self._options.on_report is not None:
            self._options.on_report(self._report)
        log_report(self._report)
        self._progress.done(self._report)
        if error is None:
            warn_of_declined(self.graph, self._inputs, self._report, self._options)
