"""Strategy "direct": each token once to every rank that has one of its experts, and one row back
from each, which is that rank's share of the token's result (`moe_fx.ops.direct`).

Pseudo-code::

    rows, here, factors = direct_dispatch(tokens, ids, weights)
    pairs, row_map = permute_local(rows, here);  pairs = experts(pairs)
    shares = unpermute(pairs, row_map, factors)
    out = direct_combine(shares, here, ids)

of a layer whose experts can be fused, in training::

    shares = fused_experts_training(rows, here, factors, tables)

and in inference all of it in one op, ``direct_experts``, within which no size depends on other
ranks as far as a compiler can see.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_fx.graph.nodes import shape
from moe_fx.passes.strategies.combine import weights_of_sum
from moe_fx.passes.strategies.emitter import Emitter
from moe_fx.passes.strategies.even import filled_share, most_local_pairs, sent_tokens
from moe_fx.passes.strategies.fused import fused_arguments

aten = torch.ops.aten
ops = torch.ops.moe_fx


def direct(emitter: Emitter) -> Node:
    parts, plan, call, item = emitter.parts, emitter.plan, emitter.call, emitter.item
    weighs = parts.weights is not None and not parts.weighs_tokens
    weights = weights_of_sum(emitter) if weighs else None
    place = plan.places, plan.group_name
    if plan.fused is not None and not plan.fused.trains:
        arguments = fused_arguments(emitter, parts.tokens, parts.ids, weights)
        return call(ops.direct_experts.default, *arguments, *place)
    sent = sent_tokens(emitter)
    dispatched = call(ops.direct_dispatch.default, sent, parts.ids, weights, *place)
    rows, here, factors = (item(dispatched, at) for at in range(3))
    given = factors if weighs else None
    if plan.fused is not None:
        arguments = fused_arguments(emitter, rows, here, given)
        shares = item(call(ops.fused_experts_training.default, *arguments), 0)
    else:
        shares = _shares(emitter, rows, here, given)
    combined = call(ops.direct_combine.default, shares, None, here, parts.ids, *place)
    return item(combined, 0)


def _shares(emitter: Emitter, rows: Node, here: Node, factors: Node | None) -> Node:
    parts, plan, call, item = emitter.parts, emitter.plan, emitter.call, emitter.item
    most = most_local_pairs(emitter)
    permuted = call(
        ops.permute_local.default, rows, here, 0, plan.local_experts, 1, most, None, False
    )
    pairs, row_map, counts = (item(permuted, at) for at in range(3))
    result = emitter.experts(pairs, counts, 0, filled_share(emitter))
    sizes = [call(aten.sym_size.int, rows, 0), *shape(parts.combined)[1:]]
    return call(ops.unpermute.default, result, row_map, factors, sizes, True)
