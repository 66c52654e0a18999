"""Rows in buffers whose size is known before the routing is: exchanges without a host sync.

Two ways for rows to travel, both in equal parts for every rank, so that nothing about sizes has to
be told to the host, and a graph of them can be captured:

*padded*: as many slots for each pair of ranks as the capacity says, filled with the pairs that go
there (``permute_padded``, ``regroup_padded``); *gathered*: every rank gets every token, and takes
the pairs of its own experts (``permute_local``).

Capacity: with a ``capacity_factor`` the mean number of pairs times it, rounded up; without, the
most that can come, ``most`` per token (an expert selected twice for a token counts twice). Pairs
that find no slot are an error or, with ``drop``, dropped: the earliest tokens keep their slots, and
a dropped pair adds nothing to its token (GShard's rule).

A pair without a slot has a ``row_map`` entry past the last row; slots without a pair come last (of
an expert's owner: after the rows of its last expert) and hold rows that nobody reads.

Shapes: ``T`` tokens, ``K`` experts per token, ``W`` ranks, ``L`` local experts, ``M`` token slices.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fx.compat import resolve_group
from moe_fx.ops._define import define
from moe_fx.ops.experts import regroup_backward, regroup_setup
from moe_fx.ranks.agree import ensure
from moe_fx.ranks.waiting import TIMEOUT, WAITING, of, start_and_wait

INT = torch.int64


def slots(
    num_tokens: int, top_k: int, world_size: int, most: int, capacity_factor: float | None
) -> int:
    """Slots for the pairs of ``num_tokens`` tokens that go to one rank of ``world_size``."""
    largest = num_tokens * most
    if capacity_factor is None:
        return largest
    factor = Fraction(capacity_factor).limit_denominator(1 << 16)
    share = factor.denominator * world_size
    return torch.sym_min(largest, (num_tokens * top_k * factor.numerator + share - 1) // share)


def _kept(block: Tensor, capacity: int, blocks: int, drop: bool, op: str) -> Tensor:
    """Which pairs find a slot among ``capacity`` of their block, in the order given. Pairs of
    block ``blocks`` want none."""
    order = torch.argsort(block, stable=True)
    counts = torch.zeros(blocks + 1, dtype=INT, device=block.device)
    counts = counts.scatter_add(0, block, torch.ones_like(block))
    position = torch.empty_like(order)
    starts = counts.cumsum(0) - counts
    position[order] = torch.arange(block.numel(), device=block.device) - starts[block[order]]
    kept = (position < capacity) & (block < blocks)
    if not drop:
        _require(
            (counts[:blocks] <= capacity).all(),
            f"moe_fx::{op}: more pairs of tokens and experts go to one rank than its {capacity} "
            "slots hold. Raise capacity_factor (None: never too few), or have pairs dropped with "
            'on_overflow="drop".',
        )
    return kept


def _require(condition: Tensor, message: str) -> None:
    """At once where the host knows; elsewhere when the device gets there, without a sync."""
    if condition.device.type == "cpu":
        if not condition:
            raise RuntimeError(message)
    else:
        torch._assert_async(condition, message)


def _sorted(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(order, position of each)."""
    order = torch.argsort(keys, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    return order, position


def _permute_padded(
    tokens: Tensor,
    keys: Tensor,
    num_local: int,
    world_size: int,
    slices: int,
    most: int,
    capacity_factor: float | None,
    drop: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """``tokens [T, ...]`` to ``M`` pieces ``[W * slots, ...]``, by rank and within one by expert;
    ``keys [T, K]``: of `chunks.chunk_keys`, one expert slice. Returns the pieces, each pair's row
    in all of them, and ``counts [M * W * L]`` of the pairs that found a slot."""
    num_tokens, top_k = keys.shape
    flat, total = keys.reshape(-1), slices * world_size * num_local
    capacity = _slots_of_slice(num_tokens, top_k, slices, world_size, most, capacity_factor)
    block = flat // num_local
    num_rows = slices * world_size * capacity
    if capacity_factor is None:
        kept = torch.ones_like(block, dtype=torch.bool)
    else:
        kept = _kept(block, capacity, slices * world_size, drop, "permute_padded")
    kept_keys = torch.where(kept, flat, total)
    counts = torch.zeros(total + 1, dtype=INT, device=flat.device)
    counts = counts.scatter_add(0, kept_keys, torch.ones_like(kept_keys))[:total]
    in_block = counts.view(-1, num_local).sum(1)
    _, position = _sorted(kept_keys)
    slot = block * capacity + position - (in_block.cumsum(0) - in_block)[block]
    row_map = torch.where(kept, slot, num_rows)
    source = torch.zeros(num_rows + 1, dtype=INT, device=flat.device)
    pairs = torch.arange(flat.numel(), device=flat.device)
    source = source.scatter(0, row_map, pairs // max(1, top_k))[:num_rows]
    pieces = source.tensor_split(slices)  # empty if there are no tokens: then there are no slots
    rows = [tokens.index_select(0, piece) for piece in pieces]
    return rows, row_map.to(torch.int32), counts


def _slots_of_slice(
    num_tokens: int,
    top_k: int,
    slices: int,
    world_size: int,
    most: int,
    capacity_factor: float | None,
) -> int:
    """The same for every slice: what the largest needs."""
    largest = (num_tokens + slices - 1) // slices
    return slots(largest, top_k, world_size, most, capacity_factor)


def _permute_padded_fake(
    tokens: Tensor,
    keys: Tensor,
    num_local: int,
    world_size: int,
    slices: int,
    most: int,
    capacity_factor: float | None,
    drop: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    num_tokens, top_k = keys.shape
    capacity = _slots_of_slice(num_tokens, top_k, slices, world_size, most, capacity_factor)
    rows = [tokens.new_empty((world_size * capacity, *tokens.shape[1:])) for _ in range(slices)]
    return (
        rows,
        keys.new_empty((keys.numel(),), dtype=torch.int32),
        keys.new_empty((slices * world_size * num_local,), dtype=INT),
    )


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.token_shape = inputs[0].shape
    ctx.mark_non_differentiable(*output[1:])


def _permute_backward(ctx: Any, grads: Any, _grad_map: Any, _grad_counts: Any) -> tuple[Any, ...]:
    """Of rows in one tensor or in pieces."""
    (row_map,) = ctx.saved_tensors
    rows = grads if isinstance(grads, Tensor) else torch.cat(list(grads))
    grad = torch.ops.moe_fx.unpermute(rows, row_map, None, ctx.token_shape, True)
    return grad, None, None, None, None, None, None, None


def _regroup_padded(rows: Tensor, recv_counts: Tensor) -> tuple[Tensor, Tensor]:
    """As ``regroup``, of rows that arrive in ``W`` equal parts: ``recv_counts [W, L]`` of each are
    there, by expert, the rest are empty and come last."""
    world = recv_counts.shape[0]
    slot = torch.arange(rows.shape[0] // world, device=rows.device)
    ends = recv_counts.cumsum(1)
    expert = torch.searchsorted(ends, slot.expand(world, -1).contiguous(), right=True)
    order, position = _sorted(expert.reshape(-1))
    return rows.index_select(0, order), position.to(torch.int32)


def _regroup_padded_fake(rows: Tensor, recv_counts: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), rows.new_empty((rows.shape[0],), dtype=torch.int32)


def _permute_local(
    tokens: Tensor,
    ids: Tensor,
    first_expert: int,
    num_local: int,
    world_size: int,
    most: int,
    capacity_factor: float | None,
    drop: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``tokens [T, ...]`` of all ranks, by rank, to the rows of the experts from ``first_expert``
    on, sorted by expert; each pair's row; and ``counts [L]``."""
    num_tokens, top_k = ids.shape
    flat = ids.reshape(-1).to(INT) - first_expert
    local = (flat >= 0) & (flat < num_local)
    num_rows = slots(num_tokens, top_k, world_size, most, capacity_factor)
    if capacity_factor is not None:
        by_token = local.view(world_size, -1).t().reshape(-1)
        wanting = torch.where(by_token, 0, 1)
        kept = _kept(wanting, num_rows, 1, drop, "permute_local")
        local = kept.view(-1, world_size).t().reshape(-1)
    keys = torch.where(local, flat, num_local)
    counts = torch.zeros(num_local + 1, dtype=INT, device=flat.device)
    counts = counts.scatter_add(0, keys, torch.ones_like(keys))[:num_local]
    order, position = _sorted(keys)
    row_map = torch.where(local, position, num_rows)
    rows = tokens.index_select(0, order[:num_rows] // max(1, top_k))
    return rows, row_map.to(torch.int32), counts


def _permute_local_fake(
    tokens: Tensor,
    ids: Tensor,
    first_expert: int,
    num_local: int,
    world_size: int,
    most: int,
    capacity_factor: float | None,
    drop: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = ids.shape
    num_rows = slots(num_tokens, top_k, world_size, most, capacity_factor)
    return (
        tokens.new_empty((num_rows, *tokens.shape[1:])),
        ids.new_empty((ids.numel(),), dtype=torch.int32),
        ids.new_empty((num_local,), dtype=INT),
    )


def _rank_slices(rows: Tensor, world_size: int, slices: int) -> list[Tensor]:
    """``[W * T, ...]`` by rank to ``M`` pieces, each with the same slice of every rank's rows."""
    pieces = _by_rank(rows, world_size).tensor_split(slices, 1)
    return [torch.cat(piece.unbind(0)) for piece in pieces]


def _by_rank(rows: Tensor, world_size: int) -> Tensor:
    return rows.reshape(world_size, rows.shape[0] // world_size, *rows.shape[1:])


def _rank_slices_fake(rows: Tensor, world_size: int, slices: int) -> list[Tensor]:
    each = rows.shape[0] // world_size
    sizes = [(each + slices - 1 - at) // slices for at in range(slices)]
    return [rows.new_empty((world_size * size, *rows.shape[1:])) for size in sizes]


def _rank_slices_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.world_size, ctx.shape = inputs[1], inputs[0].shape


def _rank_slices_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    pieces = [_by_rank(grad, ctx.world_size) for grad in grads]
    return torch.cat(pieces, 1).reshape(ctx.shape), None, None


def _even_sizes(
    pieces: list[Tensor],
    group: str,
    plans: str | None = None,
    timeout: float = 0.0,
    *,
    layer: str = "",
    exchange_timeout: float = TIMEOUT,
) -> Tensor:
    """``[M, W]`` on the host, of pieces that go in equal parts to every rank: the rows of a part.
    Raises on every rank if ranks have other numbers, so that no exchange of them can hang.
    ``plans``, ``timeout``, ``layer``, ``exchange_timeout``: as of ``exchange_counts``."""
    if plans is not None:
        ensure(group, plans, timeout)
    process_group = resolve_group(group)
    world = process_group.size()
    own = [piece.shape[0] // world for piece in pieces]
    device = pieces[0].device
    # Filled there, not copied there: a copy from the host could not be captured.
    sent = torch.cat([torch.full((world, 1), size, device=device) for size in own], 1)
    received = torch.empty_like(sent)
    start_and_wait(
        lambda async_op: dist.all_to_all_single(
            received, sent, group=process_group, async_op=async_op
        ),
        process_group,
        device,
        f"sizes of {of(layer)}",
        exchange_timeout,
    )
    _require(
        (received == sent).all(),
        f"moe_fx::even_sizes: rank {process_group.rank()} exchanges parts of {own} rows, "
        "other ranks do not: this strategy needs the same number of tokens on every rank in every "
        'step. Pad them, or use strategy="alltoall".',
    )
    return torch.tensor(own).unsqueeze(1).expand(-1, world).contiguous()


def _even_sizes_fake(
    pieces: list[Tensor],
    group: str,
    plans: str | None = None,
    timeout: float = 0.0,
    **waiting: Any,
) -> Tensor:
    return torch.empty((len(pieces), resolve_group(group).size()), dtype=INT, device="cpu")


def _row_experts(counts: Tensor, num_rows: int) -> Tensor:
    """The expert of each of ``num_rows`` rows sorted by expert; of rows behind all, the last."""
    rows = torch.arange(num_rows, device=counts.device)
    return torch.searchsorted(counts.cumsum(0), rows, right=True).clamp(max=counts.numel() - 1)


def _row_experts_fake(counts: Tensor, num_rows: int) -> Tensor:
    return counts.new_empty((num_rows,))


_CAPACITY = "int most, float? capacity_factor, bool drop"
define(
    f"permute_padded(Tensor tokens, Tensor keys, int num_local, int world_size, int slices, "
    f"{_CAPACITY}) -> (Tensor[] rows, Tensor row_map, Tensor counts)",
    _permute_padded,
    _permute_padded_fake,
    backward=_permute_backward,
    setup_context=_permute_setup,
)
define(
    "regroup_padded(Tensor rows, Tensor recv_counts) -> (Tensor rows, Tensor row_map)",
    _regroup_padded,
    _regroup_padded_fake,
    backward=regroup_backward,
    setup_context=regroup_setup,
)
define(
    f"permute_local(Tensor tokens, Tensor ids, int first_expert, int num_local, int world_size, "
    f"{_CAPACITY}) -> (Tensor rows, Tensor row_map, Tensor counts)",
    _permute_local,
    _permute_local_fake,
    backward=_permute_backward,
    setup_context=_permute_setup,
)
define(
    "rank_slices(Tensor rows, int world_size, int slices) -> Tensor[]",
    _rank_slices,
    _rank_slices_fake,
    backward=_rank_slices_backward,
    setup_context=_rank_slices_setup,
)
define(
    "even_sizes(Tensor[] pieces, str group, str? plans=None, float timeout=0.0, "
    f"{WAITING}) -> Tensor",
    _even_sizes,
    _even_sizes_fake,
)
define("row_experts(Tensor counts, SymInt num_rows) -> Tensor", _row_experts, _row_experts_fake)
