"""MC2's limits, by generation of the device, and its lowering.

Source of the limits: the op-plugin page of ``npu_moe_distribute_dispatch`` (torch_npu 7.0), but for
A3's hidden sizes: that page has 7168 only, later versions take smaller ones; which was not found
written where this was made. If CANN refuses one, please say so (docs/ascend.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from moe_fx.devices.ascend import npu
from moe_fx.devices.ascend.agreement import agree
from moe_fx.devices.ascend.emit import Emit, value_of

ops = torch.ops.moe_fx


@dataclass(frozen=True)
class Limits:
    """tokens: of a rank; hidden: (least, most, multiple of); ranks: of the group, None: any."""

    tokens: int
    hidden: tuple[int, int, int]
    top_k: int
    ranks: tuple[int, ...] | None = None


LIMITS = {
    "A2": Limits(tokens=256, hidden=(32, 7168, 32), top_k=8, ranks=(16, 32, 64)),
    "A3": Limits(tokens=512, hidden=(1024, 7168, 32), top_k=8),
}


def limits(tokens: int | None, hidden: int, top_k: int, world_size: int) -> str:
    """What is against MC2 for such a layer on this NPU; "" if nothing is. tokens: the most that a
    rank may have, None: there is no bound."""
    generation = npu.generation()
    if generation not in LIMITS:
        return f"MC2 is known for {' and '.join(LIMITS)}, this is {generation}"
    most = LIMITS[generation]
    if tokens is None:
        return (
            f"MC2 takes at most {most.tokens} tokens a rank on {generation}, and nothing bounds "
            "them here: torch._dynamo.mark_dynamic(x, 0, min=2, max=...) would"
        )
    least, largest, multiple = most.hidden
    if tokens > most.tokens:
        return f"{tokens} tokens a rank, MC2 takes at most {most.tokens} on {generation}"
    if not least <= hidden <= largest or hidden % multiple:
        return (
            f"hidden size {hidden}, MC2 takes {least} to {largest} in steps of {multiple} on "
            f"{generation}"
        )
    if top_k > most.top_k:
        return f"{top_k} experts a token, MC2 takes at most {most.top_k} on {generation}"
    if most.ranks is not None and world_size not in most.ranks:
        return f"{world_size} ranks, MC2 takes {', '.join(map(str, most.ranks))} on {generation}"
    return ""


def distribute(emit: Emit, node: Node) -> tuple[Node, ...]:
    given: Any = node.args
    tokens, ids, num_experts, group, *agreement = given
    agree(node.graph, node, [tokens], group, *agreement)
    sent = emit.npu(
        "npu_moe_distribute_dispatch_v2", tokens, ids, *_place(node, group, num_experts)
    )
    # rows, (scales), assist, counts, ends of each expert and source
    rows, _, assist, counts, ends = (emit.item(sent, at) for at in range(5))
    return rows, counts, assist, ends


def collect(emit: Emit, node: Node) -> Node:
    rows, ids, weights, assist, ends, num_experts, group = node.args
    place = _place(node, group, num_experts)
    return emit.npu("npu_moe_distribute_combine_v2", rows, ids, assist, ends, weights, *place)


def _place(node: Node, group: Any, num_experts: Any) -> tuple[str, int, int, int]:
    """(HCCL's name of the group, ranks, this one, experts)."""
    device = value_of(node.args[0]).device.type
    world, rank = npu.size_and_rank(group)
    if device == "npu":
        return npu.communicator_name(group), world, rank, num_experts
    return str(group), world, rank, num_experts


LOWERINGS: dict[Any, Callable[[Emit, Node], Node | tuple[Any, ...]]] = {
    ops.distribute.default: distribute,
    ops.collect.default: collect,
}
