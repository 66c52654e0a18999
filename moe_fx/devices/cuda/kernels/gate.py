"""Gating top-k in one launch: scores, bias, groups, selection, weights.

As ``moe_fx::gating_top_k``: experts with equal scores are taken by their number. A token whose
logits hold NaN gets weights that are NaN, and ids that are experts'.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fx.devices.cuda.launch import empty, key_of, known, launch, on, recorded
from moe_fx.ops.routing import gating_top_k_in_aten

__all__ = ["gate", "misfit"]

_TILE = 4096


@triton.jit
def _best_groups(
    choice,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BT: tl.constexpr,
    TAKEN: tl.constexpr,
    TOP2: tl.constexpr,
):
    """Choices of experts whose group is among the ``TAKEN`` best; -inf of others."""
    grouped = tl.reshape(choice, (BT, GROUPS, SIZE))
    best, where = tl.max(grouped, 2, return_indices=True)
    if TOP2:
        member = tl.arange(0, SIZE)[None, None, :]
        best += tl.max(tl.where(member == where[:, :, None], float("-inf"), grouped), 2)
    groups = tl.arange(0, GROUPS)[None, :]
    taken = tl.zeros((BT, GROUPS), tl.int32)
    for _ in tl.static_range(TAKEN):
        open_ = tl.where(taken == 1, float("-inf"), tl.maximum(best, -3.0e38))
        _, chosen = tl.max(open_, 1, return_indices=True)
        taken = tl.where(groups == chosen[:, None], 1, taken)
    return tl.reshape(tl.where(taken[:, :, None] == 1, grouped, float("-inf")), (BT, GROUPS * SIZE))


@triton.jit
def _gate(
    logits,
    bias,
    weights,
    ids,
    T,
    E,
    stride,
    K: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TAKEN: tl.constexpr,
    TOP2: tl.constexpr,
    eps: tl.constexpr,
    scale: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    experts = tl.arange(0, BE)
    real = (tokens < T)[:, None] & (experts < E)[None, :]
    at = logits + tokens[:, None] * stride + experts[None, :]
    x = tl.load(at, mask=real, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        score = 1 / (1 + tl.exp(-x))
    else:
        top = tl.max(x, 1)
        top = tl.where(tokens < T, top, 0.0)
        score = tl.exp(x - top[:, None])
        score = score / tl.sum(score, 1)[:, None]
    choice = score
    if HAS_BIAS:
        added = tl.load(bias + experts, mask=experts < E, other=0.0).to(tl.float32)
        choice = choice + added[None, :]
    choice = tl.where(choice == choice, choice, float("-inf"))
    if GROUPS > 1:
        choice = _best_groups(choice, GROUPS, BE // GROUPS, BT, TAKEN, TOP2)
    choice = tl.where(real, tl.maximum(choice, -3.0e38), float("-inf"))
    slots = tl.arange(0, BK)
    chosen_ids = tl.zeros((BT, BK), tl.int32)
    chosen_scores = tl.zeros((BT, BK), tl.float32)
    for k in tl.static_range(K):
        _, best = tl.max(choice, 1, return_indices=True)
        taken = experts[None, :] == best[:, None]
        its = tl.sum(tl.where(taken, score, 0.0), 1)
        chosen_ids = tl.where(slots[None, :] == k, best[:, None], chosen_ids)
        chosen_scores = tl.where(slots[None, :] == k, its[:, None], chosen_scores)
        choice = tl.where(taken, float("-inf"), choice)
    if SIGMOID:
        chosen_scores = chosen_scores / (tl.sum(chosen_scores, 1)[:, None] + eps)
    out = tokens[:, None] * K + slots[None, :]
    kept = (tokens < T)[:, None] & (slots < K)[None, :]
    tl.store(weights + out, chosen_scores * scale, mask=kept)
    tl.store(ids + out, chosen_ids.to(tl.int64), mask=kept)


def misfit(experts: int, k: int, num_groups: int) -> str:
    """Why the kernel does not take such a router; "" if it does."""
    if experts > 512:
        return f"more than 512 experts: {experts}"
    if k > min(experts, 32):
        return f"more than {min(experts, 32)} experts per token: {k}"
    size = experts // num_groups
    if num_groups > 1 and (size & (size - 1) or num_groups & (num_groups - 1)):
        return f"groups whose number and size are no powers of two: {num_groups} of {size}"
    return ""


def gate(
    logits: Tensor,
    k: int,
    score: str,
    select_bias: Tensor | None,
    num_groups: int,
    topk_group: int,
    group_score: str,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``moe_fx::gating_top_k``, by the op's ATen kernel where the router is a `misfit`."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    router = (k, score, num_groups, topk_group, group_score, eps, scale)
    inputs = (logits, select_bias)
    key = ("gate", key_of(inputs), router)
    with on(logits):
        kind = known(key)
        if kind is not None:
            weights, ids = kind.again(inputs)
        elif not logits.shape[0] or misfit(logits.shape[1], k, num_groups=num_groups):
            given = score, select_bias, num_groups, topk_group, group_score, eps, scale
            weights, ids = gating_top_k_in_aten(logits, k, *given)
        else:
            run = functools.partial(_launched, logits, select_bias, *router)
            weights, ids = recorded(key, inputs, logits.device, run)
    return weights, ids


def _launched(
    logits: Tensor,
    select_bias: Tensor | None,
    k: int,
    score: str,
    num_groups: int,
    topk_group: int,
    group_score: str,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    weights = empty((tokens, k), torch.float32, logits.device)
    ids = empty((tokens, k), torch.int64, logits.device)
    columns = max(16, triton.next_power_of_2(experts))
    block = min(max(1, _TILE // columns), max(1, triton.next_power_of_2(tokens // 256)))
    launch(
        _gate, (triton.cdiv(tokens, block),),
        logits, select_bias, weights, ids, tokens, experts, logits.stride(0),
        k, max(2, triton.next_power_of_2(k)), columns, block,
        score == "sigmoid", select_bias is not None, num_groups, topk_group,
        group_score == "top2", eps, scale,
        num_warps=4 if block * columns > 512 else 1,
    )  # fmt: skip
    return weights, ids
