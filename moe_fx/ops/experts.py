"""Ops on the owner's side: group received rows by local expert, and multiply by expert weights.

Shapes: ``W`` ranks, ``L`` local experts, ``R`` rows received, ``D`` / ``N`` features in / out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_fx.ops._define import define

Array = npt.NDArray[np.integer[Any]]
_ALIGNMENT_BYTES = 16
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _regroup(rows: Tensor, recv_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows arrive by source rank and, within one, by local expert; leave by local expert.

    The permutation follows from the counts alone: segment (w, l) of length ``recv_counts[w, l]``
    moves as a block, so nothing is sorted. Of counts on the host it is computed there: a device
    would take a launch for each of a dozen small steps.
    """
    num_rows = rows.shape[0]
    if recv_counts.device == rows.device:
        order, row_map = _moved_blocks(recv_counts, num_rows)
    else:
        pinned = torch.empty((2, num_rows), dtype=torch.int32, pin_memory=True)
        pinned.numpy()[0], pinned.numpy()[1] = reversed(_moved_on_host(recv_counts, num_rows))
        row_map, order = pinned.to(rows.device, non_blocking=True)
    return rows.index_select(0, order), row_map


def _moved_blocks(recv_counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(the row that each place gets, the place that each row gets)."""
    if recv_counts.device.type == "cpu":
        order, row_map = _moved_on_host(recv_counts, num_rows)
        return torch.from_numpy(order), torch.from_numpy(row_map)
    return _moved_on_device(recv_counts, num_rows)


def _moved_on_device(recv_counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    lengths = recv_counts.t().reshape(-1)
    starts = _exclusive_cumsum(recv_counts.reshape(-1)).view_as(recv_counts).t().reshape(-1)
    shift = starts - _exclusive_cumsum(lengths)
    position = torch.arange(num_rows, device=recv_counts.device)
    order = position + torch.repeat_interleave(shift, lengths, output_size=num_rows)
    row_map = torch.empty_like(order, dtype=torch.int32)
    row_map[order] = position.to(torch.int32)
    return order, row_map


def _moved_on_host(recv_counts: Tensor, num_rows: int) -> tuple[Array, Array]:
    """`_moved_blocks` in NumPy, int64 and int32. ATen shares so many numbers out among threads,
    which takes far longer where other processes have as many."""
    counts = recv_counts.numpy().astype(np.int64)
    if counts.sum() != num_rows:
        raise RuntimeError(f"moe_fx::regroup: counts of {counts.sum()} rows, {num_rows} arrived")
    lengths = counts.T.ravel()
    starts = (counts.cumsum() - counts.ravel()).reshape(counts.shape)
    shift = starts.T.ravel() - (lengths.cumsum() - lengths)
    position = np.arange(num_rows)
    order = position + np.repeat(shift, lengths)
    back = shift.reshape(counts.T.shape).T.ravel()
    return order, (position - np.repeat(back, counts.ravel())).astype(np.int32)


def _exclusive_cumsum(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def _regroup_fake(rows: Tensor, recv_counts: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), rows.new_empty((rows.shape[0],), dtype=torch.int32)


def regroup_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.rows_shape = inputs[0].shape
    ctx.mark_non_differentiable(output[1])


def regroup_backward(ctx: Any, grad_rows: Tensor, _grad_map: Any) -> tuple[Any, ...]:
    (row_map,) = ctx.saved_tensors
    return torch.ops.moe_fx.unpermute(grad_rows, row_map, None, ctx.rows_shape), None


def _arrived_experts(recv_counts: Tensor, num_rows: int) -> Tensor:
    """``recv_counts [W, L] -> [R]`` int64: the local expert of each row as rows arrive, by source
    rank and, within one, by local expert."""
    world, local = recv_counts.shape
    experts = torch.arange(local, device=recv_counts.device).repeat(world)
    return experts.repeat_interleave(recv_counts.reshape(-1), output_size=num_rows)


def _arrived_experts_fake(recv_counts: Tensor, num_rows: int) -> Tensor:
    return recv_counts.new_empty((num_rows,))


def _grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor, fill: float | None = None) -> Tensor:
    """``fill``: not all rows are an expert's, about this share is; the result of others is 0."""
    if _aten_can_group(rows, weight):
        return _zero_behind(torch._grouped_mm(rows, weight, offsets), offsets, fill)
    out = rows.new_empty((rows.shape[0], weight.shape[2]))
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(rows[start:end], weight[expert], out=out[start:end])
        start = end
    return _zero_behind(out, offsets, fill)


def _zero_behind(rows: Tensor, offsets: Tensor, fill: float | None) -> Tensor:
    if fill is None:
        return rows
    if rows.device.type == "cpu":
        rows[int(offsets[-1]) :].zero_()
        return rows
    behind = torch.arange(rows.shape[0], device=rows.device) >= offsets[-1]
    return rows.masked_fill_(behind.unsqueeze(1), 0)


def _grouped_mm_fake(
    rows: Tensor, weight: Tensor, offsets: Tensor, fill: float | None = None
) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[2]))


