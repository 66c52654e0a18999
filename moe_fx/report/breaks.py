"""A `Break` from what Dynamo says, with the selections that it parts from their experts."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import CodeType

from torch import Tensor
from torch.fx import Graph, Node

from moe_fx.compat import BREAKS, frame_graph
from moe_fx.graph.selectors import op_name
from moe_fx.region import Break, frames_of, source_of

__all__ = ["DDP_CUTS", "broken", "cut", "given_up", "joined"]

_SELECTS = frozenset(("topk", "argmax", "max", "sort", "argsort"))
_DISPATCHES = frozenset(
    ("eq", "one_hot", "bincount", "histc", "scatter", "scatter_", "argsort", "sort", "item")
)
"""What is done with the ids of experts, and hardly with other indices."""

_LATER = "graph break in loop"
_BRANCHES = re.compile("ata-dependent branching|Could not guard on data-dependent expression")
_NO_TEST = (
    "If it asks whether an expert has any tokens, leave that out: an expert without tokens adds "
    "nothing."
)
_TRANSFORMERS = "transformers/integrations/moe.py"
_OTHER_EXPERTS = 'transformers captures with experts_implementation="grouped_mm" or "batched_mm".'
DDP_CUTS = "DDPOptimizer"
"""In the reason that Dynamo gives for a cut by DDP's optimiser."""
_DDP = (
    "DistributedDataParallel's optimiser cuts each graph where one of its buckets of gradients ends"
)
_NO_DDP = (
    "Set torch._dynamo.config.optimize_ddp = False before the model is compiled: DDP then reduces "
    "all gradients of a graph when its backward has run."
)


def broken(reason: str, stack: Sequence[traceback.FrameSummary], hides: tuple[str, ...]) -> Break:
    """Where a graph ended. reason, stack: Dynamo's."""
    source = _place(stack)
    return Break(_in_short(reason), source, hides, advice=_advice(reason, stack, hides))


def given_up(error: BaseException) -> Break:
    """A function of which nothing is compiled, by the exception that says why."""
    graph = frame_graph(error)
    error = _first(error)
    stack = getattr(error, "real_stack", None) or traceback.StackSummary()
    hides = () if graph is None else tuple(dict.fromkeys(map(source_of, _parted(graph))))
    source = _place(stack)
    advice = _advice(str(error), stack, hides)
    return Break(_in_short(str(error)), source, hides, skipped=True, advice=advice)


def cut(code: CodeType, hides: tuple[str, ...]) -> Break:
    """What DDP's optimiser does to a graph of the function ``code``."""
    return Break(_DDP, f"{code.co_filename}:{code.co_firstlineno}", hides, advice=_NO_DDP)


def joined(breaks: Iterable[Break]) -> list[Break]:
    """One of each place: of a function that is called by another, which Dynamo gives up as well,
    the reason that was found when it was tried by itself."""
    found: dict[str, Break] = {}
    for each in breaks:
        before = found.get(each.source)
        if before is not None:
            hides = tuple(dict.fromkeys([*before.hides, *each.hides]))
            each = replace(each, hides=hides, advice=each.advice or before.advice)
        found[each.source] = each
    return list(found.values())


def _first(error: BaseException) -> BaseException:
    """The break that others came of, such as that it was in a loop."""
    breaks = [error]
    while isinstance(breaks[-1].__cause__, BREAKS):
        breaks.append(breaks[-1].__cause__)
    return next((each for each in breaks if not str(each).startswith(_LATER)), error)


def _parted(graph: Graph) -> Iterable[Node]:
    """The selections whose indices the function itself brings to experts, or passes on from one
    function to another: it is run as it is, whatever becomes of what it calls."""
    for node in graph.nodes:
        if op_name(node) in _SELECTS and any(
            op_name(reader) in _DISPATCHES and _brings_together(node, reader)
            for reader in _readers_of_ids(node)
        ):
            yield node


def _brings_together(selection: Node, reader: Node) -> bool:
    calls, others = frames_of(selection), frames_of(reader)
    return len(calls) == 1 or len(others) == 1 or calls[:1] != others[:1]


def _readers_of_ids(selection: Node) -> set[Node]:
    """What reads integers that come of ``selection``."""
    found: set[Node] = set()
    stack = [selection]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user not in found:
                if _holds_integers(node):
                    found.add(user)
                if _holds_integers(user):
                    stack.append(user)
    return found


def _holds_integers(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and not value.dtype.is_floating_point


def _place(stack: Sequence[traceback.FrameSummary]) -> str:
    own = [frame for frame in stack if "/torch/" not in frame.filename] or list(stack)
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def _in_short(reason: str) -> str:
    """What Dynamo calls it, and its explanation."""
    first = reason.strip().split("\n\n")[0]
    lines = [line.strip() for line in first.splitlines()]
    why = re.search(r"Explanation: (.*)", first)
    return f"{lines[0].rstrip('.')}: {why[1]}" if why else lines[0]


def _advice(reason: str, stack: Sequence[traceback.FrameSummary], hides: tuple[str, ...]) -> str:
    if any(_TRANSFORMERS in frame.filename for frame in stack):
        return _OTHER_EXPERTS
    return _NO_TEST if hides and _BRANCHES.search(reason) else ""
