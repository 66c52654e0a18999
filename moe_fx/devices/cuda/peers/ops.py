"""``direct_dispatch``, ``direct_combine`` and ``direct_experts`` on GPUs of one host.

::

    push, meet, fetch                                                       # direct_dispatch
    put back, meet, sum                                                     # direct_combine
    push, meet, sort, gate and up, down, put sums back, meet, sum           # direct_experts

In ``direct_experts`` the experts read tokens where they arrived. ``direct_dispatch`` copies them:
what it returns may be kept for backward, and must outlive the next exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fx.compat import autocast_off
from moe_fx.devices.cuda.choice import Way
from moe_fx.devices.cuda.experts import Run
from moe_fx.devices.cuda.kernels import peers
from moe_fx.devices.cuda.launch import key_of, known, on, recorded
from moe_fx.devices.cuda.layer import Layer
from moe_fx.devices.cuda.peers.pool import Layout, Pool, Step, pool_of
from moe_fx.ops.fused import NUM_ARGUMENTS
from moe_fx.ranks.agree import ensure
from moe_fx.ranks.waiting import TIMEOUT

__all__ = ["combine", "dispatch", "experts"]

_TABLES, _DOWN = 6, 2
"""Of the arguments behind tokens, ids and weights, those that are tables, and which is that."""


def dispatch(
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    num_experts: int,
    group: str,
    plans: str | None = None,
    timeout: float = 0.0,
    *,
    layer: str = "",
    exchange_timeout: float = TIMEOUT,
) -> tuple[Tensor, Tensor, Tensor]:
    """``moe_fx::direct_dispatch``."""
    if plans is not None:
        ensure(group, plans, timeout)
    pool = pool_of(group, tokens.device, exchange_timeout)
    flat, ids = _rows(tokens), ids.contiguous()
    weights = None if weights is None else weights.contiguous()
    most = pool.tell(len(flat), layer, exchange_timeout)
    if not most:
        return _nothing(tokens, ids, weights)
    layout = _layout(pool, most, flat, ids, weights)
    pool.make_room(layout)
    step = pool.step(most, layout, layer, exchange_timeout)
    local, top_k = num_experts // pool.world, ids.shape[1]

    def run() -> tuple[Tensor, ...]:
        _push(step, flat, ids, weights, local)
        factors = None if weights is None else step.factors(top_k, weights.dtype)
        given = step.rows(flat.shape[1], flat.dtype), step.here(top_k), factors
        arrived = peers.fetch(pool.state, *given)
        return tuple(each for each in arrived if each is not None)

    key = ("dispatch", num_experts, exchange_timeout, key_of((flat, ids, weights)))
    rows, here, *rest = _recorded(step, key, (flat, ids, weights), run)
    rows = rows.view(-1, *tokens.shape[1:])
    return rows, here, rest[0] if rest else tokens.new_empty(0)


def combine(
    rows: Tensor,
    factors: Tensor | None,
    here: Tensor,
    ids: Tensor,
    num_experts: int,
    group: str,
    *,
    layer: str = "",
    exchange_timeout: float = TIMEOUT,
) -> tuple[Tensor, Tensor]:
    """``moe_fx::direct_combine``."""
    pool = pool_of(group, rows.device, exchange_timeout)
    shape = rows.shape[1:]
    flat, ids = _rows(rows).contiguous(), ids.contiguous()
    factors = None if factors is None else factors.contiguous()
    most, top_k = len(flat) // pool.world, ids.shape[1]
    if not most:
        returned = rows.new_empty(0) if factors is None else factors.new_empty(ids.shape)
        return rows.new_empty((0, *shape)), returned
    pool.begin()
    layout = _layout(pool, most, flat, ids, factors)
    pool.make_room(layout)
    step = pool.step(most, layout, layer, exchange_timeout)
    local = num_experts // pool.world
    places = step.at, step.layout.factors

    def run() -> tuple[Tensor, ...]:
        peers.put_back(pool.state, flat, factors, here, pool.peers, places, most, pool.rank)
        _meet(step)
        arrived = step.rows(flat.shape[1], flat.dtype)
        out = peers.final(pool.state, arrived, ids, pool.world, most, local)
        if factors is None:
            return (out,)
        picked = step.factors(top_k, factors.dtype)
        return out, peers.pick(pool.state, picked, ids, most, local, num_experts)

    inputs = (flat, factors, here, ids)
    key = ("combine", num_experts, exchange_timeout, key_of(inputs))
    out, *rest = _recorded(step, key, inputs, run)
    return out.view(-1, *shape), rest[0] if rest else rows.new_empty(0)


def experts(*args: Any, layer: str = "", exchange_timeout: float = TIMEOUT) -> Tensor:
    """``moe_fx::direct_experts``."""
    tokens, ids, weights, *of_layer = args[:NUM_ARGUMENTS]
    num_experts, group, *agreed = args[NUM_ARGUMENTS:]
    if agreed and agreed[0] is not None:
        ensure(group, *agreed)
    pool = pool_of(group, tokens.device, exchange_timeout)
    tokens, ids = _rows(tokens), ids.contiguous()
    weights = None if weights is None else weights.contiguous()
    most = pool.tell(len(tokens), layer, exchange_timeout)
    tables, body = of_layer[:_TABLES], of_layer[_TABLES:]
    width, dtype = of_layer[_DOWN].shape[2], body[-1]
    if not most:
        return tokens.new_empty((0, width), dtype=dtype)
    sent = _layout(pool, most, tokens, ids, weights)
    results = Layout.of(most * pool.world, width, 0, dtype.itemsize, 0)
    pool.make_room(sent, results)
    there, back = (pool.step(most, each, layer, exchange_timeout) for each in (sent, results))
    inputs = (tokens, ids, weights, *tables)

    def run() -> tuple[Tensor, ...]:
        return (_whole(there, back, tokens, ids, weights, num_experts, of_layer),)

    key = ("experts", num_experts, exchange_timeout, key_of(inputs), *body)
    return _recorded(there, key, inputs, run)[0]


def _whole(
    there: Step,
    back: Step,
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    num_experts: int,
    of_layer: Sequence[Any],
) -> Tensor:
    pool, top_k, local = there.pool, ids.shape[1], num_experts // there.pool.world
    _push(there, tokens, ids, weights, local)
    rows, here = there.rows(tokens.shape[1], tokens.dtype), there.here(top_k)
    factors = None if weights is None else there.factors(top_k, weights.dtype)
    its = Layer(rows, here, factors, *of_layer)
    _RemoteRun.of(its, keeps=False, num_tokens=there.most).put(back)
    _meet(back)
    arrived = back.rows(its.down.shape[2], its.dtype)
    return peers.final(pool.state, arrived, ids, pool.world, back.most, local)


@dataclass
class _RemoteRun(Run):
    """Of tokens that have come from all ranks, to where they came from."""

    def put(self, back: Step) -> None:
        self.back = back
        self.results()

    def total(self, h: Tensor, way: Way) -> Tensor:
        layer, pool = self.layer, self.back.pool
        pairs, mapped = self.pairs(h, way)
        weights, bias = (layer.weights, layer.down_bias) if mapped else (None, None)
        peers.put_sums(
            pool.state, pairs, self.row_map, layer.ids, pool.peers, self.back.at, self.back.most,
            pool.rank, layer.dtype, mapped, weights, bias,
        )  # fmt: skip
        return pairs


def _rows(tokens: Tensor) -> Tensor:
    """``[T, H]``, each row without gaps."""
    flat = tokens if tokens.dim() == 2 else tokens.reshape(len(tokens), -1)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _layout(pool: Pool, most: int, rows: Tensor, ids: Tensor, factors: Tensor | None) -> Layout:
    size = 0 if factors is None else factors.itemsize
    return Layout.of(most * pool.world, rows.shape[1], ids.shape[1], rows.itemsize, size)


def _nothing(tokens: Tensor, ids: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where no rank has a token."""
    return (
        tokens.new_empty(tokens.shape),
        ids.new_empty(ids.shape, dtype=torch.int32),
        tokens.new_empty(0) if weights is None else weights.new_empty(weights.shape),
    )


def _push(step: Step, tokens: Tensor, ids: Tensor, weights: Tensor | None, local: int) -> None:
    pool, layout = step.pool, step.layout
    at = step.at, layout.here, layout.factors
    peers.push(pool.state, tokens, ids, weights, pool.peers, at, step.most, pool.rank, local)
    _meet(step)


def _meet(step: Step) -> None:
    pool = step.pool
    peers.meet(
        pool.boards, pool.words, pool.state, pool.record, step.mark,
        step.most, step.timeout, pool.rank,
    )  # fmt: skip


def _recorded(
    step: Step,
    key: tuple[Any, ...],
    inputs: Sequence[Tensor | None],
    run: Callable[[], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    pool = step.pool
    shared = pool.buffer, pool.peers, pool.boards, pool.words, pool.state, pool.record, step.mark
    every = (*shared, *inputs)
    whole = (key, step.most, step.at, pool.half, pool.rank, pool.world)
    with on(pool.buffer):
        kind = known(whole)
        if kind is not None:
            return kind.again(every)
        with autocast_off():
            return recorded(whole, every, pool.device, run)