def _grouped_mm_list(
    rows: Tensor, weights: list[Tensor], offsets: Tensor, fill: float | None
) -> Tensor:
    out = rows.new_empty((rows.shape[0], weights[0].shape[1]))
    start = 0
    for weight, end in zip(weights, offsets.tolist(), strict=True):
        if end > start:
            torch.mm(rows[start:end], weight, out=out[start:end])
        start = end
    return _zero_behind(out, offsets, fill)


def _grouped_mm_list_fake(
    rows: Tensor, weights: list[Tensor], offsets: Tensor, fill: float | None
) -> Tensor:
    return rows.new_empty((rows.shape[0], weights[0].shape[1]))


def _grouped_mm_list_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, offsets, ctx.fill = inputs
    ctx.save_for_backward(rows, offsets, *weights)


def _grouped_mm_list_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, offsets, *weights = ctx.saved_tensors
    grad = grad.contiguous()
    transposed = [weight.t() for weight in weights]
    grad_rows = torch.ops.moe_fx.grouped_mm_list(grad, transposed, offsets, ctx.fill)
    grad_weights = torch.ops.moe_fx.grouped_mm_grad_weight(rows.contiguous(), grad, offsets)
    return grad_rows, list(grad_weights.unbind(0)), None, None


def _grouped_mm_grad_weight(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """``[R, D], [R, N] -> [L, D, N]``: each expert's rows, transposed, times their gradient."""
    if _aten_can_group(rows, grad):
        return torch._grouped_mm(rows.t(), grad, offsets)
    return _grad_weight_one_by_one([rows], [grad], [offsets])


def _grouped_mm_grad_weight_fake(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty((offsets.shape[0], rows.shape[1], grad.shape[1]))


def _grouped_mm_grad_weight_sum(
    rows: list[Tensor], grads: list[Tensor], offsets: list[Tensor]
) -> Tensor:
    """The sum of ``grouped_mm_grad_weight`` of all pieces: one product of all rows of an expert,
    in the order of the pieces. Rows behind a piece's last offset are nobody's."""
    if rows[0].device.type == "cpu":
        return _grad_weight_one_by_one(rows, grads, offsets)
    return _grad_weight_of_joined(rows, grads, offsets)


def _grad_weight_one_by_one(
    rows: list[Tensor], grads: list[Tensor], offsets: list[Tensor]
) -> Tensor:
    """Where the host knows the offsets: only rows of experts that are in several pieces are
    copied."""
    experts, (inner, outer) = offsets[0].numel(), (rows[0].shape[1], grads[0].shape[1])
    out = rows[0].new_empty((experts, inner, outer))
    bounds = [[0, *piece.tolist()] for piece in offsets]
    for expert in range(experts):
        parts = [
            (left[at[expert] : at[expert + 1]], right[at[expert] : at[expert + 1]])
            for left, right, at in zip(rows, grads, bounds, strict=True)
            if at[expert + 1] > at[expert]
        ]
        if not parts:
            out[expert].zero_()
            continue
        left, right = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        torch.mm(left.t(), right, out=out[expert])
    return out


def _grad_weight_of_joined(
    rows: list[Tensor], grads: list[Tensor], offsets: list[Tensor]
) -> Tensor:
    """Where the host does not know the offsets: all pieces' rows, sorted by expert."""
    counts = [
        torch.cat([piece.diff(prepend=piece.new_zeros(1)), len(left) - piece[-1:]])
        for left, piece in zip(rows, offsets, strict=True)
    ]
    all_rows, all_grads = torch.cat(rows), torch.cat(grads)
    order, _ = _moved_blocks(torch.stack(counts).long(), len(all_rows))
    total = torch.stack(offsets).sum(0, dtype=offsets[0].dtype)
    return _grouped_mm_grad_weight(all_rows[order], all_grads[order], total)


def _grouped_mm_grad_weight_sum_fake(
    rows: list[Tensor], grads: list[Tensor], offsets: list[Tensor]
) -> Tensor:
    return _grouped_mm_grad_weight_fake(rows[0], grads[0], offsets[0])


def _aten_can_group(*operands: Tensor) -> bool:
    """``torch._grouped_mm`` takes three dtypes, one unit stride and 16-byte aligned other strides
    (torch 2.13, CPU and CUDA). Where it refuses, experts are multiplied one by one."""
    for operand in operands:
        unit, *others = sorted(operand.stride())
        if operand.dtype not in _GROUPED_DTYPES or unit != 1:
            return False
        if any(stride * operand.element_size() % _ALIGNMENT_BYTES for stride in others):
            return False
    return True


def _grouped_mm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.fill = inputs
    ctx.save_for_backward(*tensors)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    need_rows, need_weight, *_ = ctx.needs_input_grad
    grad_rows = grad_weight = None
    if need_rows:
        transposed = weight.transpose(-2, -1)
        grad_rows = torch.ops.moe_fx.grouped_mm(grad, transposed, offsets, ctx.fill)
    if need_weight:
        grad_weight = torch.ops.moe_fx.grouped_mm_grad_weight(rows.contiguous(), grad, offsets)
    return grad_rows, grad_weight, None, None


define(
    "arrived_experts(Tensor recv_counts, SymInt num_rows) -> Tensor",
    _arrived_experts,
    _arrived_experts_fake,
)
define(
    "regroup(Tensor rows, Tensor recv_counts) -> (Tensor rows, Tensor row_map)",
    _regroup,
    _regroup_fake,
    backward=regroup_backward,
    setup_context=regroup_setup,
)
define(
    "grouped_mm(Tensor rows, Tensor weight, Tensor offsets, float? fill=None) -> Tensor",
    _grouped_mm,
    _grouped_mm_fake,
    backward=_grouped_mm_backward,
    setup_context=_grouped_mm_setup,
)
define(
    # No default: torch leaves defaulted arguments out of the inputs whose gradients an op with a
    # list of tensors has to give.
    "grouped_mm_list(Tensor rows, Tensor[] weights, Tensor offsets, float? fill) -> Tensor",
    _grouped_mm_list,
    _grouped_mm_list_fake,
    backward=_grouped_mm_list_backward,
    setup_context=_grouped_mm_list_setup,
)
define(
    "grouped_mm_grad_weight(Tensor rows, Tensor grad, Tensor offsets) -> Tensor",
    _grouped_mm_grad_weight,
    _grouped_mm_grad_weight_fake,
)
define(
    "grouped_mm_grad_weight_sum(Tensor[] rows, Tensor[] grads, Tensor[] offsets) -> Tensor",
    _grouped_mm_grad_weight_sum,
    _grouped_mm_grad_weight_sum_fake,
    any_layout=True,
)
