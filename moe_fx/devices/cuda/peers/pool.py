"""The memory that the ranks of a group write to, and what kernels say of ranks that are missing.

A pool a group, for all layers, of two halves that exchanges take in turn. Who writes for exchange
``n + 2`` has met all others in ``n + 1``, and those have done with ``n`` by then; so no half is
written while somebody still reads it, in whatever order layers exchange.

It grows when a step needs more than any before, on all ranks at once: they know each other's
numbers of tokens (`board`). Not under capture of a CUDA graph. Such a graph keeps the addresses
that it has seen, so memory that was there at a capture is kept for good.

Where a rank does not come, the device notes who is missing (`kernels.peers.meet`) and goes on
without waiting; what it computes is NaN from then on, and it writes nothing to others. A thread
looks at these notes and raises `RankMissing` in the thread that runs the model; from then on the
pool refuses.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fx.compat import in_backward, resolve_group, symmetric_bytes
from moe_fx.devices.cuda.kernels.peers import GAVE_UP, OTHER_STEP
from moe_fx.devices.cuda.peers.board import Board, board_of
from moe_fx.errors import MoeFxError, RankMissing, RanksDiffer
from moe_fx.ranks.device_watch import raise_in, take_back
from moe_fx.ranks.presence import named
from moe_fx.ranks.waiting import came_late, of

__all__ = ["Layout", "Pool", "Step", "pool_of"]

log = logging.getLogger("moe_fx")

_ALIGNED = 256
_LEAST = 1 << 20
"""Bytes of a half."""
_LAYERS = 1 << 14
_LOOK = 0.05
"""Seconds between two looks at the notes of devices."""

Memory = Callable[[int, torch.device, dist.ProcessGroup], tuple[Tensor, list[int]]]
"""So many bytes, 0 each, of which every rank of the group has the address on each."""


@dataclass(frozen=True)
class Layout:
    """Bytes from the begin of a half to its sections, for ``R`` places of ``width`` entries and
    ``K`` pairs. Rows begin it."""

    here: int
    factors: int
    size: int

    @classmethod
    def of(cls, places: int, width: int, top_k: int, row_size: int, factor_size: int) -> Layout:
        here = _up(places * width * row_size)
        factors = here + _up(places * top_k * 4)
        return cls(here, factors, factors + _up(places * top_k * factor_size))


def _up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Step:
    """One exchange. most: ``M``. at: byte of the pool from which on its half begins."""

    pool: Pool
    most: int
    at: int
    layout: Layout
    mark: Tensor
    timeout: float

    @property
    def places(self) -> int:
        return self.most * self.pool.world

    def rows(self, width: int, dtype: torch.dtype) -> Tensor:
        return self._section(0, (self.places, width), dtype)

    def here(self, top_k: int) -> Tensor:
        return self._section(self.layout.here, (self.places, top_k), torch.int32)

    def factors(self, top_k: int, dtype: torch.dtype) -> Tensor:
        return self._section(self.layout.factors, (self.places, top_k), dtype)

    def _section(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        begin, size = self.at + offset, shape[0] * shape[1] * dtype.itemsize
        return self.pool.buffer[begin : begin + size].view(dtype).view(shape)


class Pool:
    """Of one group and device.

    buffer: this rank's memory, bytes; peers ``[W]``: every rank's address of it. boards, words,
    state, record: of `kernels.peers.meet`.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, board: Board, memory: Memory
    ) -> None:
        self.name, self.device, self.board, self._memory = group.group_name, device, board, memory
        self.rank, self.world = group.rank(), group.size()
        self.half = 0
        self.error: MoeFxError | None = None
        self._kept: list[Tensor] = []
        self._turn, self._captured, self._stream = 0, False, None
        self._layers: dict[str, int] = {}
        self._thread = threading.get_ident()
        self._told: int | None = None  # the thread that is to get the error from beside
        self._telling = threading.Lock()
        self.buffer: Tensor
        self.peers: Tensor
        words, addresses = memory(self.world * 8, device, group)
        self.words = words.view(torch.int64)
        self.boards = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.state = torch.zeros(2, dtype=torch.int64, device=device)
        self.marks = torch.arange(_LAYERS, dtype=torch.int64, device=device)
        self.record = torch.zeros(4, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._notes = self.record.numpy()
        self._grow(_LEAST)
        _watch()

    # -- before an exchange ------------------------------------------------------------------------

    def tell(self, tokens: int, layer: str, timeout: float) -> int:
        """``M`` of a step in which this rank has so many tokens."""
        self.begin()
        return max(self.board.tell(tokens, f"tokens of {of(layer)}", timeout))

    def begin(self) -> None:
        """Before each op: raises the error that broke the pool, if one did. The op runs behind the
        one before it, whatever streams they are on."""
        self.check()
        if self.device.type != "cuda":
            return
        if torch.cuda.is_current_stream_capturing():
            self._captured = True
            return
        stream: Any = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def step(self, most: int, layout: Layout, layer: str, timeout: float) -> Step:
        """The next exchange, of the same size on every rank."""
        if layout.size > self.half:
            raise MoeFxError(f"no room was made for {layout.size} bytes, there are {self.half}")
        self._turn += 1
        at = (self._turn % 2) * self.half
        number = self._layers.setdefault(layer, len(self._layers))
        return Step(self, most, at, layout, self.marks[number : number + 1], timeout)

    def make_room(self, *layouts: Layout) -> None:
        """For each of the exchanges of a step, which every rank makes with these. Other memory may
        stand in for the pool's."""
        most = max(layout.size for layout in layouts)
        if most > self.half:
            self._grow(max(most, 2 * self.half))

    def check(self) -> None:
        """Raises the error that broke the pool, if one did."""
        thread = threading.get_ident()
        with self._telling:
            if self.error is None:
                self._look()
            if self.error is not None:
                take_back(self._told)  # who may not have got it from beside, and gets it now
                self._told = None
                raise self.error
        if not in_backward():
            self._thread = thread

    def _grow(self, half: int) -> None:
        on_gpu = self.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise MoeFxError(
                f"The exchange buffers of expert-parallel group {self.name!r} hold {self.half} "
                f"bytes and the step that is being captured needs {half}: memory cannot be shared "
                "with other GPUs under capture. Run a step of as many tokens once on every rank "
                "before you capture it."
            )
        if on_gpu:
            torch.cuda.synchronize(self.device)
        if self._captured:
            self._kept += [self.buffer, self.peers]
        half = _up(half)
        self.buffer, addresses = self._memory(2 * half, self.device, resolve_group(self.name))
        self.peers = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        self.half = half

    # -- what devices say --------------------------------------------------------------------------

    def _look(self) -> bool:
        """Takes note of what the device says; whether it is news."""
        what, ranks, layer, _ = (int(each) for each in self._notes)
        if not what or self.error is not None:
            return False
        group = resolve_group(self.name)
        others = [rank for rank in range(self.world) if ranks >> rank & 1]
        name = of(next((n for n, at in self._layers.items() if at == layer), ""))
        end = "Its exchange buffers cannot be used any more."
        if what == OTHER_STEP:
            self.error = RanksDiffer(
                f"Rank {self.rank} met {named(group, others)} of the expert-parallel group in "
                f"{name} with other numbers of tokens than its own step was made for: results are "
                "not valid. Every rank must capture the same steps in the same order, and replay "
                f"the same one. {end}"
            )
        elif what == GAVE_UP:
            self.error = came_late(group, name, others, end)
        else:
            self.error = RankMissing(
                f"Rank {self.rank} waited on its GPU in {name} for {named(group, others)} of the "
                "expert-parallel group, which did not come to it in time (exchange_timeout). Every "
                "rank must run every step: let transformers' generate() do so by synced_gpus=True "
                f"on every rank, and look for an error on a rank that is missing. {end}"
            )
        return True

    def tell_of_failure(self) -> None:
        """Raises the error of the device, if there is news of one, in the model's thread."""
        with self._telling:
            if self._look() and self.error is not None:
                log.error("%s", self.error)
                self._told = self._thread
                raise_in(self._thread, self.error)


_pools: dict[tuple[str, torch.device], Pool] = {}
_looker: threading.Thread | None = None
_lock = threading.Lock()


def pool_of(
    group_name: str,
    device: torch.device,
    timeout: float,
    memory: Memory = symmetric_bytes,
) -> Pool:
    """The group's pool; made by its first call, which every rank must make. Raises `MoeFxError`
    where ranks share no memory."""
    key = (group_name, device)
    if key not in _pools:
        group = resolve_group(group_name)
        board = board_of(group, timeout)
        if isinstance(board, str):
            raise MoeFxError(
                f'strategy="direct" is for the ranks of one host: {board}. Use strategy="alltoall".'
            )
        _pools[key] = Pool(group, device, board, memory)
        weakref.finalize(group, _pools.pop, key, None)
    return _pools[key]


def _watch() -> None:
    global _looker
    with _lock:
        if _looker is None:
            _looker = threading.Thread(target=_look_on, name="moe_fx peers", daemon=True)
            _looker.start()


def _look_on() -> None:
    while True:
        for pool in list(_pools.values()):
            pool.tell_of_failure()
        time.sleep(_LOOK)
