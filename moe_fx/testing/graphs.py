"""The graphs of a model: as the passes get them, and as they leave them for a rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from moe_fx import passes
from moe_fx.capture.capture import capture as to_functional_aten
from moe_fx.compat import graph_breaks
from moe_fx.errors import MoeFxError
from moe_fx.options import Options
from moe_fx.report import Report


def capture(
    fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> GraphModule:
    """``fn(*args, **kwargs)`` as the passes get it: one graph of functional ATen.

    Runs ``fn`` once. ``dynamic`` as in torch.compile. Raises `MoeFxError` if Dynamo captures no
    graph or several; in the latter case it says where and why they part. See `capture_all`.
    """
    graphs = capture_all(fn, *args, dynamic=dynamic, **kwargs)
    if len(graphs) == 1:
        return graphs[0]
    if not graphs:
        raise MoeFxError("expected one graph, captured none: the function runs no torch operation")
    breaks = "\n".join(f"- {reason}" for reason in graph_breaks(fn, *args, **kwargs))
    torch._dynamo.reset()
    raise MoeFxError(
        f"expected one graph, captured {len(graphs)}: moe_fx.testing.capture_all returns all. "
        f"The graph breaks:\n{breaks}"
    )


def capture_all(
    fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> list[GraphModule]:
    """Like `capture`, for functions that break the graph: every graph, as they are reached."""
    graphs: list[GraphModule] = []

    def record(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(to_functional_aten(module, inputs))
        return module.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=record, dynamic=dynamic)(*args, **kwargs)
    torch._dynamo.reset()
    return graphs


def rewritten(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    world_size: int = 2,
    rank: int = 0,
    dynamic: bool | None = None,
) -> GraphModule:
    """The graph of ``fn(*args, **kwargs)`` as one of ``world_size`` expert-parallel ranks gets it.

    No process group is needed, so the graph can be read but, with more than one rank, not run. Its
    text is for `torch.testing.FileCheck`::

        FileCheck().check("moe_fx.permute").check("moe_fx.all_to_all").run(graph.code)

    Raises AssertionError, with the report, if nothing was rewritten; as `capture` otherwise.
    """
    module = capture(fn, *args, dynamic=dynamic, **(kwargs or {}))
    report = Report()
    context = passes.Context(options=Options(), report=report)
    result = passes.run(module, context, passes.for_ranks(world_size, rank))
    if result is module:
        raise AssertionError(f"nothing was rewritten\n\n{report.to_text()}")
    return result
