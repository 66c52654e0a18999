"""GPUs that write to each other's memory, by Triton's interpreter: real ranks, real kernels, memory
that processes share in place of that of GPUs."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_fx.compat import group_store
from moe_fx.errors import MoeFxError, RankMissing
from moe_fx.testing import RankPool
from tests.devices.cuda.interpreted import recorded_here

pytest.importorskip("triton", minversion="3.7", reason="earlier interpreters need an older NumPy")

ops = torch.ops.moe_fx
_files = itertools.count()


def shared_bytes(
    size: int, device: torch.device, group: dist.ProcessGroup
) -> tuple[Tensor, list[int]]:
    """In place of `moe_fx.compat.symmetric_bytes`: a file for each rank, which all map."""
    number, store = next(_files), group_store(group)
    key = f"bytes/{number}"
    path = f"/dev/shm/moe_fx-test-{os.getpid()}-{number}"
    own = torch.from_file(path, shared=True, size=size, dtype=torch.uint8).zero_()
    store.set(f"{key}/{group.rank()}", path)
    every = []
    for rank in range(group.size()):
        theirs = store.get(f"{key}/{rank}").decode()
        mapped = torch.from_file(theirs, shared=True, size=size, dtype=torch.uint8)
        every.append(own if rank == group.rank() else mapped)
    _mapped.append(every)
    dist.barrier(group)
    os.unlink(path)
    return own, [each.data_ptr() for each in every]


_mapped: list[list[Tensor]] = []
"""Kept, as pools know addresses only."""


@contextmanager
def peers_here() -> Iterator[Any]:
    """The ops of `moe_fx.devices.cuda.peers.ops`, on this rank's CPU."""
    from moe_fx.devices.cuda.peers import ops as own
    from moe_fx.devices.cuda.peers import pool

    def pool_of(group: str, device: torch.device, timeout: float) -> pool.Pool:
        return pool.pool_of(group, device, timeout, shared_bytes)

    with mock.patch.object(own, "pool_of", pool_of):
        yield own


