"""CPU kernels of the ``npu::`` ops that lowerings emit, written from their documented semantics.

``register()`` makes a lowered graph run on CPU: so its values are compared with the original's
where there is no NPU, and `moe_fx.npu_selftest` compares an NPU's results with them. They are meant
to be read, not to be fast.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import Library

from moe_fx.compat import group_of_ranks

_INT = torch.int32


def token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    top_k = 1 if indices.dim() == 1 else indices.shape[1]
    order = torch.argsort(indices.flatten(), stable=True)
    return tokens[order[: num_out_tokens or None] // top_k].contiguous(), _inverse(order)


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return inverse.to(_INT)


def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
) -> Tensor:
    top_k = 1 if probs is None else probs.shape[1]
    picked = permuted_tokens[sorted_indices.long()].float()
    picked = picked.view(-1, top_k, permuted_tokens.shape[1])
    if probs is not None:
        picked = picked * probs.float().unsqueeze(-1)
    return picked.sum(1).to(permuted_tokens.dtype)


def token_permute_grad_v2(
    grad: Tensor,
    sorted_indices: Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype,
    num_topk: int,
    padded_mode: bool = False,
) -> Tensor:
    picked = grad[sorted_indices.long()].float().view(tokens_size_0, num_topk, grad.shape[1])
    return picked.sum(1).to(tokens_dtype)


def token_unpermute_grad(
    permuted_tokens: Tensor,
    grad: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
) -> tuple[Tensor, Tensor]:
    top_k = 1 if probs is None else probs.shape[1]
    spread = grad.float().repeat_interleave(top_k, 0)
    rows = torch.zeros_like(permuted_tokens)
    if probs is None:
        rows[sorted_indices.long()] = spread.to(rows.dtype)
        return rows, grad.new_empty(0)
    picked = permuted_tokens[sorted_indices.long()].float()
    rows[sorted_indices.long()] = (spread * probs.float().view(-1, 1)).to(rows.dtype)
    return rows, (spread * picked).sum(1).view(probs.shape).to(probs.dtype)


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    **others: Any,
) -> list[Tensor]:
    (rows,) = x
    sizes = group_list.tolist()
    if group_list_type == 0:
        sizes = [end - start for start, end in zip([0, *sizes], sizes, strict=False)]
    if group_type == 2:
        (other,) = weight
        used = sum(sizes)
        pairs = zip(rows[:, :used].split(sizes, 1), other[:used].split(sizes), strict=True)
        return [torch.stack([one @ two for one, two in pairs])]
    matrices = list(weight[0]) if len(weight) == 1 else list(weight)
    used = sum(sizes)
    groups = zip(rows[:used].split(sizes), matrices, strict=True)
    behind = rows.new_full((rows.shape[0] - used, matrices[0].shape[1]), float("nan"))
    return [torch.cat([*(group @ matrix for group, matrix in groups), behind])]


def swiglu(rows: Tensor, dim: int = -1) -> Tensor:
    gate, up = rows.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(rows.dtype)


def gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    best = x.float().softmax(-1).topk(k, -1)
    rows = torch.arange(x.shape[0] * k, dtype=_INT).view(k, -1).t().contiguous()
    return best.values.to(x.dtype), best.indices.to(_INT), rows


def gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = x.float().sigmoid() if norm_type == 1 else x.float().softmax(-1)
    choice = scores if bias is None else scores + bias.float()
    if group_count > 1:
        groups = choice.unflatten(-1, (group_count, -1))
        of_group = groups.topk(2 if group_select_mode == 1 else 1, -1).values.sum(-1)
        best = of_group.topk(k_group, -1).indices
        out = torch.ones_like(of_group).scatter(1, best, 0.0).bool()
        choice = groups.masked_fill(out.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.topk(k, -1).indices
    weights = scores.gather(1, ids)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), ids.to(_INT), scores


def init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, end = active_expert_range or (0, expert_num)
    flat = expert_idx.flatten().long()
    own = (flat >= first) & (flat < end)
    order = torch.argsort(torch.where(own, flat, 1 << 30), stable=True)
    rows = x[order // expert_idx.shape[1]].clone()
    rows[int(own.sum()) :] = float("nan") if x.is_floating_point() else 0
    where = _inverse(order).masked_fill(~own, -1) if row_idx_type == 0 else order.to(_INT)
    counts = torch.bincount(flat, minlength=expert_num)[first:end].clone()
    return rows, where, counts, torch.zeros(flat.numel())


def finalize_routing(
    rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    top_k = int(k or 1) if scales is None else scales.shape[1]
    where = expanded_src_to_dst_row.long()
    by_token = where.view(-1, top_k) if drop_pad_mode in (2, 3) else where.view(top_k, -1).t()
    picked = rows[by_token].float()
    if scales is not None:
        picked = picked * scales.float().unsqueeze(-1)
    return picked.sum(1).to(rows.dtype)


def all_to_all_single(
    numbers: Tensor,
    send_counts: Sequence[int],
    send_displacements: Sequence[int],
    recv_counts: Sequence[int],
    recv_displacements: Sequence[int],
    tag: str,
    ranks: list[int],
    group_size: int,
) -> Tensor:
    group = group_of_ranks(tag, ranks)
    received = numbers.new_empty(sum(recv_counts))
    dist.all_to_all_single(received, numbers, list(recv_counts), list(send_counts), group=group)
    return received


def distribute_dispatch(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    **others: Any,
) -> tuple[Tensor, ...]:
    rows, counts, assist, ends = torch.ops.moe_fx.distribute(
        x, expert_ids, moe_expert_num, group_ep
    )
    scales, none = x.new_empty(rows.shape[0], dtype=torch.float32), ends.new_empty(0)
    return rows, scales, assist, counts, ends, none, x.new_empty(0, dtype=torch.float32)


def distribute_combine(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    **others: Any,
) -> Tensor:
    collected: Tensor = torch.ops.moe_fx.collect(
        expand_x,
        expert_ids,
        expert_scales,
        assist_info_for_combine,
        ep_send_counts,
        moe_expert_num,
        group_ep,
    )
    return collected


@functools.cache
def register() -> None:
    """Serve the ops on CPU tensors, once. torch_npu must be imported."""
    for namespace, kernels in _KERNELS.items():
        library = Library(namespace, "IMPL", "CPU")
        for name, kernel in kernels.items():
            library.impl(name, kernel)
        _libraries.append(library)


_libraries: list[Library] = []
_KERNELS: dict[str, dict[str, Any]] = {
    "npu": {
        "npu_moe_token_permute": token_permute,
        "npu_moe_token_unpermute": token_unpermute,
        "npu_moe_token_permute_grad_v2": token_permute_grad_v2,
        "npu_moe_token_unpermute_grad": token_unpermute_grad,
        "npu_grouped_matmul": grouped_matmul,
        "npu_swiglu": swiglu,
        "npu_moe_gating_top_k_softmax": gating_top_k_softmax,
        "npu_moe_gating_top_k": gating_top_k,
        "npu_moe_init_routing_v2": init_routing_v2,
        "npu_moe_finalize_routing": finalize_routing,
        "npu_moe_distribute_dispatch_v2": distribute_dispatch,
        "npu_moe_distribute_combine_v2": distribute_combine,
    },
    "npu_define": {"all_to_all_single_npu": all_to_all_single},
}
