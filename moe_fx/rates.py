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
from typing import Any, Protocol

import torch

import moe_fx.ops  # noqa: F401  registers torch.ops.moe_fx
from moe_fx.compat import real_tensors

__all__ = ["Compute", "measured"]

_BUDGET = 0.1
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
_MOST_GROUPS = 32
"""Groups run in one measurement: so many small ones take long enough to be timed."""
_MOST_GEMM_BYTES = 512 << 20
"""Elsewhere, where one kernel runs all groups: bytes above which more groups are taken to cost in
proportion."""
_KEPT_BYTES = 32 << 20
"""Buffers above this are not kept for the next: glibc gets each from the system anew (the largest
M_MMAP_THRESHOLD that it adapts to), which hands it out page by page."""
_HELD = 8
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

    Ranks measure different numbers: let one decide (`moe_fx.decide`).
    """
    return _Measured(device, dtype)


class _Measured:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def gemm_seconds(self, rows: float, d: int, n: int, groups: float = 1) -> float:
        """Between powers of two of rows, interpolated: between 64 and 512 alone, 128 rows of a wide
        expert were predicted to take 13 % less than they do. Fewer rows never take less than their
        share of the time: what disturbed one measurement does not make a cut look like a gain."""
        if min(rows, d, n, groups) <= 0:
            return 0.0
        most = _MOST_ROWS.get(self.device.type, _MOST_ROWS_ELSEWHERE)
        if rows >= most:
            return self._gemm(most, d, n, groups) * rows / most
        below = 2 ** max(0, math.floor(math.log2(rows)))
        shortest = longest = self._gemm(most, d, n, groups)
        at = most
        while at > below:
            at //= 2
            longest, shortest = shortest, max(self._gemm(at, d, n, groups), shortest / 2)
        return shortest + (longest - shortest) * (rows - below) / below

    def _gemm(self, rows: int, d: int, n: int, groups: float) -> float:
        on_cpu = self.device.type == "cpu"
        most = _MOST_GEMM_BYTES
        if on_cpu:
            least, most = _GEMM_BYTES
            read = int(_GEMM_FLOPS / (2 * rows)) * self.dtype.itemsize
            most = min(most, max(least, read))
        width = max(1, min(n, most // (d * self.dtype.itemsize)))
        group_bytes = (d * width + rows * (d + width)) * self.dtype.itemsize
        held = min(_MOST_GROUPS, max(1, most // group_bytes))
        held = held if on_cpu else min(math.ceil(groups), held)
        seconds = _gemm_seconds(self.device, self.dtype, rows, d, width, held)
        seconds -= min(seconds / 2, self.fresh_seconds(held * rows * width * self.dtype.itemsize))
        return seconds * (groups / held) * (n / width)

    def copy_seconds(self, num_bytes: float) -> float:
        return num_bytes * _copy_seconds_per_byte(self.device)

    def fresh_seconds(self, num_bytes: float) -> float:
        if self.device.type != "cpu" or num_bytes <= _KEPT_BYTES:
            return 0.0
        return num_bytes * _fresh_seconds_per_byte(self.device)

    def piece_seconds(self) -> float:
        return _piece_seconds(self.device, self.dtype)

    def cut_seconds(self) -> float:
        return _cut_seconds(self.device)


def _cached(measurement: Callable[..., float]) -> Callable[..., float]:
    """Kept per device type and other arguments; real tensors even while a compiler traces."""
    kept: dict[tuple[Any, ...], float] = {}

    @functools.wraps(measurement)
    def cached(device: torch.device, *args: Any) -> float:
        key = (device.type, *args)
        if key not in kept:
            with real_tensors(), torch.no_grad():
                kept[key] = measurement(device, *args)
        return kept[key]

    return cached


@_cached
def _gemm_seconds(
    device: torch.device, dtype: torch.dtype, rows: int, d: int, n: int, groups: int
) -> float:
    """The op that the rewritten graph runs: ``[groups * rows, d], [groups, d, n]``."""
    tokens = torch.ones((groups * rows, d), dtype=dtype, device=device)
    weight = torch.ones((groups, d, n), dtype=dtype, device=device)
    offsets = torch.arange(rows, groups * rows + 1, rows, dtype=torch.int32, device=device)
    return _timed(device, lambda: torch.ops.moe_fx.grouped_mm(tokens, weight, offsets))


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

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        return time.perf_counter() - start

    once()
    took = [once()]
    while len(took) < _REPEATS and sum(took) < _BUDGET:
        took.append(once())
    return median(took)
