"""What an exchange over a group's link costs: measured once, and the same numbers on every rank.

Three rates, since one exchange alone may not fill a link: a large Gloo all-to-all over TCP sends
one way, then the other, and leaves almost half of a slow link idle; the more are in flight, the
fuller it is (two hosts at 150 Mbit/s, torch 2.13: one 95 ns a byte, two 70, eight 58).

::

    link = calibrate(group, device)  # by every rank of the group, at the same place
    link.latency + (4 << 20) * link.rate(in_flight=1)  # seconds of one exchange of 4 MiB
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fx.compat import real_tensors

__all__ = ["Link", "calibrate", "known"]

_SMALLEST = 32 << 10
"""Bytes a rank sends to others in the first exchange timed for its rate."""
_GROWTH = 4
_REPRESENTATIVE = 2 << 20
"""Bytes below which an exchange says little about larger ones: socket buffers swallow it."""
_LARGEST = 64 << 20
_LATENCIES = 10
"""An exchange that takes so many latencies is measured well enough, if it is representative."""
_LONG = 0.1
"""Seconds after which an exchange is measured well enough, whatever its size."""
_REPEATS = 3
_SHORT_REPEATS = 9
"""Of exchanges that take less than `_LONG`: a few hiccups of the host are as long as they are."""
_PART = 4
"""Of an exchange measured alone, the parts as which several are measured."""
_MANY = 8
"""In flight: more are taken to be no faster."""


@dataclass(frozen=True)
class Link:
    """latency: seconds an exchange costs however small. alone, two, busy: seconds per byte that a
    rank sends to other ranks, when one exchange is in flight, two are, and eight or more.
    ``busy <= two <= alone``.
    """

    latency: float
    alone: float
    two: float
    busy: float

    def rate(self, in_flight: int) -> float:
        """Seconds per byte with so many exchanges in flight; between two and eight interpolated,
        by doublings."""
        if in_flight <= 1:
            return self.alone
        share = math.log(min(in_flight, _MANY) / 2, _MANY / 2)
        return self.two + (self.busy - self.two) * share


_measured: dict[tuple[str, str], Link] = {}


def calibrate(group: dist.ProcessGroup, device: torch.device) -> Link:
    """The group's link for tensors on ``device``: measured by the first call in this process for a
    group and device type, the same numbers afterwards.

    A collective: every rank of the group must make its first call at the same place among the
    group's collectives, with nothing else in flight, or the group hangs. All ranks get bitwise the
    same numbers. Takes about 2 s at 150 Mbit/s, and well below 0.1 s on a fast link. May be called
    while a compiler traces with fake tensors.
    """
    key = (group.group_name, device.type)
    if key not in _measured:
        with real_tensors(), torch.no_grad():
            _measured[key] = _measure(group, device)
    return _measured[key]


def known(group: dist.ProcessGroup, device: torch.device) -> Link | None:
    """What `calibrate` found; None if it was not called. Measures nothing."""
    return _measured.get((group.group_name, device.type))


def _gathered(
    numbers: Sequence[float], group: dist.ProcessGroup, device: torch.device
) -> list[list[float]]:
    """``[rank][i]``"""
    with real_tensors(), torch.no_grad():
        mine = torch.tensor(numbers, dtype=torch.float64, device=device)
        theirs = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(theirs, mine, group=group)
        return [numbers.tolist() for numbers in theirs]


def _measure(group: dist.ProcessGroup, device: torch.device) -> Link:
    if group.size() == 1:
        return Link(0.0, 0.0, 0.0, 0.0)
    bench = _Bench(group, device)
    bench.seconds(1, 1, repeats=2)  # opens the connections
    latency = bench.seconds(1, 1, repeats=_SHORT_REPEATS)
    num_bytes = _SMALLEST
    while True:
        seconds = bench.seconds(num_bytes, 1, repeats=1)
        representative = num_bytes >= _REPRESENTATIVE and seconds >= _LATENCIES * latency
        if seconds >= _LONG or representative or num_bytes * _GROWTH > _LARGEST:
            break
        num_bytes *= _GROWTH
    repeats = _REPEATS if seconds >= _LONG else _SHORT_REPEATS
    least = latency / _LATENCIES / num_bytes  # where noise drowned what the bytes cost

    def rate(part: int, in_flight: int) -> float:
        seconds = bench.seconds(part, in_flight, repeats) - in_flight * latency
        return max(seconds / (part * in_flight), least)

    alone = rate(num_bytes, 1)
    two = min(alone, rate(num_bytes // _PART, 2))
    return Link(latency, alone, two, min(two, rate(num_bytes // _PART, _MANY)))


class _Bench:
    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device

    def seconds(self, num_bytes: int, in_flight: int, repeats: int) -> float:
        """Median seconds of ``in_flight`` exchanges started together, each sending ``num_bytes`` to
        other ranks; of the slowest rank, so the same on every rank."""
        world = self.group.size()
        share = -(-num_bytes // (world - 1))
        size = (share * world,)
        sent = [torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(in_flight)]
        received = [torch.empty_like(buffer) for buffer in sent]
        took = [self._timed(sent, received) for _ in range(repeats)]
        return max(row[0] for row in _gathered([median(took)], self.group, self.device))

    def _timed(self, sent: list[Tensor], received: list[Tensor]) -> float:
        self._synchronise()
        start = time.perf_counter()
        works = [
            dist.all_to_all_single(into, rows, group=self.group, async_op=True)
            for rows, into in zip(sent, received, strict=True)
        ]
        for work in works:
            work.wait()
        self._synchronise()
        return time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
