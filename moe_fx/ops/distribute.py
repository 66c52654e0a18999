"""Rows to their experts' ranks and back in one op each: Ascend's MC2.

``distribute`` permutes and exchanges, ``collect`` exchanges and sums: what torch_npu's
``npu_moe_distribute_dispatch_v2`` and ``npu_moe_distribute_combine_v2`` do on an NPU, with buffers
of fixed size and no host sync. Every rank has the same number of tokens, and no token meets an
expert twice. Not differentiable.

The kernels here are for any backend of torch.distributed, in two exchanges and an all-gather: to
verify, simulate and test what NPUs run, not to be fast.

Shapes: ``T`` tokens, ``K`` experts per token, ``E`` experts, ``W`` ranks, ``L = E / W`` local
experts, ``A = W * T * min(L, K)`` rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fx.compat import all_gather_single, resolve_group
from moe_fx.ops._define import define
from moe_fx.ops.exchange import count_bytes
from moe_fx.ranks.agree import ensure
from moe_fx.ranks.waiting import TIMEOUT, WAITING, of, start_and_wait

_ASSIST = 128
"""Numbers per row that ``collect`` may need, as torch_npu has them; here: the source rank."""


def _rows(num_tokens: int, top_k: int, num_experts: int, world: int) -> int:
    return world * num_tokens * min(num_experts // world, top_k)


def _distribute(
    tokens: Tensor,
    ids: Tensor,
    num_experts: int,
    group: str,
    plans: str | None = None,
    timeout: float = 0.0,
    *,
    layer: str = "",
    exchange_timeout: float = TIMEOUT,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``tokens [T, H]``, ``ids [T, K]`` int32 to the rows of this rank's experts ``[A, H]``, by
    expert and within one by source rank; how many of each expert ``[L]``; and what ``collect``
    wants back: ``[A * 128]`` and ``[W * L]``, where the rows of each expert and source end. Rows
    behind those of the last expert are nobody's.

    ``plans``, ``timeout``, ``layer``, ``exchange_timeout``: as of ``exchange_counts``."""
    if plans is not None:
        ensure(group, plans, timeout)
    process_group = resolve_group(group)
    waiting = f"tokens of {of(layer)}", exchange_timeout
    own = torch.tensor([len(tokens)], device=tokens.device)
    counts = _gathered(own, process_group, *waiting).tolist()
    if len(set(counts)) != 1:
        raise RuntimeError(
            f"moe_fx::distribute: the ranks have {counts} tokens: MC2 needs the same number on "
            'every rank in every step. Pad them, or use strategy="alltoall".'
        )
    every_tokens, every_ids = (_gathered(each, process_group, *waiting) for each in (tokens, ids))
    count_bytes(group, (process_group.size() - 1) * tokens.numel() * tokens.element_size())
    return share(every_tokens, every_ids, process_group.rank(), process_group.size(), num_experts)


def _gathered(value: Tensor, group: dist.ProcessGroup, what: str, timeout: float) -> Tensor:
    every = value.new_empty((group.size() * value.shape[0], *value.shape[1:]))
    value = value.contiguous()
    start_and_wait(
        lambda async_op: all_gather_single(every, value, group=group, async_op=async_op),
        group,
        value.device,
        what,
        timeout,
    )
    return every


