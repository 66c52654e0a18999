"""What the processes of one host tell each other before a step: how many tokens each rank has.

A word of shared memory a rank, written and read by all: some microseconds where all are there. The
device is not waited for. The word of step ``n`` says ``n`` and the number at once, so that none is
read without the other; odd and even steps have words of their own, since a rank may be one step
ahead of another that has still to read. A rank that has waited too long says so in both, for those
that come late, and tells no more.
"""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist

from moe_fx.compat import group_store
from moe_fx.errors import RankMissing, RanksDiffer
from moe_fx.ranks.agree import wait_for
from moe_fx.ranks.presence import next_exchange, store_key
from moe_fx.ranks.waiting import BROKEN, Exchange, came_late

__all__ = ["Board", "board_of"]

_SHARED = Path("/dev/shm")
_LINE = 8
"""Numbers from one rank's word to the next: a cache line."""
_NONE = "none: "
"""In the place of a path: why there is none."""
_SPIN = 2e-4
"""Seconds that a rank looks without a pause."""
_PAUSE = 2e-5
_GAVE_UP = (1 << 63) - 1
_HOST = torch.device("cpu")


class Board:
    """words ``[2, W, ...]``: of the ranks of the group, in shared memory."""

    def __init__(self, group: dist.ProcessGroup, words: Any) -> None:
        self.group, self.words = group, words
        self.step = 0
        self.error: RankMissing | RanksDiffer | None = None

    def tell(self, tokens: int, what: str, timeout: float) -> list[int]:
        """The tokens of every rank in this step, of which this one has so many. ``RankMissing``
        after ``timeout`` seconds, and ever after. what: is waited for, in an error."""
        if self.error is not None:
            raise self.error
        try:
            return self._told(tokens, what, timeout)
        except (RankMissing, RanksDiffer) as error:
            self.words[:, self.group.rank(), 0] = _GAVE_UP
            self.error = error
            raise

    def _told(self, tokens: int, what: str, timeout: float) -> list[int]:
        self.step += 1
        words = self.words[self.step % 2, :, 0]
        words[self.group.rank()] = (self.step << 32) | tokens
        stand = next_exchange(self.group, what)
        posted = _Posted(words, self.step)
        if not posted.is_completed():
            Exchange(posted, self.group, _HOST, stand, timeout).wait()
        gone = [rank for rank, word in enumerate(words) if word == _GAVE_UP]
        if gone:
            raise came_late(self.group, stand, gone, BROKEN)
        return [int(word) & 0xFFFFFFFF for word in words]


class _Posted:
    """That every rank has told, as `Exchange` waits for things."""

    def __init__(self, words: Any, step: int) -> None:
        self.words, self.step = words, step

    def is_completed(self) -> bool:
        return bool((self.words >> 32 >= self.step).all())

    def wait(self, timeout: timedelta | None = None) -> None:
        began = time.monotonic()
        seconds = float("inf") if timeout is None else timeout.total_seconds()
        while not self.is_completed():
            spent = time.monotonic() - began
            if spent > seconds:
                raise RuntimeError("not every rank has told how many tokens it has")
            if spent > _SPIN:
                time.sleep(_PAUSE)


_boards: WeakKeyDictionary[dist.ProcessGroup, Board | str] = WeakKeyDictionary()


def board_of(group: dist.ProcessGroup, timeout: float) -> Board | str:
    """The group's board, or why its ranks have none in common. Its first call is one of all
    ranks."""
    if group not in _boards:
        _boards[group] = _opened(group, timeout)
    return _boards[group]


def _opened(group: dist.ProcessGroup, timeout: float) -> Board | str:
    store, rank = group_store(group), group.rank()
    ranks, doing = range(group.size()), "shares memory with the ranks of its host"
    path_key = store_key(group, "board/path")
    opened = {other: store_key(group, f"board/opened/{other}") for other in ranks}
    shape = (2, group.size(), _LINE)
    if rank == 0:
        try:
            store.set(path_key, _made(shape))
        except OSError as error:
            store.set(path_key, f"{_NONE}rank 0 cannot share memory with others ({error.strerror})")
    wait_for(group, {0: path_key}, timeout, doing)
    path = store.get(path_key).decode()
    if path.startswith(_NONE):
        return path.removeprefix(_NONE)
    words, problem = None, ""
    try:
        words = np.memmap(path, dtype=np.int64, mode="r+", shape=shape)
    except OSError as error:
        problem = f"rank {rank} cannot open the memory that rank 0 shares ({error.strerror})"
    store.set(opened[rank], problem)
    wait_for(group, opened, timeout, doing)
    problems = [store.get(opened[other]).decode() for other in ranks]
    gone = {other: store_key(group, f"board/read/{other}") for other in ranks}
    store.set(gone[rank], "")
    if rank == 0:
        wait_for(group, gone, timeout, doing)
        os.unlink(path)
    found = next(filter(None, problems), "")
    return found or Board(group, words)


def _made(shape: tuple[int, ...]) -> str:
    folder = _SHARED if _SHARED.is_dir() else Path(tempfile.gettempdir())
    with tempfile.NamedTemporaryFile(prefix="moe_fx-", dir=folder, delete=False) as file:
        file.write(bytes(8 * int(np.prod(shape))))
    return file.name
