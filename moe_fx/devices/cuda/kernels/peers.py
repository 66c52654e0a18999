"""Rows written into other ranks' memory, at places that both sides know, and the meeting of ranks
behind them.

A rank's memory is one piece of bytes, of which every rank has the address. What is written for one
exchange begins at the same byte on each rank: rows, then the experts they are for or numbers to
them. A row's place is ``source rank * M + token``.

`meet` is a kernel of one program: it tells each rank how far this one has come, and waits until
they have come as far. What earlier kernels of the stream wrote is there for those that meet it. It
waits so long and no longer: then it notes who is missing, for the host to read. From then on this
rank is broken: it waits for nobody, writes nothing to others, says so at later meetings, where
those that come late hear it, and what it computes is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from moe_fx.devices.cuda.launch import empty, launch

__all__ = [
    *("GAVE_UP", "OTHER_STEP", "fetch", "final", "meet"),
    *("pick", "push", "put_back", "put_sums"),
]

OTHER_STEP = 2
"""What a record begins with where ranks run a step of other size; 1: where they did not come."""
GAVE_UP = 3
"""Where they came, and are broken."""
_WIDTH = 1024
_INTERPRETED_SPINS = 1 << 12
"""Looks at the others' words before one is late, where there is no clock."""


@triton.jit
def _at(base, offset, dtype: tl.constexpr):
    return (base + offset).to(tl.pointer_type(dtype))


@triton.jit
def _meet(
    boards, words, state, record, layer, most, patience, me,
    W, BW: tl.constexpr, TIMED: tl.constexpr, SPINS: tl.constexpr,
):  # fmt: skip
    """boards: addresses of every rank's words. words: this rank's, which the others write:
    meeting << 32 | ``most``, all ones there of a broken rank. state: (meetings so far, whether
    this rank is broken). record: (what, which ranks, layer, meeting)."""
    p = tl.arange(0, BW)
    real = p < W
    epoch = tl.load(state) + 1
    tl.store(state, epoch)
    broken = tl.load(state + 1)
    there = tl.load(boards + p, mask=real, other=0)
    slot = _at(there, me * 8, tl.int64)
    said = (epoch << 32) | most
    said = tl.where(broken == 0, said, said | 0xFFFFFFFF)
    tl.atomic_xchg(slot, tl.zeros((BW,), tl.int64) + said, mask=real, sem="release", scope="sys")
    own = words + p
    none = tl.zeros((BW,), tl.int64)
    seen = tl.atomic_add(own, none, mask=real, sem="acquire", scope="sys")
    late = tl.sum((real & ((seen >> 32) < epoch)).to(tl.int32), 0)
    spent = tl.zeros((), tl.int64)
    if TIMED:
        began = globaltimer()
    while (late > 0) & (broken == 0) & (spent < patience):
        seen = tl.atomic_add(own, none, mask=real, sem="acquire", scope="sys")
        late = tl.sum((real & ((seen >> 32) < epoch)).to(tl.int32), 0)
        if TIMED:
            spent = globaltimer() - began
        else:
            spent += patience // SPINS
    missing = real & ((seen >> 32) < epoch)
    gone = real & ((seen & 0xFFFFFFFF) == 0xFFFFFFFF)
    other = real & ((seen >> 32) == epoch) & ((seen & 0xFFFFFFFF) != most)
    bits = tl.full((BW,), 1, tl.int64) << p.to(tl.int64)
    if broken == 0:
        code = tl.zeros((), tl.int64)
        ranks = tl.sum(tl.where(other, bits, 0), 0)
        if ranks != 0:
            code += 2
        if tl.sum(gone.to(tl.int32), 0) > 0:
            ranks = tl.sum(tl.where(gone, bits, 0), 0)
            code = tl.full((), 3, tl.int64)
        if late > 0:
            ranks = tl.sum(tl.where(missing, bits, 0), 0)
            code = tl.full((), 1, tl.int64)
        if code != 0:
            tl.store(record + 1, ranks)
            tl.store(record + 2, tl.load(layer))
            tl.store(record + 3, epoch)
            tl.store(state + 1, 1)
            tl.atomic_xchg(record, code, sem="release", scope="sys")


@triton.jit
def _well(state):
    """Whether this rank is not broken."""
    return tl.load(state + 1) == 0