def share(
    tokens: Tensor, ids: Tensor, rank: int, world: int, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``distribute`` gives ``rank`` of the tokens and ids of all ranks."""
    local, top_k = num_experts // world, ids.shape[1]
    each = tokens.shape[0] // world
    flat = ids.reshape(-1).long() - rank * local
    key = torch.where((flat >= 0) & (flat < local), flat, local)
    order = torch.argsort(key, stable=True)[: _rows(each, top_k, num_experts, world)]
    token = order // top_k
    source = token // max(1, each)
    blocks = torch.bincount(key[order] * world + source, minlength=local * world)[: local * world]
    assist = source.to(torch.int32).unsqueeze(1).expand(-1, _ASSIST).reshape(-1).contiguous()
    rows = tokens.index_select(0, token)
    return rows, blocks.view(local, world).sum(1), assist, blocks.cumsum(0).to(torch.int32)


def _distribute_fake(
    tokens: Tensor,
    ids: Tensor,
    num_experts: int,
    group: str,
    plans: str | None = None,
    timeout: float = 0.0,
    **waiting: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    world = resolve_group(group).size()
    num_rows = _rows(ids.shape[0], ids.shape[1], num_experts, world)
    return (
        tokens.new_empty((num_rows, *tokens.shape[1:])),
        tokens.new_empty((num_experts // world,), dtype=torch.int64),
        tokens.new_empty((num_rows * _ASSIST,), dtype=torch.int32),
        tokens.new_empty((num_experts,), dtype=torch.int32),
    )


def _collect(
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    assist: Tensor,
    ends: Tensor,
    num_experts: int,
    group: str,
    *,
    layer: str = "",
    exchange_timeout: float = TIMEOUT,
) -> Tensor:
    """``rows [A, H]`` of ``distribute``, once the experts have been at them, to ``[T, H]``: each
    token's, times ``weights [T, K]`` float32, summed."""
    process_group = resolve_group(group)
    sent, send = parcels(rows, assist, ends, process_group.size())
    recv = owners(ids, num_experts, process_group.size())
    arrived = rows.new_empty((ids.numel(), *rows.shape[1:]))
    start_and_wait(
        lambda async_op: dist.all_to_all_single(
            arrived, sent, recv, send, group=process_group, async_op=async_op
        ),
        process_group,
        rows.device,
        f"rows of {of(layer)}",
        exchange_timeout,
    )
    own = send[process_group.rank()]
    count_bytes(group, (sent.shape[0] - own) * rows[0:1].numel() * rows.element_size())
    return summed(arrived, ids, weights)


def parcels(rows: Tensor, assist: Tensor, ends: Tensor, world: int) -> tuple[Tensor, list[int]]:
    """The rows that are somebody's, by the rank they came from, and how many go to each."""
    source = assist.view(-1, _ASSIST)[: int(ends[-1]), 0].long()
    back = rows.index_select(0, torch.argsort(source, stable=True))
    return back, torch.bincount(source, minlength=world).tolist()


def owners(ids: Tensor, num_experts: int, world: int) -> list[int]:
    """How many pairs each rank owns the expert of."""
    rank = ids.reshape(-1).long() // (num_experts // world)
    return torch.bincount(rank, minlength=world).tolist()


def summed(arrived: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """``arrived``: the rows of all pairs, by expert."""
    flat = ids.reshape(-1)
    row_of_pair = torch.empty_like(flat, dtype=torch.int64)
    row_of_pair[torch.argsort(flat, stable=True)] = torch.arange(flat.numel(), device=flat.device)
    picked = arrived.index_select(0, row_of_pair).view(*ids.shape, *arrived.shape[1:])
    factor = weights.view(*weights.shape, *[1] * (arrived.dim() - 1))
    return (picked.float() * factor).sum(1).to(arrived.dtype)


def _collect_fake(
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    assist: Tensor,
    ends: Tensor,
    num_experts: int,
    group: str,
    **waiting: Any,
) -> Tensor:
    return rows.new_empty((ids.shape[0], *rows.shape[1:]))


define(
    "distribute(Tensor tokens, Tensor ids, int num_experts, str group, str? plans=None, "
    f"float timeout=0.0, {WAITING}) -> (Tensor rows, Tensor counts, Tensor assist, Tensor ends)",
    _distribute,
    _distribute_fake,
)
define(
    "collect(Tensor rows, Tensor ids, Tensor weights, Tensor assist, Tensor ends, "
    f"int num_experts, str group, {WAITING}) -> Tensor",
    _collect,
    _collect_fake,
)
