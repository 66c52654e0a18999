"""Chunks: the pairs of a layer cut into pieces that travel and are computed one after another.

A chunk is a slice of every rank's experts and, if the experts alone are too few, of the source's
tokens. Pairs are sorted by their *key* instead of their expert: by chunk, then by the rank that
owns the expert, then by expert. So each chunk's rows are one contiguous block, and all rows of an
expert (of a slice of the tokens) still meet in one matmul.

Shapes: ``T`` tokens, ``K`` experts per token, ``E`` experts, ``W`` ranks, ``L = E / W`` local
experts, ``N`` expert slices, ``M`` token slices, ``C = N * M`` chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_fx.compat import data_dependent_size
from moe_fx.ops._define import define


def _chunk_keys(
    ids: Tensor, num_experts: int, world_size: int, expert_slices: int, token_slices: int
) -> Tensor:
    """``ids [T, K] -> keys [T, K]`` in ``[0, E * M)``; expert slices outer, token slices inner.

    Key ``((n * M + m) * W + r) * L/N + l``: expert ``r * L + n * L/N + l``, token slice ``m``.
    """
    per_rank = num_experts // world_size
    per_slice = per_rank // expert_slices
    rank, local = ids // per_rank, ids % per_rank
    chunk = local // per_slice * token_slices
    if token_slices > 1:
        num_tokens = ids.shape[0]
        token = torch.arange(num_tokens, device=ids.device, dtype=ids.dtype)
        chunk = chunk + (token * token_slices // max(1, num_tokens)).unsqueeze(1)
    return (chunk * world_size + rank) * per_slice + local % per_slice


def _chunk_keys_fake(
    ids: Tensor, num_experts: int, world_size: int, expert_slices: int, token_slices: int
) -> Tensor:
    return torch.empty_like(ids, memory_format=torch.contiguous_format)


def _permute_chunks(tokens: Tensor, keys: Tensor, sizes: Tensor) -> tuple[list[Tensor], Tensor]:
    """``tokens [T, ...]`` to the rows of each chunk, sorted by key, and where each pair's row is in
    all of them. ``sizes [C, 2, W]``: of `split_sizes`. Pairs of the highest keys, that no chunk has
    room for, are dropped: their rows are past the end."""
    flat = keys.reshape(-1)
    top_k = keys.shape[1] if keys.dim() == 2 else 1
    return _pieces(tokens, torch.argsort(flat, stable=True), top_k, sizes)


def _pieces(
    tokens: Tensor, order: Tensor, top_k: int, sizes: Tensor
) -> tuple[list[Tensor], Tensor]:
    """order: the pairs, as their rows are to stand."""
    row_map = torch.empty_like(order, dtype=torch.int32)
    row_map[order] = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
    token = order if top_k == 1 else order // top_k
    kept = sizes[:, 0].sum(1).tolist()
    pieces = token[: sum(kept)].split(kept)
    return [tokens.index_select(0, piece) for piece in pieces], row_map


def _permute_cut(tokens: Tensor, ids: Tensor, sizes: Tensor) -> tuple[list[Tensor], Tensor]:
    """As ``permute_chunks``, each chunk sorted by expert: what goes to a rank, sorted by expert, is
    cut as ``sizes`` (of `moe_fx.ops.cuts`) say."""
    sizes = sizes.clamp(min=0)
    by_rank = torch.argsort(ids.reshape(-1), stable=True)
    order, _ = torch.ops.moe_fx.regroup(by_rank, sizes[:, 0].t())
    top_k = ids.shape[1] if ids.dim() == 2 else 1
    return _pieces(tokens, order, top_k, sizes)


def _permute_chunks_fake(
    tokens: Tensor, keys: Tensor, sizes: Tensor
) -> tuple[list[Tensor], Tensor]:
    pieces = [
        tokens.new_empty((data_dependent_size(), *tokens.shape[1:])) for _ in range(sizes.shape[0])
    ]
    return pieces, keys.new_empty((keys.numel(),), dtype=torch.int32)


def _permute_chunks_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]
) -> None:
    ctx.save_for_backward(output[1])
    ctx.token_shape = inputs[0].shape
    ctx.mark_non_differentiable(output[1])


def _permute_chunks_backward(ctx: Any, grads: list[Tensor], _grad_map: Any) -> tuple[Any, ...]:
    (row_map,) = ctx.saved_tensors
    grad = torch.ops.moe_fx.unpermute_chunks(list(grads), row_map, None, ctx.token_shape)
    return grad, None, None


def _unpermute_chunks(
    rows: list[Tensor], row_map: Tensor, weights: Tensor | None, shape: list[int]
) -> Tensor:
    """As ``unpermute``, of the rows of all chunks."""
    return torch.ops.moe_fx.unpermute(torch.cat(rows), row_map, weights, shape)


def _unpermute_chunks_fake(
    rows: list[Tensor], row_map: Tensor, weights: Tensor | None, shape: list[int]
) -> Tensor:
    dtype = rows[0].dtype if weights is None else torch.promote_types(rows[0].dtype, weights.dtype)
    return rows[0].new_empty(shape, dtype=dtype)


def _unpermute_chunks_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, row_map, weights, shape = inputs
    ctx.save_for_backward(row_map, *(() if weights is None else (weights, *rows)))
    ctx.sizes, ctx.tail = [piece.shape[0] for piece in rows], rows[0].shape[1:]
    ctx.dtype, ctx.num_tokens = rows[0].dtype, shape[0]


def _unpermute_chunks_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    row_map, *weighted = ctx.saved_tensors
    weights, rows = (weighted[0], weighted[1:]) if weighted else (None, None)
    grad_rows, grad_weights = torch.ops.moe_fx.unpermute_chunks_grad(
        grad, row_map, rows, weights, ctx.num_tokens, ctx.sizes, ctx.tail, ctx.dtype
    )
    return list(grad_rows), None, (None if weights is None else grad_weights), None


def _unpermute_chunks_grad(
    grad: Tensor,
    row_map: Tensor,
    rows: list[Tensor] | None,
    weights: Tensor | None,
    num_tokens: int,
    sizes: list[int],
    tail: list[int],
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor]:
    num_pairs = row_map.numel()
    order = torch.empty_like(row_map, dtype=torch.int64)
    order[row_map.long()] = torch.arange(num_pairs, device=row_map.device)
    per_token = grad.reshape(num_tokens, *tail)
    top_k = num_pairs // max(1, num_tokens)
    grad_rows = []
    grad_weights = torch.zeros_like(row_map if weights is None else weights)
    for at, pairs in enumerate(order[: sum(sizes)].split(sizes)):
        piece = per_token.index_select(0, pairs if top_k == 1 else pairs // top_k)
        if weights is not None and rows is not None:
            products = piece * rows[at]
            summed = products.flatten(1).sum(1) if tail else products
            grad_weights.view(-1)[pairs] = summed.to(weights.dtype)
            piece = piece * weights.reshape(-1)[pairs].view(-1, *[1] * len(tail))
        grad_rows.append(piece.to(dtype))
    return grad_rows, grad_weights


def _unpermute_chunks_grad_fake(
    grad: Tensor,
    row_map: Tensor,
    rows: list[Tensor] | None,
    weights: Tensor | None,
    num_tokens: int,
    sizes: list[int],
    tail: list[int],
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor]:
    grad_weights = torch.empty_like(row_map if weights is None else weights)
    return [grad.new_empty((size, *tail), dtype=dtype) for size in sizes], grad_weights


define(
    "chunk_keys(Tensor ids, int num_experts, int world_size, int expert_slices, "
    "int token_slices) -> Tensor",
    _chunk_keys,
    _chunk_keys_fake,
)
define(
    "unpermute_chunks_grad(Tensor grad, Tensor row_map, Tensor[]? rows, Tensor? weights, "
    "SymInt num_tokens, SymInt[] sizes, SymInt[] tail, ScalarType dtype) -> "
    "(Tensor[] grad_rows, Tensor grad_weights)",
    _unpermute_chunks_grad,
    _unpermute_chunks_grad_fake,
)
define(
    "unpermute_chunks(Tensor[] rows, Tensor row_map, Tensor? weights, SymInt[] shape) -> Tensor",
    _unpermute_chunks,
    _unpermute_chunks_fake,
    backward=_unpermute_chunks_backward,
    setup_context=_unpermute_chunks_setup,
)
define(
    "permute_chunks(Tensor tokens, Tensor keys, Tensor sizes) -> (Tensor[] rows, Tensor row_map)",
    _permute_chunks,
    _permute_chunks_fake,
    backward=_permute_chunks_backward,
    setup_context=_permute_chunks_setup,
)
define(
    "permute_cut(Tensor tokens, Tensor ids, Tensor sizes) -> (Tensor[] rows, Tensor row_map)",
    _permute_cut,
    _permute_chunks_fake,
    backward=_permute_chunks_backward,
    setup_context=_permute_chunks_setup,
)
