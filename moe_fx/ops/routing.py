"""Routing ops: from router logits to expert ids, and from tokens to rows sorted by expert and back.

Shapes: ``T`` tokens, ``K`` experts per token, ``E`` experts, ``S = T * K`` rows, ``H`` hidden size.
A *pair* ``i`` is slot ``i % K`` of token ``i // K``. Semantics of ``permute`` and ``unpermute`` are
those of ``torch_npu.npu_moe_token_permute`` / ``npu_moe_token_unpermute`` (torch_npu 2.13), so that
an Ascend lowering is one to one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_fx.ops._define import define, define_composite

_NEG_INF = float("-inf")


def gating_top_k(
    logits: Tensor,
    k: int,
    score: str = "softmax",
    select_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_group: int = 1,
    group_score: str = "top2",
    renormalise: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Gating top-k: ``logits [T, E]`` to ``(weights [T, K] float32, ids [T, K] int64)``.

    ``score``: "softmax" or "sigmoid" over the experts, or "topk_softmax" (softmax over the selected
    logits only). ``select_bias [E]`` moves the selection, never the weights (DeepSeek-V3). With
    ``num_groups > 1`` only experts of the ``topk_group`` best groups can be selected; a group's
    score is the sum of its two best ("top2", DeepSeek-V3) or its best ("max", DeepSeek-V2).
    """
    logits = logits.float()
    if score == "softmax":
        scores = logits.softmax(-1)
    elif score == "sigmoid":
        scores = logits.sigmoid()
    elif score == "topk_softmax":
        scores = logits
    else:
        raise ValueError(
            f"moe_fx::route: score must be softmax, sigmoid or topk_softmax: {score!r}"
        )
    choice = scores if select_bias is None else scores + select_bias
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        best_scores = grouped.topk(2 if group_score == "top2" else 1, dim=-1).values
        best = best_scores.sum(-1)
        chosen = best.topk(topk_group, dim=-1, sorted=False).indices
        mask = torch.zeros_like(best).scatter(-1, chosen, 1.0).bool()
        choice = grouped.masked_fill(~mask.unsqueeze(-1), _NEG_INF).flatten(-2)
    ids = choice.topk(k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if score == "topk_softmax":
        weights = weights.softmax(-1)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return weights * scale, ids


def gating_top_k_in_aten(
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
    """``route``, in one op that a lowering finds: softmax scores are not renormalised, sigmoid ones
    are, as by ``torch_npu.npu_moe_gating_top_k``. Has no gradients but as
    ``gating_top_k_training``."""
    groups = (num_groups, topk_group, group_score)
    return gating_top_k(logits, k, score, select_bias, *groups, score == "sigmoid", eps, scale)


def _gating_top_k_fake(logits: Tensor, k: int, *args: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _gating_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.score, (ctx.eps, ctx.scale) = inputs[2], inputs[-2:]


def _gating_backward(ctx: Any, grad: Tensor, _grad_ids: Any) -> tuple[Any, ...]:
    """The scores are computed again: of softmax of all experts, of sigmoid of the selected."""
    logits, ids = ctx.saved_tensors
    grad = grad * ctx.scale
    if ctx.score == "softmax":
        scores = logits.float().softmax(-1)
        own = scores.gather(-1, ids) * grad
        grads = torch.zeros_like(scores).scatter(-1, ids, own) - scores * own.sum(-1, keepdim=True)
    else:
        scores = logits.gather(-1, ids).float().sigmoid()
        total = scores.sum(-1, keepdim=True) + ctx.eps
        mean = (scores * grad).sum(-1, keepdim=True) / total
        own = (grad - mean) / total * scores * (1 - scores)
        grads = torch.zeros_like(logits, dtype=own.dtype).scatter(-1, ids, own)
    return grads.to(logits.dtype), *[None] * 8


def _expert_counts(ids: Tensor, num_experts: int) -> Tensor:
    flat = ids.reshape(-1).long()
    if flat.device.type != "cpu":  # bincount would wait for the device to tell the largest id
        counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
        return counts.scatter_add(0, flat, torch.ones_like(flat))
    try:
        counts = torch.bincount(flat, minlength=num_experts)
    except RuntimeError:
        if int(flat.min()) >= 0:
            raise
        raise _out_of_range(int(flat.min()), num_experts) from None
    if counts.numel() != num_experts:
        raise _out_of_range(int(flat.max()), num_experts)
    return counts


def _out_of_range(expert: int, num_experts: int) -> RuntimeError:
    return RuntimeError(
        f"moe_fx::expert_counts: an expert id is {expert}, but the layer has {num_experts} experts "
        f"(ids 0 to {num_experts - 1})"
    )


def _expert_counts_fake(ids: Tensor, num_experts: int) -> Tensor:
    return ids.new_empty((num_experts,), dtype=torch.int64)


def _permute(
    tokens: Tensor, ids: Tensor, num_out_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    flat = ids.reshape(-1)
    top_k = ids.shape[1] if ids.dim() == 2 else 1
    order = torch.argsort(flat, stable=True)
    row_map = torch.empty_like(order, dtype=torch.int32)
    row_map[order] = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
    kept = order[: _num_rows(order.numel(), num_out_tokens)]
    return tokens.index_select(0, kept if top_k == 1 else kept // top_k), row_map


def _num_rows(num_pairs: int, num_out_tokens: int | None) -> int:
    """None or 0: all; more than there are: all; negative: counted from the end (as torch_npu)."""
    if not num_out_tokens:
        return num_pairs
    if num_out_tokens < 0:
        return num_pairs + num_out_tokens
    return torch.sym_min(num_out_tokens, num_pairs)


def _permute_fake(
    tokens: Tensor, ids: Tensor, num_out_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    num_rows = _num_rows(ids.numel(), num_out_tokens)
    rows = tokens.new_empty((num_rows, *tokens.shape[1:]))
    return rows, ids.new_empty((ids.numel(),), dtype=torch.int32)


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.token_shape = inputs[0].shape
    ctx.mark_non_differentiable(output[1])


def _permute_backward(ctx: Any, grad_rows: Tensor, _grad_map: Any) -> tuple[Any, ...]:
    (row_map,) = ctx.saved_tensors
    return torch.ops.moe_fx.unpermute(grad_rows, row_map, None, ctx.token_shape), None, None


def _unpermute(
    rows: Tensor,
    row_map: Tensor,
    weights: Tensor | None,
    shape: list[int],
    missing: bool = False,
) -> Tensor:
    """``missing``: a pair whose row is past the end was dropped, and adds nothing."""
    num_tokens, num_rows = shape[0], rows.shape[0]
    if row_map.numel() == 0 or num_rows == 0:
        dtype = rows.dtype if weights is None else torch.promote_types(rows.dtype, weights.dtype)
        return rows.new_zeros(shape, dtype=dtype)
    top_k = row_map.numel() // num_tokens
    kept = row_map < num_rows if missing or num_rows < row_map.numel() else None
    if rows.dim() == 2 and rows.dtype == torch.float32 and _one_dtype(rows, weights):
        return _bags(rows, row_map, weights, num_tokens, kept).view(shape)
    if kept is not None:
        row_map = row_map.clamp(max=num_rows - 1)
    picked = rows.index_select(0, row_map)
    if kept is not None:
        picked = picked.masked_fill(~kept.view(-1, *[1] * (rows.dim() - 1)), 0)
    if top_k == 1 and weights is None:
        return picked.view(shape)
    picked = picked.view(num_tokens, top_k, *rows.shape[1:])
    if weights is not None:
        picked = picked * weights.view(num_tokens, top_k, *[1] * (rows.dim() - 1))
    return picked.sum(1).view(shape)


def _bags(
    rows: Tensor, row_map: Tensor, weights: Tensor | None, num_tokens: int, kept: Tensor | None
) -> Tensor:
    """Each token's rows summed; only rows that are there are read."""
    bag = torch.nn.functional.embedding_bag
    if kept is None:
        if row_map.numel() == num_tokens and weights is None:
            return rows.index_select(0, row_map)
        bags = row_map.view(num_tokens, -1)
        return bag(bags, rows, per_sample_weights=weights, mode="sum")
    if rows.device.type == "cpu":
        each = kept.view(num_tokens, -1).sum(1)
        starts = (each.cumsum(0) - each).to(row_map.dtype)
        given = None if weights is None else weights.reshape(-1)[kept]
        return bag(row_map[kept], rows, starts, per_sample_weights=given, mode="sum")
    none = rows.shape[0]  # an empty row behind all, so that the host need not know how many
    rows = torch.cat([rows, rows.new_zeros((1, rows.shape[1]))])
    bags = row_map.clamp(max=none).view(num_tokens, -1)
    return bag(bags, rows, per_sample_weights=weights, mode="sum")


def _one_dtype(rows: Tensor, weights: Tensor | None) -> bool:
    return weights is None or weights.dtype == rows.dtype


def _unpermute_fake(
    rows: Tensor,
    row_map: Tensor,
    weights: Tensor | None,
    shape: list[int],
    missing: bool = False,
) -> Tensor:
    dtype = rows.dtype if weights is None else torch.promote_types(rows.dtype, weights.dtype)
    return rows.new_empty(shape, dtype=dtype)


def _unpermute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, row_map, weights, shape, missing = inputs
    ctx.save_for_backward(row_map, *(() if weights is None else (rows, weights)))
    ctx.missing = missing
    ctx.rows_shape, ctx.rows_dtype, ctx.num_tokens = rows.shape, rows.dtype, shape[0]


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    row_map, *weighted = ctx.saved_tensors
    rows, weights = weighted if weighted else (None, None)
    grad_rows, grad_weights = torch.ops.moe_fx.unpermute_grad(
        grad, row_map, rows, weights, ctx.num_tokens, ctx.rows_shape, ctx.rows_dtype, ctx.missing
    )
    return grad_rows, None, (None if weights is None else grad_weights), None, None


def _unpermute_grad(
    grad: Tensor,
    row_map: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    num_tokens: int,
    rows_shape: list[int],
    rows_dtype: torch.dtype,
    missing: bool = False,
) -> tuple[Tensor, Tensor]:
    num_rows, *tail = rows_shape
    grad_rows = grad.new_zeros(rows_shape, dtype=rows_dtype)
    if row_map.numel() == 0 or num_rows == 0:
        return grad_rows, torch.zeros_like(row_map if weights is None else weights)
    top_k = row_map.numel() // num_tokens
    per_pair = grad.reshape(num_tokens, 1, *tail).expand(num_tokens, top_k, *tail)
    kept = row_map < num_rows
    target = row_map.long()
    dropped = missing or num_rows < row_map.numel()
    contribution = per_pair
    if weights is not None:
        contribution = per_pair * weights.view(num_tokens, top_k, *[1] * len(tail))
    contribution = contribution.reshape(-1, *tail).to(rows_dtype)
    if dropped and grad.device.type == "cpu":
        contribution, target = contribution[kept], target[kept]
    elif dropped:  # into a row behind all, so that the host need not know how many
        grad_rows = grad.new_zeros((num_rows + 1, *tail), dtype=rows_dtype)
        target = target.clamp(max=num_rows)
    grad_rows = grad_rows.index_copy_(0, target, contribution)[:num_rows]
    if weights is None or rows is None:
        return grad_rows, torch.zeros_like(row_map)
    picked = rows.index_select(0, row_map.clamp(max=num_rows - 1)).view(num_tokens, top_k, *tail)
    products = (per_pair * picked).flatten(2).sum(-1) if tail else per_pair * picked
    if dropped:
        products = products.masked_fill(~kept.view(num_tokens, top_k), 0)
    return grad_rows, products.to(weights.dtype).view(weights.shape)


def _unpermute_grad_fake(
    grad: Tensor,
    row_map: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    num_tokens: int,
    rows_shape: list[int],
    rows_dtype: torch.dtype,
    missing: bool = False,
) -> tuple[Tensor, Tensor]:
    grad_weights = torch.empty_like(row_map if weights is None else weights)
    return grad.new_empty(rows_shape, dtype=rows_dtype), grad_weights


define_composite(
    "route(Tensor logits, int k, str score='softmax', Tensor? select_bias=None, int num_groups=1, "
    "int topk_group=1, str group_score='top2', bool renormalise=False, float eps=0.0, "
    "float scale=1.0) -> (Tensor weights, Tensor ids)",
    gating_top_k,
)
_GATING = (
    "(Tensor logits, int k, str score, Tensor? select_bias, int num_groups, int topk_group, "
    "str group_score, float eps, float scale) -> (Tensor weights, Tensor ids)"
)
define(f"gating_top_k{_GATING}", gating_top_k_in_aten, _gating_top_k_fake)
define(
    f"gating_top_k_training{_GATING}",
    gating_top_k_in_aten,
    _gating_top_k_fake,
    backward=_gating_backward,
    setup_context=_gating_setup,
)
define("expert_counts(Tensor ids, int num_experts) -> Tensor", _expert_counts, _expert_counts_fake)
define(
    "permute(Tensor tokens, Tensor ids, SymInt? num_out_tokens=None) -> "
    "(Tensor rows, Tensor row_map)",
    _permute,
    _permute_fake,
    backward=_permute_backward,
    setup_context=_permute_setup,
)
define(
    "unpermute_grad(Tensor grad, Tensor row_map, Tensor? rows, Tensor? weights, "
    "SymInt num_tokens, SymInt[] rows_shape, ScalarType rows_dtype, bool missing=False) -> "
    "(Tensor grad_rows, Tensor grad_weights)",
    _unpermute_grad,
    _unpermute_grad_fake,
)
define(
    "unpermute(Tensor rows, Tensor row_map, Tensor? weights, SymInt[] shape, "
    "bool missing=False) -> Tensor",
    _unpermute,
    _unpermute_fake,
    backward=_unpermute_backward,
    setup_context=_unpermute_setup,
)
