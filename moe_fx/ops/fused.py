"""A whole local MoE layer's experts in one op, for devices with kernels of their own for it.

::

    e = ids[t, k]
    out[t] = sum over k of weights[t, k] * (body(tokens[t] @ gate_up[e] + b[e]) @ down[e] + b'[e])

Shapes: ``T`` tokens, ``K`` experts per token, ``E`` experts, ``S = T * K`` pairs, ``H`` hidden
size, ``I`` intermediate size. Here in ATen calls, which is what the op means: for CPUs, and for the
proofs of what replaces it. On CUDA: `moe_fx.devices.cuda`.

``gate_up [E, H, N]`` of any strides, where a row's ``N`` columns hold, by ``layout``:

- "halves": gate, then up (``N = 2 * I``); "halves_up_first": the other way round;
- "interleaved": gate, up, gate, up, … (GPT-OSS);
- "separate": the gate (``N = I``); ``up [E, H, I]`` is a table of its own;
- "single": there is no gate (``N = I``).

With ``g`` and ``u`` the gate's and up's columns: ``g = min(g, limit)``, ``u = clamp(u, -limit,
limit)`` if there is a limit, ``h = act(g) * (u + shift)``, or ``act(g)`` where layout is "single".
``act``: "silu" (``g * sigmoid(alpha * g)``), "gelu", "gelu_tanh", "relu", "relu2" (squared).
``down [E, I, H]``. Biases ``[E, N]``, ``[E, I]``, ``[E, H]``. ids that are no expert's (-1) add
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.ops._define import define

__all__ = ["ACTS", "ARGUMENTS", "LAYOUTS", "NUM_ARGUMENTS", "Body", "split_columns"]

LAYOUTS = ("halves", "halves_up_first", "interleaved", "separate", "single")

ACTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda g, alpha: g * torch.sigmoid(alpha * g),
    "gelu": lambda g, alpha: F.gelu(g),
    "gelu_tanh": lambda g, alpha: F.gelu(g, approximate="tanh"),
    "relu": lambda g, alpha: F.relu(g),
    "relu2": lambda g, alpha: F.relu(g).square(),
}
_SLOPES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda g, alpha: _silu_slope(g, alpha),
    "gelu": lambda g, alpha: torch.ops.aten.gelu_backward(torch.ones_like(g), g),
    "gelu_tanh": lambda g, alpha: torch.ops.aten.gelu_backward(
        torch.ones_like(g), g, approximate="tanh"
    ),
    "relu": lambda g, alpha: (g > 0).to(g.dtype),
    "relu2": lambda g, alpha: 2 * F.relu(g),
}


def _silu_slope(g: Tensor, alpha: float) -> Tensor:
    s = torch.sigmoid(alpha * g)
    return s * (1 + alpha * g * (1 - s))


class Body:
    """What happens between the experts' matmuls, as the op's arguments say it."""

    def __init__(
        self, layout: str, act: str, alpha: float, limit: float | None, shift: float
    ) -> None:
        if layout not in LAYOUTS or act not in ACTS:
            raise ValueError(f"layout {layout!r} of {LAYOUTS}, act {act!r} of {tuple(ACTS)}")
        self.layout, self.act = layout, act
        self.alpha, self.limit, self.shift = alpha, limit, shift

    def __call__(self, columns: Tensor) -> Tensor:
        """``[R, N]``, in "halves" order where layout is "separate", to ``[R, I]``."""
        g, u = split_columns(columns, self.layout)
        g, u = self._clamped(g, u)
        gated = ACTS[self.act](g, self.alpha)
        return gated if u is None else gated * (u + self.shift)

    def backward(self, columns: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """(the activations ``[R, I]`` again, the gradient of ``columns``) for that of them."""
        raw_g, raw_u = split_columns(columns, self.layout)
        g, u = self._clamped(raw_g, raw_u)
        gated = ACTS[self.act](g, self.alpha)
        grad_columns = torch.empty_like(columns)
        grad_g, grad_u = split_columns(grad_columns, self.layout)
        slope = _SLOPES[self.act](g, self.alpha) * grad
        if self.limit is not None:
            slope = slope * (raw_g <= self.limit)
        if u is None or grad_u is None or raw_u is None:
            grad_g.copy_(slope)
            return gated, grad_columns
        grad_g.copy_(slope * (u + self.shift))
        upward = gated * grad
        if self.limit is not None:
            upward = upward * (raw_u.abs() <= self.limit)
        grad_u.copy_(upward)
        return gated * (u + self.shift), grad_columns

    def _clamped(self, g: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.limit is None:
            return g, u
        return g.clamp(max=self.limit), None if u is None else u.clamp(-self.limit, self.limit)


def split_columns(columns: Tensor, layout: str) -> tuple[Tensor, Tensor | None]:
    """Views of the gate's columns, and of up's if there are any."""
    if layout == "single":
        return columns, None
    if layout == "interleaved":
        return columns[..., ::2], columns[..., 1::2]
    half = columns.shape[-1] // 2
    first, second = columns[..., :half], columns[..., half:]
    return (second, first) if layout == "halves_up_first" else (first, second)


def _sorted_pairs(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(``order [S]`` int32, ``ends [E]`` int32): the pairs sorted by expert, those of no expert
    behind, and where each expert's end."""
    flat = ids.reshape(-1).long()
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat))
    return order.int(), counts[:experts].cumsum(0).int()