@pytest.fixture(scope="module")
def interpreting() -> Iterator[RankPool]:
    """Two ranks in which Triton interprets."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}), RankPool(WORLD) as pool:
        yield pool


WORLD, EXPERTS, TOP_K, H, INNER = 2, 6, 3, 20, 16
LOCAL = EXPERTS // WORLD
Routing = list[list[list[int]]]


def arguments(
    rank: int, routing: Routing, dtype: torch.dtype, weighs: bool, seed: int = 0
) -> list[Any]:
    """tokens, ids, weights of this rank."""
    ids = torch.tensor(routing[rank], dtype=torch.int64).view(-1, TOP_K)
    generator = torch.Generator().manual_seed(rank + 10 * seed)
    tokens = torch.randn(len(ids), H, generator=generator).to(dtype)
    weights = torch.rand(ids.shape, generator=generator)
    return [tokens, ids, weights if weighs else None]


def tables(rank: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    gate_up = torch.randn(EXPERTS, H, 2 * INNER, generator=generator).to(dtype)
    down = torch.randn(EXPERTS, INNER, H, generator=generator).to(dtype)
    bias = torch.randn(EXPERTS, H, generator=generator).to(dtype)
    return [each[rank * LOCAL : (rank + 1) * LOCAL].contiguous() for each in (gate_up, down, bias)]


def compared(
    rank: int, routings: list[Routing], dtype: torch.dtype, weighs: bool
) -> list[tuple[Tensor, Tensor]]:
    """Each op beside its kernel for any group, step by step, in one group."""
    name = dist.new_group().group_name
    gate_up, down, bias = tables(rank, dtype)
    body = gate_up, None, down, None, None, bias, "halves", "silu", 1.0, None, 0.0, dtype
    found: list[Any] = []
    with peers_here() as own:
        for step, routing in enumerate(routings):
            given = arguments(rank, routing, dtype, weighs, step)
            ids, place = given[1], (EXPERTS, name)
            wanted = ops.direct_dispatch(*given, *place)
            got = own.dispatch(*given, *place, layer="a layer", exchange_timeout=30.0)
            found += zip(got, wanted, strict=True)
            rows, here, factors = wanted
            back = torch.where((here >= 0).any(1, keepdim=True), rows * 2 + rank, float("nan"))
            sent = back.to(dtype), factors if weighs else None, here, ids, *place
            found += zip(own.combine(*sent), ops.direct_combine(*sent), strict=True)
            found.append(
                (own.experts(*given, *body, *place), ops.direct_experts(*given, *body, *place))
            )
    return found


RAGGED: list[Routing] = [
    [[[0, 1, 2], [3, 4, 5], [0, 3, 1]], [[5, 4, 3]]],
    [[], [[0, 0, 1], [-1, 2, 6], [-1, -1, -1]]],
    [[[3, 4, 5]] * 40, [[0, 1, 2]] * 17],
    [[], []],
    [[[2, 2, 2]], [[2, 2, 2]]],
]
"""By step and rank: other numbers of tokens, none, ids that are no expert's, one expert for all;
memory grows with the third."""


@pytest.mark.parametrize(
    ("dtype", "weighs"), [(torch.float32, True), (torch.float32, False), (torch.float16, True)]
)
def test_kernels_do_what_the_ops_mean(
    interpreting: RankPool, dtype: torch.dtype, weighs: bool
) -> None:
    """(The interpreter does not multiply in bfloat16.)"""
    for found in interpreting.run(compared, RAGGED, dtype, weighs):
        check(found, 1e-6 if dtype == torch.float32 else 4e-3)


def check(found: list[tuple[Tensor, Tensor]], tolerance: float) -> None:
    for mine, right in found:
        assert (mine.shape, mine.dtype) == (right.shape, right.dtype)
        largest = float(right.double().abs().max()) if right.numel() else 0.0
        torch.testing.assert_close(mine, right, rtol=0.0, atol=tolerance * largest)


def recorded(rank: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Steps of as many tokens, of other values each; with the kinds of calls that were recorded."""
    from moe_fx.devices.cuda import launch

    with recorded_here(), mock.patch.dict(launch._kinds, clear=True):
        step = [[[0, 1, 2], [3, 4, 5]], [[5, 4, 3]]]
        found = compared(rank, [step] * 4, torch.float32, True)
        return found, sum(kind is not None for kind in launch._kinds.values())


def test_recorded_launches_do_the_same(interpreting: RankPool) -> None:
    """An exchange takes one half or the other: dispatch and combine are two kinds each, of the
    whole's two exchanges the first is always of the same."""
    for found, kinds in interpreting.run(recorded):
        check(found, 1e-6)
        assert kinds == 3


def missing(rank: int, where: str) -> tuple[list[str], float]:
    """What rank 0 says of rank 1, which has gone, on the host or behind it; and seconds."""
    from triton.runtime.errors import InterpreterError

    name = dist.new_group().group_name
    given = arguments(rank, [[[0, 1, 2]], [[3, 4, 5]]], torch.float32, True)
    said, began = [], time.monotonic()
    with peers_here() as own:
        own.dispatch(*given, EXPERTS, name, layer="mlp.1", exchange_timeout=20.0)
        pool = own.pool_of(name, torch.device("cpu"), 1.0)
        began = time.monotonic()
        if rank == 1:
            if where == "the device":
                pool.tell(1, "mlp.2", 1.0)
            return said, 0.0
        for attempt in range(2):
            try:
                own.dispatch(*given, EXPERTS, name, layer="mlp.2", exchange_timeout=1.0)
                while attempt == 0 and time.monotonic() - began < 20.0:
                    time.sleep(0.01)  # the model's thread gets the error from beside
                said.append("")
            except (MoeFxError, InterpreterError) as error:
                raised = error.__cause__ if isinstance(error, InterpreterError) else error
                said.append(f"{type(raised).__name__}: {raised}")
    return said, time.monotonic() - began


