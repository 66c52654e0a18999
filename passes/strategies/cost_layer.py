"""A region as the cost model sees it (`moe_fx.cost.layer.Layer`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.compat import number, symbols
from moe_fx.cost.layer import Layer
from moe_fx.graph.names import shared_matmuls
from moe_fx.graph.nodes import is_grouped_matmul, shape, value
from moe_fx.passes.roles import RowTable
from moe_fx.region import Region

_UNKNOWN_TOKENS = 1024


def layer_of(region: Region, world_size: int, training: bool, sums_gradients: bool) -> Layer:
    """Tokens as at capture; 1024 where only the run will tell."""
    parts = region.parts
    tokens, cut = value(parts.tokens), value(parts.cut)
    return Layer(
        tokens=_num_tokens(tokens),
        top_k=region.top_k,
        num_experts=region.num_experts,
        world_size=world_size,
        matmuls=tuple(_matmul(node) for node in parts.body if _reads_matrices(node, region)),
        dtype=tokens.dtype,
        dispatch_bytes=float(tokens.shape[-1] * tokens.element_size()),
        combine_bytes=float(math.prod(shape(parts.cut)[1:]) * cut.element_size()),
        training=training,
        shared=tuple(map(_product, shared_matmuls(parts.combined, parts.tokens))),
        sums_gradients=sums_gradients,
    )


def buffer_bytes(region: Region, world_size: int) -> int:
    """Of strategy "direct": two halves, of a row and ids and weights of each rank's tokens
    (`moe_fx.devices.cuda.peers.pool`)."""
    tokens = value(region.parts.tokens)
    row = tokens.shape[-1] * tokens.element_size() + region.top_k * (4 + 4)
    return 2 * world_size * _num_tokens(tokens) * int(row)


def _num_tokens(tokens: Tensor) -> int:
    dims = list(tokens.shape[:-1])
    return math.prod(number(size, symbols([size], _UNKNOWN_TOKENS)) for size in dims)


def device_of(region: Region) -> torch.device:
    tensor = value(region.parts.tokens)
    assert isinstance(tensor, Tensor)
    return tensor.device


def _reads_matrices(node: Node, region: Region) -> bool:
    roles = region.parts.roles
    per_row = node.target is torch.ops.aten.bmm.default and any(
        isinstance(roles.get(source), RowTable) for source in node.all_input_nodes
    )
    return per_row or is_grouped_matmul(node)


def _product(node: Node) -> tuple[int, int]:
    rows: Any = node.args[1 if node.target is torch.ops.aten.addmm.default else 0]
    return int(shape(rows)[-1]), int(shape(node)[-1])


def _matmul(node: Node) -> tuple[int, int]:
    """Features in and out of a product of rows with their experts' matrices."""
    matrix = max(node.all_input_nodes, key=lambda source: len(shape(source)))
    if node.target is torch.ops.aten.bmm.default:
        matrix = max(node.all_input_nodes, key=lambda source: math.prod(shape(source)[1:]))
    wide, deep = (int(size) for size in shape(matrix)[-2:])
    out = int(max(shape(node)[1:]))
    return (deep, wide) if wide == out else (wide, deep)