def _multiplied(rows: Tensor, table: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """Rows sorted by expert times their expert's matrix; rows behind are 0."""
    product = torch.ops.moe_fx.grouped_mm(rows, table, ends, 1.0)
    if bias is None:
        return product
    lengths = ends.diff(prepend=ends.new_zeros(1)).long()
    each = bias.repeat_interleave(lengths, 0)
    product[: len(each)] += each
    return product


def _columns(
    rows: Tensor, gate_up: Tensor, up: Tensor | None, bias: Any, up_bias: Any, ends: Tensor
) -> Tensor:
    columns = _multiplied(rows, gate_up, bias, ends)
    return columns if up is None else torch.cat([columns, _multiplied(rows, up, up_bias, ends)], -1)


def _fused_experts_training(
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_up_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    layout: str,
    act: str,
    alpha: float,
    limit: float | None,
    shift: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(result ``[T, H]``, columns before the activation ``[S, N]``, order, ends)."""
    body = Body(layout, act, alpha, limit, shift)
    order, ends = _sorted_pairs(ids, gate_up.shape[0])
    top_k = ids.shape[1]
    rows = tokens.index_select(0, order // top_k)
    columns = _columns(rows, gate_up, up, gate_up_bias, up_bias, ends)
    results = _multiplied(body(columns), down, down_bias, ends).to(_wide(dtype))
    if weights is not None:
        results = results * weights.reshape(-1, 1).index_select(0, order)
    results[int(ends[-1]) :] = 0
    out = results.new_zeros((tokens.shape[0], down.shape[2]))
    out = out.index_add_(0, order // top_k, results)
    return out.to(dtype), columns, order, ends


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_TOKENS, _WEIGHTS, _GATE_UP, _UP, _DOWN, _GATE_UP_BIAS = range(6)
"""Which gradient is where; those of up's and down's biases follow."""


def _fused_experts(*args: Any) -> Tensor:
    return _fused_experts_training(*args)[0]


def _fused_experts_backward(
    grad: Tensor,
    columns: Tensor,
    order: Tensor,
    ends: Tensor,
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_up_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    layout: str,
    act: str,
    alpha: float,
    limit: float | None,
    shift: float,
    dtype: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, weights, gate_up, up, down and the three biases; empty where there is
    no such input, or its gradient is not ``needed`` (as many, in this order)."""
    body = Body(layout, act, alpha, limit, shift)
    token = order // ids.shape[1]
    mul, grad_of = torch.ops.moe_fx.grouped_mm, torch.ops.moe_fx.grouped_mm_grad_weight
    made = [grad.new_empty(0) for _ in needed]
    grads = grad.to(columns.dtype).index_select(0, token)
    grads[int(ends[-1]) :] = 0
    back = mul(grads, down.transpose(1, 2), ends, 1.0)
    factor = None if weights is None else weights.reshape(-1, 1).index_select(0, order)
    weighed = back if factor is None else (back * factor).to(back.dtype)
    activated, grad_columns = body.backward(columns, weighed)
    if weights is not None and needed[_WEIGHTS]:
        wide = _wide(back.dtype)
        products = (back.to(wide) * activated.to(wide)).sum(-1)
        if down_bias is not None:
            products = products + (grads.to(wide) * _of_rows(down_bias, ends, order)).sum(-1)
        products[int(ends[-1]) :] = 0
        made[_WEIGHTS] = weights.new_empty(weights.shape)
        made[_WEIGHTS].view(-1)[order.long()] = products.to(weights.dtype)
    scaled = grads if factor is None else (grads * factor).to(grads.dtype)
    if needed[_DOWN]:
        made[_DOWN] = _like(grad_of(activated, scaled, ends), down)
    rows = tokens.index_select(0, token)
    halves = [grad_columns] if up is None else list(grad_columns.chunk(2, -1))
    tables = [gate_up] if up is None else [gate_up, up]
    if needed[_TOKENS]:
        grad_rows = sum(
            mul(half.contiguous(), table.transpose(1, 2), ends, 1.0)
            for half, table in zip(halves, tables, strict=True)
        )
        assert isinstance(grad_rows, Tensor)
        total = tokens.new_zeros(tokens.shape, dtype=_wide(tokens.dtype))
        made[_TOKENS] = total.index_add_(0, token, grad_rows.to(total.dtype)).to(tokens.dtype)
    for at, half, table in zip((_GATE_UP, _UP), halves, tables, strict=False):
        if needed[at]:
            made[at] = _like(grad_of(rows, half.contiguous(), ends), table)
    biases = (gate_up_bias, up_bias, down_bias)
    for at, (bias, summed) in enumerate(
        zip(biases, (halves[0], halves[-1], scaled), strict=True), _GATE_UP_BIAS
    ):
        if bias is not None and needed[at]:
            made[at] = _summed(summed, ends).to(bias.dtype)
    return tuple(made)  # type: ignore[return-value]


def _like(grad: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(table).copy_(grad)


def _of_rows(bias: Tensor, ends: Tensor, order: Tensor) -> Tensor:
    """Each row's entry ``[S, H]``, 0 behind the last."""
    wide = _wide(bias.dtype)
    rows = bias.new_zeros((len(order), bias.shape[1]), dtype=wide)
    each = bias.to(wide).repeat_interleave(ends.diff(prepend=ends.new_zeros(1)).long(), 0)
    rows[: len(each)] = each
    return rows


def _summed(rows: Tensor, ends: Tensor) -> Tensor:
    """``[R, N] -> [E, N]``: the sum of each expert's rows."""
    totals = rows.new_zeros((len(ends), rows.shape[1]), dtype=_wide(rows.dtype))
    lengths = ends.diff(prepend=ends.new_zeros(1)).long()
    experts = torch.arange(len(ends), device=ends.device).repeat_interleave(lengths)
    return totals.index_add_(0, experts, rows[: len(experts)].to(totals.dtype))


def _fused_experts_fake(tokens: Tensor, *args: Any) -> Tensor:
    down, dtype = args[4], args[-1]
    return tokens.new_empty((tokens.shape[0], down.shape[2]), dtype=dtype)


def _fused_experts_training_fake(
    tokens: Tensor, ids: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_up, up = args[1], args[2]
    pairs = ids.shape[0] * ids.shape[1]
    columns = gate_up.shape[2] * (1 if up is None else 2)
    return (
        _fused_experts_fake(tokens, ids, *args),
        tokens.new_empty((pairs, columns)),
        ids.new_empty((pairs,), dtype=torch.int32),
        ids.new_empty((gate_up.shape[0],), dtype=torch.int32),
    )


def _fused_experts_backward_fake(
    grad: Tensor, columns: Tensor, order: Tensor, ends: Tensor, tokens: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    _ids, *given = args[:8]
    needed = args[-1]
    return tuple(
        torch.empty_like(each) if each is not None and need else grad.new_empty(0)
        for each, need in zip((tokens, *given), needed, strict=True)
    )


def _training_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.given = [isinstance(each, Tensor) for each in inputs[:9]]
    ctx.body = inputs[9:]
    ctx.save_for_backward(*output[1:], *(each for each in inputs[:9] if isinstance(each, Tensor)))


def _training_backward(ctx: Any, grad: Tensor, *_others: Any) -> tuple[Any, ...]:
    columns, order, ends, *tensors = ctx.saved_tensors
    rest = iter(tensors)
    inputs = [next(rest) if given else None for given in ctx.given]
    needed = [need for at, need in enumerate(ctx.needs_input_grad[:9]) if at != 1]
    grads = torch.ops.moe_fx.fused_experts_backward(
        grad.contiguous(), columns, order, ends, *inputs, *ctx.body, needed
    )
    made = [each if need else None for each, need in zip(grads, needed, strict=True)]
    return made[0], None, *made[1:], *[None] * len(ctx.body)


ARGUMENTS = (
    "Tensor tokens, Tensor ids, Tensor? weights, Tensor gate_up, Tensor? up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? up_bias, Tensor? down_bias, str layout, str act, float alpha, "
    "float? limit, float shift, ScalarType dtype"
)
"""Of the ops, as their schemas have them."""
NUM_ARGUMENTS = ARGUMENTS.count(",") + 1
define(f"fused_experts({ARGUMENTS}) -> Tensor", _fused_experts, _fused_experts_fake)
define(
    f"fused_experts_training({ARGUMENTS}) -> "
    "(Tensor result, Tensor columns, Tensor order, Tensor ends)",
    _fused_experts_training,
    _fused_experts_training_fake,
    backward=_training_backward,
    setup_context=_training_setup,
)
define(
    "fused_experts_backward(Tensor grad, Tensor columns, Tensor order, Tensor ends, "
    f"{ARGUMENTS}, bool[] needed) -> (Tensor tokens, Tensor weights, Tensor gate_up, Tensor up, "
    "Tensor down, Tensor gate_up_bias, Tensor up_bias, Tensor down_bias)",
    _fused_experts_backward,
    _fused_experts_backward_fake,
)
