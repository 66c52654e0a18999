"""What a proof by value cannot see, and is refused before: rounding on the way, and chance.

A proof compares equations, in float64. So it does not see that weighted rows are rounded to a
narrower dtype on their way, nor what is beyond the largest number of that dtype. A random op gives
other values in each run, on another rank too.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.fx import Node

from moe_fx.graph.flow import closure
from moe_fx.graph.nodes import is_random, value
from moe_fx.graph.refusal import ByChance, Refusal
from moe_fx.passes.recognise.by_value.rows.row_layout import RowLayout
from moe_fx.passes.recognise.by_value.surroundings import Surroundings
from moe_fx.passes.recognise.by_value.trials import Trials


def check_rounding(around: Surroundings, trials: Trials, layout: RowLayout, cut: Node) -> None:
    """Raises `Refusal` unless weighted rows keep the experts' dtype, or get the result's. cut: the
    experts' result."""
    inside = [value(n) for n in layout.laid if not cut < n]
    kept = {val.dtype for val in inside if isinstance(val, Tensor)}
    least = min(value(cut).dtype.itemsize, value(trials.result).dtype.itemsize)
    for node in trials.nodes:
        val = value(node)
        if not cut < node or not isinstance(val, Tensor) or not val.is_floating_point():
            continue
        rounds = val.dtype not in kept and val.dtype.itemsize < least
        if rounds and around.what(node) == "mixed":
            reason = f"weighted rows are rounded to {val.dtype} on their way"
            raise Refusal(reason, node, 6)


def check_chance(between: Iterable[Node], starts: list[Node], inside: Iterable[Node]) -> None:
    """Raises `ByChance` if something random is in the experts, or on the way to where their rows
    first meet. between: from the tokens to the result; inside: of the experts' copies."""
    way = set(between)
    rows = closure(starts, lambda node: way.intersection(node.users))
    rows |= closure(starts, lambda node: way.intersection(node.all_input_nodes))
    chance = next(filter(is_random, sorted(rows.union(inside))), None)
    if chance is not None:
        raise ByChance(chance)
