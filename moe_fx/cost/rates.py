"""How fast this device computes, measured in the very shapes that a plan is about.

::

    compute = measured(torch.device("cpu"), torch.float32)
    compute.gemm_seconds(256, 512, 4096, groups=8)  # 8 experts, 256 rows each
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol, TypeVar

import torch

import moe_fx.ops  # noqa: F401  registers torch.ops.moe_fx
from moe_fx.compat import real_tensors

__all__ = ["Compute", "measured"]

T = TypeVar("T")

_BUDGET = 0.2
"""Seconds that the repeats of one measurement may take, beyond the first two."""
_REPEATS = 7
_MOST_ROWS = {"cpu": 512}
"""Rows of the largest GEMM measured; more rows are taken to cost in proportion."""
_MOST_ROWS_ELSEWHERE = 8192
_GEMM_BYTES = 8 << 20, 128 << 20
"""On the CPU, bytes of rows and weights that a GEMM measurement goes through, so that no cache
keeps what a layer would have to read: as many as `_GEMM_FLOPS` take, within these limits. Experts
run one by one there: any number of groups costs in proportion, and more columns than fit (an output
head) do."""
_GEMM_FLOPS = 4e9
_FEW_ROWS = 64
"""GEMMs of fewer rows are measured apart, and only if they are asked for."""
_MOST_GROUPS = 32
"""Groups run in one measurement: so many small ones take long enough to be timed."""
_MOST_GEMM_BYTES = 512 << 20
"""Elsewhere, where one kernel runs all groups: bytes above which more groups are taken to cost in
proportion."""
_KEPT_BYTES = 32 << 20
"""Buffers above this are not kept for the next: glibc gets each from the system anew (the largest
M_MMAP_THRESHOLD that it adapts to), which hands it out page by page."""
_HELD = 8
_LAUNCHED = 2.5
"""On GPUs: what a piece takes the host that launches it, over ops on rows alone. It
starts and waits for two exchanges, and launches generated kernels (two H200: 1.05 and 1.7 ms on the
two ranks, of which 0.5 and more are ops on rows)."""
_COPY_BYTES = {"cpu": 16 << 20}
_COPY_BYTES_ELSEWHERE = 256 << 20


class Compute(Protocol):
    """What the pipeline model asks of a device."""

    def gemm_seconds(self, rows: float, d: int, n: int, groups: float = 1) -> float:
        """``groups`` times ``[rows, d] @ [d, n]``, each group with its own weight."""
        ...

    def copy_seconds(self, num_bytes: float) -> float:
        """Read and write so many bytes of rows, in another order."""
        ...

    def fresh_seconds(self, num_bytes: float) -> float:
        """What a new buffer of so many bytes costs, beyond what is done with it."""
        ...

    def piece_seconds(self) -> float:
        """What a piece of an exchange costs however small: launches, counts, split lists."""
        ...

    def cut_seconds(self) -> float:
        """What it costs before the first exchange that rows are cut into pieces, however few."""
        ...


def measured(device: torch.device, dtype: torch.dtype) -> Compute:
    """Rates of ``device`` for values of ``dtype``. Every number is measured when first asked for,
    in a few to some ten milliseconds, and kept for the process, per device type and dtype.

    Ranks measure different numbers: let one decide (`moe_fx.cost.decide`).
    """
    return _Measured(device, dtype)


class _Measured:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def gemm_seconds(self, rows: float, d: int, n: int, groups: float = 1) -> float:
        """Between powers of two of rows, which are measured in turn, interpolated: so plans that
        cut the same rows differently are compared by what a weight costs to read, not by what
        disturbed one measurement. Fewer rows never take less than their share of the time."""
        if min(rows, d, n, groups) <= 0:
            return 0.0
        most = _MOST_ROWS.get(self.device.type, _MOST_ROWS_ELSEWHERE)
        below = 2 ** max(0, math.floor(math.log2(min(rows, most))))
        between = (1, _FEW_ROWS) if rows < _FEW_ROWS else (_FEW_ROWS, most)
        curve = self._gemms(d, n, groups, *between)
        if rows >= most:
            return curve[most] * rows / most
        shortest, longest = curve[below], curve[2 * below]
        return shortest + (longest - shortest) * (rows - below) / below

    def _gemms(self, d: int, n: int, groups: float, least: int, most: int) -> dict[int, float]:
        """Seconds by rows, powers of two from ``least`` to ``most``."""
        levels = [least << at for at in range((most // least).bit_length())]
        shapes = tuple((rows, *self._measured_shape(rows, d, n, groups)) for rows in levels)
        times = _gemm_seconds(self.device, self.dtype, d, shapes)
        curve: dict[int, float] = {}
        for (rows, width, held), seconds in reversed(list(zip(shapes, times, strict=True))):
            fresh = self.fresh_seconds(held * rows * width * self.dtype.itemsize)
            own = (seconds - min(seconds / 2, fresh)) * (groups / held) * (n / width)
            curve[rows] = max(own, curve.get(2 * rows, 0.0) / 2)
        return curve

    def _measured_shape(self, rows: int, d: int, n: int, groups: float) -> tuple[int, int]:
        """(columns, groups) that stand for ``n`` and ``groups``."""
        on_cpu = self.device.type == "cpu"
        most = _MOST_GEMM_BYTES
        if on_cpu:
            least, most = _GEMM_BYTES
            read = int(_GEMM_FLOPS / (2 * rows)) * self.dtype.itemsize
            most = min(most, max(least, read))
        width = max(1, min(n, most // (d * self.dtype.itemsize)))
        group_bytes = (d * width + rows * (d + width)) * self.dtype.itemsize
        held = min(_MOST_GROUPS, max(1, most // group_bytes))
        return width, held if on_cpu else min(math.ceil(groups), held)

    def copy_seconds(self, num_bytes: float) -> float:
        return num_bytes * _copy_seconds_per_byte(self.device)

    def fresh_seconds(self, num_bytes: float) -> float:
        if self.device.type != "cpu" or num_bytes <= _KEPT_BYTES:
            return 0.0
        return num_bytes * _fresh_seconds_per_byte(self.device)

    def piece_seconds(self) -> float:
        rows = _piece_seconds(self.device, self.dtype)
        return _LAUNCHED * rows if self.device.type == "cuda" else rows

    def cut_seconds(self) -> float:
        return _cut_seconds(self.device)


def _cached(measurement: Callable[..., T]) -> Callable[..., T]:
    """Kept per device type and other arguments; real tensors even while a compiler traces."""
    kept: dict[tuple[Any, ...], T] = {}

    @functools.wraps(measurement)
    def cached(device: torch.device, *args: Any) -> T:
        key = (device.type, *args)
        if key not in kept:
            with real_tensors(), torch.no_grad():
                kept[key] = measurement(device, *args)
        return kept[key]

    return cached


@_cached
def _gemm_seconds(
    device: torch.device, dtype: torch.dtype, d: int, shapes: tuple[tuple[int, int, int], ...]
) -> list[float]:
    """Of each (rows, n, groups): the op that the rewritten graph runs, ``[groups * rows, d],
    [groups, d, n]``. Their ratios to the last are medians of rounds that run all of them."""
    weights = torch.ones(max(d * n * g for _, n, g in shapes), dtype=dtype, device=device)
    tokens = torch.ones((max(rows * g for rows, _, g in shapes), d), dtype=dtype, device=device)

    def call(rows: int, n: int, groups: int) -> Callable[[], Any]:
        offsets = torch.arange(rows, groups * rows + 1, rows, dtype=torch.int32, device=device)
        weight = weights[: groups * d * n].view(groups, d, n)
        return lambda: torch.ops.moe_fx.grouped_mm(tokens[: groups * rows], weight, offsets)

    calls = [call(*shape) for shape in shapes]
    rounds = _repeated(lambda: [_once(device, each) for each in calls], _BUDGET * len(calls))
    last = median(times[-1] for times in rounds)
    return [last * median(times[at] / times[-1] for times in rounds) for at in range(len(calls))]


@_cached
def _copy_seconds_per_byte(device: torch.device) -> float:
    num_bytes = _COPY_BYTES.get(device.type, _COPY_BYTES_ELSEWHERE)
    width = 1024
    rows = torch.zeros((num_bytes // (4 * width), width), dtype=torch.float32, device=device)
    order = torch.arange(rows.shape[0] - 1, -1, -1, device=device)
    return _timed(device, lambda: rows.index_select(0, order)) / num_bytes


@_cached
def _fresh_seconds_per_byte(device: torch.device) -> float:
    """The buffers that are held take what room other work has left between small ones: what the
    next costs does not depend on what ran before."""
    kept, *held = (
        torch.empty(2 * _KEPT_BYTES, dtype=torch.uint8, device=device) for _ in range(_HELD)
    )
    reused = _timed(device, lambda: kept.fill_(1))
    fresh = _timed(device, lambda: torch.empty_like(held[0]).fill_(1))
    return max(0.0, fresh - reused) / len(kept)


@_cached
def _piece_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Regrouping and back, and one grouped GEMM, of a single row."""
    row = torch.ones((1, 16), dtype=dtype, device=device)
    weight = torch.ones((1, 16, 16), dtype=dtype, device=device)
    received = torch.ones((1, 1), dtype=torch.int64)
    counts = torch.ones((1,), dtype=torch.int64, device=device)
    ops = torch.ops.moe_fx

    def piece() -> None:
        grouped, row_map = ops.regroup(row, received)
        result = ops.grouped_mm(grouped, weight, counts.cumsum(0, dtype=torch.int32))
        ops.unpermute(result, row_map, None, [1, 16])

    return _timed(device, piece)


@_cached
def _cut_seconds(device: torch.device) -> float:
    """Of 16 rows, over one piece's sizes and rows."""
    ids = torch.arange(16, device=device).view(8, 2)
    tokens = torch.ones((8, 16), device=device)
    counts = torch.ones((2, 16), dtype=torch.int64, device=device)
    ops = torch.ops.moe_fx

    def cut() -> None:
        sizes, _, _ = ops.cut_rows(counts, 0, 4, 1)
        ops.permute_cut(tokens, ids, sizes)

    def whole() -> None:
        ops.split_sizes(counts[0], counts[:, :8])
        ops.permute(tokens, ids)

    return max(0.0, _timed(device, cut) - _timed(device, whole))


def _timed(device: torch.device, call: Callable[[], Any]) -> float:
    """Median seconds of a call once warm."""
    return median(took for (took,) in _repeated(lambda: [_once(device, call)], _BUDGET))


def _once(device: torch.device, call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter() - start


def _repeated(times: Callable[[], list[float]], budget: float) -> list[list[float]]:
    """Warm; then again while ``budget`` seconds are not spent, `_REPEATS` times at most."""
    times()
    took = [times()]
    while len(took) < _REPEATS and sum(map(sum, took)) < budget:
        took.append(times())
    return took
