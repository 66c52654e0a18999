"""A warning for each layer that was declined although its experts were to be spread over ranks.

Such a layer runs as it is, which is right and dear: without a word it would cost memory and time in
every step. Once for each layer and process, at the line in the user's model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

from moe_fx.compat import compile_id
from moe_fx.errors import DeclinedLayerWarning
from moe_fx.options import Options
from moe_fx.region import Declined
from moe_fx.report import Report

_GATHER = "_c10d_functional.all_gather_into_tensor"

_told: set[tuple[str, ...]] = set()


def warn_of_declined(
    module: GraphModule, inputs: Sequence[Any], report: Report, options: Options
) -> None:
    """module: the graph as it is left, with example inputs. Bugs are no matter of this: the log has
    them as errors."""
    declined = [each for each in report.missed if not each.bug]
    costs = " and ".join(_costs(module, inputs, options)) if declined else ""
    if not costs:
        return
    frame = compile_id().partition("/")[0]  # of a graph that is compiled anew, the same
    for each in declined:
        layer = (frame, each.module, each.node, each.source, costs)
        if layer not in _told:
            _told.add(layer)
            _warn(each, costs)


def _costs(module: GraphModule, inputs: Sequence[Any], options: Options) -> Iterator[str]:
    if options.ep_group is not None and options.ep_group.size() > 1:
        yield f"each of the {options.ep_group.size()} ranks computes all of its experts"
    if _gathers(module) or any(map(_is_shard, inputs)):
        yield "its experts' shards are gathered on every rank, in every step"


def _gathers(module: GraphModule) -> bool:
    return any(
        str(node.target).removesuffix(".default").endswith(_GATHER)
        for part in module.modules()
        if isinstance(part, GraphModule)
        for node in part.graph.nodes
        if node.op == "call_function"
    )


def _is_shard(value: Any) -> bool:
    """As Dynamo hands it over: a tensor with three or more dimensions that is cut over ranks."""
    return (
        isinstance(value, DTensor)
        and value.ndim > 2
        and any(
            place.is_shard() and size > 1
            for place, size in zip(value.placements, value.device_mesh.shape, strict=True)
        )
    )


def _warn(declined: Declined, costs: str) -> None:
    file, _, line = declined.source.rpartition(":")
    name = declined.source or declined.node
    if declined.module:
        name = f"{declined.module} ({name})"
    warnings.warn_explicit(
        f"moe_fx leaves the MoE layer {name} as it is: "
        f"{costs}. The reason: {declined.reason} (graph node {declined.node}). "
        "moe_fx.explain(model, *args) says more; to go without this warning: "
        "warnings.simplefilter('ignore', moe_fx.DeclinedLayerWarning).",
        DeclinedLayerWarning,
        filename=file or __file__,
        lineno=int(line) if line.isdigit() else 0,
    )