@triton.jit
def _push(
    state, tokens, ids, weights, peers, at, here_at, factors_at,
    T, M, me, H, st, L,
    K: tl.constexpr, KP: tl.constexpr, WEIGHTED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    peer = tl.program_id(1)
    base = tl.load(peers + peer) + at
    place = (me * M + token).to(tl.int64)
    k = tl.arange(0, KP)
    kept = (k < K) & _well(state)
    real = kept & (token < T)
    pair = token.to(tl.int64) * K + k
    own = tl.load(ids + pair, mask=real, other=-1).to(tl.int32) - peer * L
    own = tl.where(real & (own >= 0) & (own < L), own, -1)
    tl.store(_at(base, here_at, tl.int32) + place * K + k, own, mask=kept)
    if WEIGHTED:
        weight = tl.load(weights + pair, mask=real, other=0.0)
        its = _at(base, factors_at, weights.dtype.element_ty)
        tl.store(its + place * K + k, weight, mask=kept)
    if tl.max(own, 0) >= 0:
        to = _at(base, 0, tokens.dtype.element_ty) + place * H
        read = tokens + token.to(tl.int64) * st
        for h in range(0, H, B):
            n = h + tl.arange(0, B)
            tl.store(to + n, tl.load(read + n, mask=n < H), mask=n < H)


@triton.jit
def _fetch(
    state, rows, here, factors, out, out_here, out_factors, H,
    K: tl.constexpr, KP: tl.constexpr, WEIGHTED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    own = tl.load(here + place * K + k, mask=k < K, other=-1)
    tl.store(out_here + place * K + k, own, mask=k < K)
    if WEIGHTED:
        factor = tl.load(factors + place * K + k, mask=k < K)
        tl.store(out_factors + place * K + k, factor, mask=k < K)
    well = _well(state)
    width = tl.where(well & (tl.max(own, 0) >= 0), H, 0)
    none = tl.where(well, 0.0, float("nan"))
    for h in range(0, H, B):
        n = h + tl.arange(0, B)
        row = tl.load(rows + place * H + n, mask=n < width, other=none)
        tl.store(out + place * H + n, row, mask=n < H)


@triton.jit
def _put_back(
    state, rows, factors, here, peers, at, factors_at, M, me, H,
    K: tl.constexpr, KP: tl.constexpr, WEIGHTED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Each row that has an expert here, to its source."""
    place = tl.program_id(0).to(tl.int64)
    source = place // M
    base = tl.load(peers + source) + at
    to_place = me * M + place % M
    k = tl.arange(0, KP)
    kept = (k < K) & _well(state)
    own = tl.load(here + place * K + k, mask=kept, other=-1)
    if WEIGHTED:
        factor = tl.load(factors + place * K + k, mask=kept)
        its = _at(base, factors_at, factors.dtype.element_ty)
        tl.store(its + to_place * K + k, factor, mask=kept)
    if tl.max(own, 0) >= 0:
        to = _at(base, 0, rows.dtype.element_ty) + to_place * H
        for h in range(0, H, B):
            n = h + tl.arange(0, B)
            tl.store(to + n, tl.load(rows + place * H + n, mask=n < H), mask=n < H)


@triton.jit
def _put_sums(
    state, rows, row_map, weights, bias, here, peers, at, M, me, H,
    K: tl.constexpr, MAPPED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
    sb, DTYPE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The sum of each place's pairs, as `rows.total`, to its source; nothing of a place without."""
    place = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * B + tl.arange(0, B)
    base = tl.load(peers + place // M) + at
    acc = tl.zeros((B,), tl.float32)
    some = tl.zeros((), tl.int32)
    for k in tl.static_range(K):
        pair = place * K + k
        row = tl.load(row_map + pair).to(tl.int64)
        found = row >= 0
        if not MAPPED:
            row = pair
        kept = n < tl.where(found, H, 0)
        value = tl.load(rows + row * H + n, mask=kept, other=0.0).to(tl.float32)
        if BIASED:
            expert = tl.load(here + pair)
            value += tl.load(bias + expert * sb + n, mask=kept, other=0.0).to(tl.float32)
        if WEIGHTED:
            value = value * tl.load(weights + pair).to(tl.float32)
        acc += tl.where(found, value, 0.0)
        some += found.to(tl.int32)
    width = tl.where((some > 0) & _well(state), H, 0)
    to = _at(base, 0, DTYPE) + (me * M + place % M) * H
    tl.store(to + n, acc.to(DTYPE), mask=n < width)


@triton.jit
def _final(
    state, arrived, ids, out, M, H, L,
    K: tl.constexpr, KP: tl.constexpr, W: tl.constexpr, SUM: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The sum, in the dtype SUM and in the order of ranks, of what those sent that have an expert
    of the token."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * B + tl.arange(0, B)
    k = tl.arange(0, KP)
    expert = tl.load(ids + token * K + k, mask=k < K, other=-1).to(tl.int32)
    acc = tl.zeros((B,), SUM)
    for rank in tl.static_range(W):
        its = (expert >= rank * L) & (expert < (rank + 1) * L)
        width = tl.where(tl.sum(its.to(tl.int32), 0) > 0, H, 0)
        row = arrived + (rank * M + token) * H
        acc += tl.load(row + n, mask=n < width, other=0.0).to(SUM)
    acc = tl.where(_well(state), acc, float("nan"))
    tl.store(out + token * H + n, acc.to(out.dtype.element_ty), mask=n < H)


@triton.jit
def _pick(state, arrived, ids, out, M, L, E, K: tl.constexpr, KP: tl.constexpr):
    """Of each pair, what the rank of its expert sent; 0 of no expert."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    expert = tl.load(ids + token * K + k, mask=k < K, other=-1).to(tl.int32)
    real = (k < K) & (expert >= 0) & (expert < E)
    place = (expert // L).to(tl.int64) * M + token
    value = tl.load(arrived + place * K + k, mask=real, other=0.0)
    value = tl.where(_well(state), value, float("nan")).to(value.dtype)
    tl.store(out + token * K + k, value, mask=k < K)


def _block(width: int) -> int:
    return min(_WIDTH, max(16, triton.next_power_of_2(width)))


def meet(
    boards: Tensor,
    words: Tensor,
    state: Tensor,
    record: Tensor,
    layer: Tensor,
    most: int,
    patience: float,
    me: int,
) -> None:
    """Waits, on the device, until every rank has come to this meeting. most: ``M`` of this step.
    layer: its number, for the record; of one entry. patience: seconds."""
    world = len(boards)
    block = max(2, triton.next_power_of_2(world))
    launch(
        _meet, (1,),
        boards, words, state, record, layer, most, int(1e9 * patience), me,
        world, block, words.is_cuda, _INTERPRETED_SPINS, num_warps=1,
    )  # fmt: skip


def push(
    state: Tensor,
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    peers: Tensor,
    at: tuple[int, int, int],
    most: int,
    me: int,
    local: int,
) -> None:
    """``tokens [T, H]`` to the ranks of their experts; ``ids [T, K]`` and ``weights`` to all.
    state: of `meet`, here and below. at: bytes from which on rows stand there, and from there to
    the ids and to the weights."""
    num_tokens, width = tokens.shape
    top_k = ids.shape[1]
    launch(
        _push, (most, len(peers)),
        state, tokens, ids, weights, peers, *at,
        num_tokens, most, me, width, tokens.stride(0), local,
        top_k, triton.next_power_of_2(top_k), weights is not None, _block(width),
    )  # fmt: skip


def fetch(
    state: Tensor, rows: Tensor, here: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Copies of what has arrived; rows that are for no expert are 0."""
    places, width = rows.shape
    top_k = here.shape[1]
    out = empty(rows.shape, rows.dtype, rows.device)
    out_here = empty(here.shape, here.dtype, rows.device)
    out_factors = None
    if factors is not None:
        out_factors = empty(factors.shape, factors.dtype, rows.device)
    launch(
        _fetch, (places,),
        state, rows, here, factors, out, out_here, out_factors, width,
        top_k, triton.next_power_of_2(top_k), factors is not None, _block(width),
    )  # fmt: skip
    return out, out_here, out_factors


def put_back(
    state: Tensor,
    rows: Tensor,
    factors: Tensor | None,
    here: Tensor,
    peers: Tensor,
    at: tuple[int, int],
    most: int,
    me: int,
) -> None:
    """``rows [R, H]``, and ``factors [R, K]`` if there are any, to their sources."""
    places, width = rows.shape
    top_k = here.shape[1]
    launch(
        _put_back, (places,),
        state, rows, factors, here, peers, *at, most, me, width,
        top_k, triton.next_power_of_2(top_k), factors is not None, _block(width),
    )  # fmt: skip


def put_sums(
    state: Tensor,
    rows: Tensor,
    row_map: Tensor,
    here: Tensor,
    peers: Tensor,
    at: int,
    most: int,
    me: int,
    dtype: torch.dtype,
    mapped: bool,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """``rows [S, H]`` of pairs, summed by place, in ``dtype`` to the places' sources. The others as
    of `rows.total`."""
    top_k, width = here.shape[1], rows.shape[1]
    block = _block(width)
    launch(
        _put_sums, (here.shape[0], triton.cdiv(width, block)),
        state, rows, row_map, weights, bias, here, peers, at, most, me, width,
        top_k, mapped, weights is not None, bias is not None,
        bias.stride(0) if bias is not None else 0, _DTYPES[dtype], block,
    )  # fmt: skip


_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def final(state: Tensor, arrived: Tensor, ids: Tensor, world: int, most: int, local: int) -> Tensor:
    """``arrived [R, H]``, by the rank that sent it, to ``[T, H]``, summed in float32 at least."""
    num_tokens, top_k = ids.shape
    width = arrived.shape[1]
    out = empty((num_tokens, width), arrived.dtype, arrived.device)
    if num_tokens:
        block = _block(width)
        launch(
            _final, (num_tokens, triton.cdiv(width, block)),
            state, arrived, ids, out, most, width, local,
            top_k, triton.next_power_of_2(top_k), world,
            tl.float64 if arrived.dtype == torch.float64 else tl.float32, block,
        )  # fmt: skip
    return out


def pick(
    state: Tensor, arrived: Tensor, ids: Tensor, most: int, local: int, experts: int
) -> Tensor:
    """``arrived [R, K]`` to ``[T, K]``."""
    num_tokens, top_k = ids.shape
    out = empty((num_tokens, top_k), arrived.dtype, arrived.device)
    if num_tokens:
        launch(
            _pick, (num_tokens,),
            state, arrived, ids, out, most, local, experts,
            top_k, triton.next_power_of_2(top_k),
        )  # fmt: skip
    return out
