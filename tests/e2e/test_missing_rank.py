"""A rank that takes part no more is named by the others, in time: in forward and in backward, and
where a model generates. Nobody hangs."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_fx.errors import MoeFxError, RankMissing, RanksDiffer
from moe_fx.plan import ExchangePlan
from moe_fx.ranks.agree import agree_once
from moe_fx.testing import RankPool
from moe_fx.weights.shard import shard_experts
from tests.e2e.ranks import expert_block
from tests.models import build

WAIT = 2.0
"""Seconds, for a rank that never comes."""
LONG = 40.0
"""Seconds, where nobody is to wait so long."""
LAYER = "model.layers.1.mlp (model.py:7)"


class Model(nn.Module):
    """So that the layer has a path."""

    def __init__(self) -> None:
        super().__init__()
        self.block = expert_block()

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        return out if isinstance(out, Tensor) else out[0]


def said(error: MoeFxError) -> str:
    return f"{type(error).__name__}: {error}"


def step(compiled: Any, x: Tensor, backward: bool) -> None:
    out = compiled(x)
    if backward:
        out.square().sum().backward()


def left_alone(rank: int, backward: bool, **given: Any) -> str:
    """Two ranks make a step; then rank 1 makes the forward of another, or none, and stops there."""
    group = dist.new_group()
    options = {"ep_group": group, "exchange_timeout": WAIT, "strict": True, **given}
    torch.manual_seed(rank)
    compiled = torch.compile(Model(), backend="moe_fx", options=options)
    x = torch.rand(1, 12, 64)
    with torch.set_grad_enabled(backward):
        step(compiled, x, backward)
        if rank == 1:
            if backward:
                compiled(x)
            return ""
        try:
            step(compiled, x, backward)
        except RankMissing as error:
            return said(error)
    return "no error"


def check(message: str, what: str, backward: bool) -> None:
    assert message.startswith("RankMissing: Rank 0 waited "), message
    layer = r"of block \(" + "[^)]*modeling_qwen3_moe.py"
    assert re.search(what + " " + layer, message), message
    assert (", backward)" in message) == backward, message
    assert "for rank(s) [1]" in message and "did not come to it" in message
    assert "synced_gpus=True" in message and f"exchange_timeout (it is {WAIT:g} s here)" in message


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("given", "waited_for"),
    [
        ({"base": "eager", "overlap": "off"}, ("counts", "rows")),
        ({"base": "aot_eager", "overlap": 4}, ("counts", "rows")),
        ({"base": "aot_eager", "strategy": "allgather"}, ("sizes", "rows")),
        ({"base": "aot_eager", "strategy": "direct"}, ("tokens", "tokens")),
        ({"base": "aot_eager", "strategy": "direct", "lower": "cuda"}, ("tokens", "tokens")),
    ],
    ids=["eager", "overlapped", "allgather", "direct", "direct, fused"],
)
def test_a_rank_that_stops_is_named_by_the_other(
    ranks2: RankPool, given: dict[str, Any], waited_for: tuple[str, str], backward: bool
) -> None:
    message, _ = ranks2.run(_left_alone, backward, given)
    check(message, waited_for[backward], backward)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_under_inductor_too(ranks2: RankPool, backward: bool) -> None:
    message, _ = ranks2.run(_left_alone, backward, {"overlap": 2}, timeout=300)
    check(message, "rows" if backward else "counts", backward)


def _left_alone(rank: int, backward: bool, given: dict[str, Any]) -> str:
    return left_alone(rank, backward, **given)


# -- who is missing --------------------------------------------------------------------------------


def exchange(group: dist.ProcessGroup, layer: str = LAYER, timeout: float = WAIT) -> None:
    counts = torch.ones(2 * group.size(), dtype=torch.int64)
    waiting = {"layer": layer, "exchange_timeout": timeout}
    torch.ops.moe_fx.exchange_counts(counts, group.group_name, **waiting)


def exchange_except(
    rank: int, absent: tuple[int, ...], group: dist.ProcessGroup | None = None
) -> str:
    group = group or dist.new_group()
    exchange(group)
    if rank in absent:
        return ""
    try:
        exchange(group)
    except RankMissing as error:
        return said(error)
    return "no error"


def test_all_that_wait_name_all_that_are_missing(ranks4: RankPool) -> None:
    for rank, message in enumerate(ranks4.run(exchange_except, (1, 3))):
        if rank in (0, 2):
            assert f"Rank {rank} waited" in message
            assert f"in exchange 2 (counts of {LAYER})" in message
            assert "for rank(s) [1, 3], which did not come to it. Every rank" in message


def exchange_in_part(rank: int, absent: int) -> str:
    """A sub-group, whose ranks have other numbers in all."""
    group = dist.new_group([1, 2, 3])
    if rank == 0:
        return ""
    return exchange_except(rank, (absent,), group)


def test_numbers_are_those_of_the_group_and_of_all(ranks4: RankPool) -> None:
    for message in ranks4.run(exchange_in_part, 3)[1:3]:
        assert "for rank(s) [2] (of all ranks: [3]), which did not come to it" in message


def late_on(rank: int, late: int) -> str:
    """Longer than a rank waits before it says so, and not too long."""
    group = dist.new_group()
    exchange(group)
    if rank == late:
        dist.group.WORLD.get_group_store().wait([f"late/{group.group_name}"])
    elif rank == 0:
        key = f"late/{group.group_name}"
        store = dist.group.WORLD.get_group_store()
        threading.Timer(1.2 * WAIT / 4, store.set, (key, "now")).start()
    exchange(group, timeout=WAIT * 4)
    exchange(group)
    return "done"


def test_a_rank_that_is_late_is_waited_for(ranks2: RankPool) -> None:
    assert ranks2.run(late_on, 1) == ["done", "done"]


# -- a rank that is gone ---------------------------------------------------------------------------


def serve(rank: int, path: Path, told: Connection) -> None:
    store = dist.FileStore(str(path / "store"), 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    group = dist.group.WORLD
    assert group is not None
    exchange(group)
    if rank == 2:
        os._exit(3)
    try:
        exchange(group, timeout=LONG)
    except RankMissing as error:
        told.send(said(error))


def test_a_rank_that_died_is_named_at_once_and_the_others_can_end(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(3)]
    processes = [
        context.Process(target=serve, args=(rank, tmp_path, pipes[rank][1])) for rank in range(3)
    ]
    for process in processes:
        process.start()
    try:
        for rank in range(2):
            assert pipes[rank][0].poll(120), f"rank {rank} says nothing"
            message = pipes[rank][0].recv()
            assert f"Rank {rank} waited" in message and "for rank(s) [2]" in message
            assert "The link reports: " in message
        for process in processes:
            process.join(60)
            assert process.exitcode is not None
    finally:
        for process in processes:
            process.kill()


# -- other graphs ----------------------------------------------------------------------------------


def diverge(rank: int) -> str:
    """Both agree on a graph. Then one compiles another, while the other runs the first again."""
    group = dist.new_group()
    plans = [ExchangePlan("alltoall", 4, 2, group.group_name, 2, rank)]

    def graph() -> None:
        exchange(group, timeout=8.0)

    agree_once(graph, [group.group_name], plans, False, 8.0)()
    mine = plans if rank == 0 else plans * 2
    again = agree_once(graph, [group.group_name], mine, False, 8.0)
    try:
        again()
    except RanksDiffer as error:
        return said(error)
    return "no error"


def test_a_rank_in_an_exchange_and_one_that_has_compiled_another_graph_are_told(
    ranks2: RankPool,
) -> None:
    exchanging, agreeing = ranks2.run(diverge)
    graph = "an agreement, as it has compiled MoE graph 2 (inference; alltoall, of 2)"
    assert f"rank 0 waits in exchange 2 (counts of {LAYER}), and rank 1" in exchanging
    assert f"in {graph}" in exchanging
    assert f"rank 1 waits in {graph}, and rank 0" in agreeing
    assert f"in exchange 2 (counts of {LAYER})" in agreeing


# -- generate --------------------------------------------------------------------------------------


def generate(rank: int, synced: bool) -> tuple[list[int], list[int], str]:
    """(tokens alone, tokens on two ranks, the error), of prompts and answers of other lengths."""
    model, _ = build("qwen3_moe", "grouped_mm", torch.float32)
    ids = torch.arange(3 + 4 * rank).unsqueeze(0) + 5
    how = {"max_new_tokens": 6 - 3 * rank, "do_sample": False, "pad_token_id": 0}
    how |= {"eos_token_id": -1}
    alone = model.generate(ids, **how)[0].tolist()
    group = dist.group.WORLD if synced else dist.new_group()
    shard_experts(model, group)
    options = {"base": "eager", "exchange_timeout": LONG if synced else WAIT}
    model.forward = torch.compile(model.forward, backend="moe_fx", dynamic=True, options=options)
    try:
        return alone, model.generate(ids, synced_gpus=synced, **how)[0].tolist(), ""
    except RankMissing as error:
        return alone, [], said(error)


def test_ranks_with_other_prompts_generate_what_each_would_alone(ranks2: RankPool) -> None:
    for alone, together, error in ranks2.run(generate, True):
        assert together == alone and not error


def test_without_synced_gpus_the_rank_that_goes_on_is_told_to_use_it(ranks2: RankPool) -> None:
    (_, _, error), (alone, together, fine) = ranks2.run(generate, False)
    assert together == alone and not fine
    assert "of model.layers.0.mlp (" in error and "for rank(s) [1]" in error
    assert "synced_gpus=True" in error