@pytest.mark.parametrize("where", ["the host", "the device"])
def test_a_rank_that_does_not_come_is_named(interpreting: RankPool, where: str) -> None:
    (first, again), seconds = interpreting.run(missing, where)[0]
    assert first.startswith("RankMissing: Rank 0 waited ")
    assert "mlp.2" in first and "rank(s) [1]" in first
    assert seconds < 20
    assert again == first


def late_on_the_host(rank: int) -> str:
    name = dist.new_group().group_name
    given = arguments(rank, [[[0, 1, 2]], [[3, 4, 5]]], torch.float32, True)
    with peers_here() as own:
        own.dispatch(*given, EXPERTS, name)
        if rank == 1:
            dist.barrier()
        with pytest.raises(RankMissing) as caught:
            own.dispatch(*given, EXPERTS, name, layer="mlp", exchange_timeout=1.0)
        if rank == 0:
            dist.barrier()
    return str(caught.value)


def test_a_rank_that_comes_late_hears_so_at_once(interpreting: RankPool) -> None:
    waited, came = interpreting.run(late_on_the_host)
    assert re.match(r"Rank 0 waited .* for rank\(s\) \[1\], which did not come", waited)
    assert re.match(r"Rank 1 came to .*of mlp.* after rank\(s\) \[0\] had stopped waiting", came)


def late(rank: int) -> tuple[list[bool], str]:
    """Rank 0 gives up on rank 1 and goes on, as replays of a CUDA graph do, where no host looks.
    Of two exchanges: whether what this rank got is right; and what it says then."""
    name = dist.new_group().group_name
    given = arguments(rank, [[[0, 1, 2]], [[3, 4, 5]]], torch.float32, True)
    wanted, *_ = ops.direct_dispatch(*given, EXPERTS, name)
    right = []
    with peers_here() as own:
        own.dispatch(*given, EXPERTS, name)
        pool = own.pool_of(name, torch.device("cpu"), 1.0)
        unseen = {"tell": lambda *_: 1, "begin": lambda: None, "tell_of_failure": lambda: None}
        with mock.patch.multiple(pool, **unseen):
            for turn in (0, 1, 0, 1):
                if rank == turn:
                    got, *_ = own.dispatch(*given, EXPERTS, name, layer="mlp", exchange_timeout=1.0)
                    assert torch.equal(got, wanted) or bool(got.isnan().all())
                    right.append(torch.equal(got, wanted))
                dist.barrier()
            with pytest.raises(MoeFxError) as caught:
                pool.check()
    return right, str(caught.value)


def test_a_rank_that_comes_late_gets_what_is_right_or_an_error(interpreting: RankPool) -> None:
    (first, waited), (second, came) = interpreting.run(late)
    assert (first, second) == ([False, False], [True, False])
    assert waited.startswith("Rank 0 waited on its GPU in mlp for rank(s) [1]")
    assert re.match(r"Rank 1 came to mlp of .* after rank\(s\) \[0\] had stopped waiting", came)


def other_step(rank: int) -> str:
    """Ranks that meet in steps made for other numbers of tokens, as replays of CUDA graphs may."""
    from triton.runtime.errors import InterpreterError

    name = dist.new_group().group_name
    given = arguments(rank, [[[0, 1, 2]], [[3, 4, 5]]], torch.float32, True)
    with peers_here() as own:
        own.dispatch(*given, EXPERTS, name)
        pool = own.pool_of(name, torch.device("cpu"), 1.0)
        try:
            with mock.patch.object(pool, "tell", lambda *_: 1 + rank):
                own.dispatch(*given, EXPERTS, name, layer="mlp.3")
            pool.check()
        except (MoeFxError, InterpreterError) as error:
            return str(error)
    return ""


def test_steps_of_other_sizes_are_an_error(interpreting: RankPool) -> None:
    said = interpreting.run(other_step)
    assert any("in mlp.3 with other numbers of tokens" in each for each in said)
