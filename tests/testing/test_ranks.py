"""RankPool: results in rank order, and no failure of a rank that hangs the caller."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from moe_fx.testing import RankError, RankPool, run_ranks


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks


def describe(rank: int, *args: object) -> tuple[int, int, int, int, tuple[object, ...]]:
    return rank, dist.get_rank(), dist.get_world_size(), torch.get_num_threads(), args


def total(rank: int, values: torch.Tensor) -> torch.Tensor:
    mine = values * (rank + 1)
    dist.all_reduce(mine)
    return mine


def fail_on(rank: int, failing: int) -> None:
    if rank == failing:
        raise ValueError(f"rank {rank} gives up")
    dist.barrier()


def stuck_on(rank: int, stuck: int) -> int:
    if rank == stuck:
        threading.Event().wait(600)
    return rank


def die_on(rank: int, dying: int) -> int:
    if rank == dying:
        os.abort()
    return rank


def process_id(rank: int) -> int:
    return os.getpid()


def fail_in_two_ways(rank: int) -> object:
    if rank == 0:
        raise ValueError("rank 0 gives up")
    return lambda: rank  # a result that cannot travel


def draw(rank: int) -> torch.Tensor:
    return torch.rand(3)


_compilations: list[torch.fx.GraphModule] = []


def _note(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
    _compilations.append(module)
    return module


@torch.compile(backend=_note)
def _double(x: torch.Tensor) -> torch.Tensor:
    return x + x


def compilations(rank: int) -> int:
    """How often this process has compiled ``_double`` so far."""
    _double(torch.ones(2))
    return len(_compilations)


def test_results_come_in_rank_order(pool: RankPool) -> None:
    assert pool.run(describe, "a", 3) == [(0, 0, 2, 1, ("a", 3)), (1, 1, 2, 1, ("a", 3))]


def test_collectives_and_tensors(pool: RankPool) -> None:
    values = torch.arange(4.0)
    for result in pool.run(total, values):
        torch.testing.assert_close(result, values * 3, rtol=0, atol=0)


def test_processes_persist_between_runs(pool: RankPool) -> None:
    first = pool.run(process_id)
    assert len(set(first)) == 2
    assert pool.run(process_id) == first


def test_each_run_starts_clean(pool: RankPool) -> None:
    assert pool.run(compilations) == [1, 1]
    assert pool.run(compilations) == [2, 2]
    first, again = pool.run(draw), pool.run(draw)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_failure_while_the_other_rank_waits_in_a_collective(pool: RankPool) -> None:
    before = pool.run(process_id)
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.run(fail_on, 1, timeout=60)
    assert time.monotonic() - start < 30
    assert set(caught.value.failed) == {1}
    assert "ValueError: rank 1 gives up" in caught.value.failed[1]
    assert set(caught.value.silent) == {0}
    assert "in fail_on" in caught.value.silent[0]
    assert "of 2 ranks, [1] failed; [0] had not answered" in str(caught.value)
    assert not set(pool.run(process_id)) & set(before), "the pool restarts"


def test_every_failing_rank_is_reported(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"of 2 ranks, \[0, 1\] failed") as caught:
        pool.run(fail_in_two_ways)
    assert not caught.value.silent
    assert "ValueError: rank 0 gives up" in caught.value.failed[0]
    assert "fail_in_two_ways.<locals>.<lambda>" in caught.value.failed[1]


def test_timeout_names_the_ranks_and_where_they_stand(pool: RankPool) -> None:
    pool.run(process_id)  # they stand in what they are given, not in their imports
    with pytest.raises(RankError, match=r"timed out: of 2 ranks, \[1\] had not") as caught:
        pool.run(stuck_on, 1, timeout=1)
    assert not caught.value.failed
    assert set(caught.value.silent) == {1}
    assert "in stuck_on" in caught.value.silent[1]
    assert "rank 1 stood at:" in str(caught.value)


def test_a_rank_that_dies_is_reported() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(1, die_on, 0)
    assert set(caught.value.failed) == {0}
    assert "exit code -6" in caught.value.failed[0]
    assert "in die_on" in caught.value.failed[0]


def test_run_ranks() -> None:
    assert run_ranks(1, describe) == [(0, 0, 1, 1, ())]


def test_world_size_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RankPool(0)
