"""How rows travel by MC2: one op permutes and sends them, one fetches and sums them.

Pseudo-code::

    sizes are even, or an error on every rank
    rows, counts = distribute(tokens, ids)
    out = collect(experts(rows), ids, weights)
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_fx.cost.layer import fill
from moe_fx.graph.nodes import shape, value
from moe_fx.passes.strategies.combine import weights_of_sum
from moe_fx.passes.strategies.emitter import Emitter

aten = torch.ops.aten
ops = torch.ops.moe_fx


def mc2(emitter: Emitter) -> Node:
    parts, plan, call, item = emitter.parts, emitter.plan, emitter.call, emitter.item
    top_k = int(shape(parts.ids)[1])
    ids = call(aten._to_copy.default, parts.ids, dtype=torch.int32)
    weights = weights_of_sum(emitter)
    if weights is None:
        weights = call(aten.ones_like.default, ids, dtype=torch.float32)
    else:
        weights = call(aten._to_copy.default, weights, dtype=torch.float32)
    sent = call(ops.distribute.default, parts.tokens, ids, plan.num_experts, plan.group_name)
    rows, counts, assist, ends = (item(sent, at) for at in range(4))
    share = fill(top_k, plan.world_size, min(top_k, plan.local_experts), None)
    done = emitter.experts(rows, counts, 0, share)
    out = call(
        ops.collect.default, done, ids, weights, assist, ends, plan.num_experts, plan.group_name
    )
    dtype = value(parts.combined).dtype
    if dtype != value(parts.cut).dtype:
        out = call(aten._to_copy.default, out, dtype=dtype)
    return out
