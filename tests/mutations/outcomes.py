"""What becomes of a changed graph: it is a program like any other.

Either the passes decline it, or the result of the rewrite equals the *changed* graph's, on one
device and on two ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from moe_fx.errors import MoeFxError
from moe_fx.graph.copy import copy_graph
from tests.mutations.changes import Mutation, named
from tests.passes.graphs import Captured, relative_error, rewritten_on_ranks, run_ranks

CLOSE = 1e-4  # a changed graph may be ill-conditioned
WORLDS = (1, 2)
FINE = ("equal", "declined", "invalid")


def mutated(module: GraphModule, mutation: Mutation, inputs: list[Any]) -> GraphModule | None:
    """The changed graph with shapes worked out anew, or None if it does not run."""
    copy = copy_graph(module)
    mutation.change(copy.graph, named(copy.graph, mutation.node))
    copy.graph.eliminate_dead_code()
    copy.recompile()
    for node in copy.graph.nodes:
        node.meta.pop("unbacked_bindings", None)  # sizes are named anew
    try:
        with torch.no_grad():
            copy(*inputs)
            FakeTensorProp(
                copy, FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
            ).propagate(*inputs)
    except (RuntimeError, IndexError, TypeError, ValueError, AssertionError):
        return None
    return copy


def outcome(case: Captured, mutation: Mutation, verify: str) -> str:
    """ "invalid", "declined", "equal", or what is wrong."""
    changed = mutated(case.module, mutation, case.inputs)
    if changed is None:
        return "invalid"
    inputs = [case.other_inputs(seed=20 + rank) for rank in range(max(WORLDS))]
    try:
        with torch.no_grad():
            expected = [changed(*values) for values in inputs]
    except (RuntimeError, IndexError):
        return "invalid"
    for world in WORLDS:
        graphs, report = rewritten_on_ranks(changed, world, verify)
        if graphs is None:
            return "declined" if report.declined else "declined without a reason"
        try:
            found = run_ranks(graphs, inputs[:world])
        except (RuntimeError, IndexError, MoeFxError) as error:
            return f"fails on {world} ranks: {error}"
        distance = relative_error(expected[:world], found)
        if distance > CLOSE:
            return f"wrong by {distance:.1e} on {world} ranks"
    return "equal"


def wrong(outcomes: dict[Mutation, str]) -> dict[str, str]:
    return {str(mutation): found for mutation, found in outcomes.items() if found not in FINE}
