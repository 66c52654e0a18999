"""Tensor parallelism around an expert exchange: rows split by sequence or by hidden dimension.

All are differentiable and traceable (functional collectives), and take the tensor-parallel group;
with one rank they return their input. ``P``: ranks of the group. Names and meaning as in
vLLM-Ascend 0.9.1 (``vllm_ascend.distributed.tensor_parallel``), which has no gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fx.compat import all_gather_rows, exchange_equal_rows, reduce_scatter_rows
from moe_fx.errors import BadInput

__all__ = [
    "all_gather_last_dim_from_tensor_parallel_region",
    "all_to_all_hp2sp",
    "all_to_all_sp2hp",
    "gather_from_sequence_parallel_region",
    "reduce_scatter_last_dim_to_tensor_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
]


def all_to_all_sp2hp(input_: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[n, H] -> [P * n, H / P]``: from every rank's own tokens to all tokens, a slice wide."""
    if group is None or group.size() == 1:
        return input_
    rows = input_.reshape(-1, input_.shape[-1])
    slices = rows.chunk(_divided(rows.shape[-1], group, "features"), dim=1)
    return exchange_equal_rows(torch.cat(slices), group.size(), group.group_name)


def all_to_all_hp2sp(input_: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[P * n, H / P] -> [n, H]``: the way back."""
    if group is None or group.size() == 1:
        return input_
    rows = input_.reshape(-1, input_.shape[-1])
    count = _divided(rows.shape[0], group, "tokens")
    received = exchange_equal_rows(rows, group.size(), group.group_name)
    return torch.cat(received.chunk(count), dim=-1)


def all_gather_last_dim_from_tensor_parallel_region(
    input_: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """``[n, H / P] -> [n, H]``. Gradient: reduce-scatter along the last dimension."""
    if group is None or group.size() == 1:
        return input_
    world = group.size()
    gathered = all_gather_rows(input_.contiguous(), world, group.group_name)
    parts = gathered.view(world, *input_.shape)
    return torch.cat(parts.unbind(0), dim=-1)


def reduce_scatter_last_dim_to_tensor_parallel_region(
    input_: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """``[..., H] -> [..., H / P]``, summed over ranks. Gradient: all-gather along it."""
    if group is None or group.size() == 1:
        return input_
    parts = input_.chunk(_divided(input_.shape[-1], group, "features"), dim=-1)
    summed = reduce_scatter_rows(torch.stack(parts), group.size(), group.group_name)
    return summed.squeeze(0)


def gather_from_sequence_parallel_region(input_: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[n, ...] -> [P * n, ...]``. Gradient: reduce-scatter along the first dimension."""
    if group is None or group.size() == 1:
        return input_
    return all_gather_rows(input_.contiguous(), group.size(), group.group_name)


def reduce_scatter_to_sequence_parallel_region(
    input_: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """``[P * n, ...] -> [n, ...]``, summed over ranks. Gradient: all-gather."""
    if group is None or group.size() == 1:
        return input_
    _divided(input_.shape[0], group, "tokens")
    return reduce_scatter_rows(input_.contiguous(), group.size(), group.group_name)


def _divided(size: int, group: dist.ProcessGroup, what: str) -> int:
    """The group's size, which ``size`` is a multiple of."""
    if size % group.size():
        raise BadInput(
            f"{size} {what} cannot be split evenly over the {group.size()} ranks of the "
            "tensor-parallel group"
        )
    return group.size()
