"""The lock-step simulator gives what real ranks give, and an error where they would hang."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Graph, GraphModule

from moe_fx.passes.evaluate.simulate import RanksDisagree, run
from moe_fx.testing import RankPool

ops = torch.ops.moe_fx
aten = torch.ops.aten
functional = torch.ops._c10d_functional

LOCAL_EXPERTS, FEATURES = 2, 3


def graph_of_a_layer(group: str, world: int) -> GraphModule:
    """(rows by expert, counts, weight shard) -> (rows back from their experts, rows as they
    arrived, counts received, gathered weights)."""
    graph = Graph()
    call = graph.call_function
    rows, counts, shard = (graph.placeholder(name) for name in ("rows", "counts", "shard"))
    received = call(ops.exchange_counts.default, (counts, group))
    sizes = call(ops.split_sizes.default, (counts, received))
    sizes = call(aten.select.int, (sizes, 0, 0))
    send, recv = (call(aten.select.int, (sizes, 0, side)) for side in (0, 1))
    handle = call(ops.all_to_all.default, (rows, send, recv, group))
    arrived = call(ops.wait.default, (handle, rows, send, recv, group))
    regrouped = call(ops.regroup.default, (arrived, received))
    grouped, row_map = (call(operator.getitem, (regrouped, i)) for i in (0, 1))
    offsets = call(aten.cumsum.default, (call(aten.sum.dim_IntList, (received, [0])), 0))
    mixed = call(ops.grouped_mm.default, (grouped, shard, offsets))
    num_rows = call(aten.sym_size.int, (arrived, 0))
    by_source = call(ops.unpermute.default, (mixed, row_map, None, [num_rows, FEATURES]))
    handle = call(ops.all_to_all.default, (by_source, recv, send, group))
    back = call(ops.wait.default, (handle, by_source, recv, send, group))
    gathered = call(functional.all_gather_into_tensor.default, (shard, world, group))
    full = call(functional.wait_tensor.default, (gathered,))
    graph.output((back, arrived, received, full))
    graph.lint()
    return GraphModule({}, graph)


def layer_inputs(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Other counts on every rank; one expert without rows; rank 1 with none at all."""
    generator = torch.Generator().manual_seed(rank)
    counts = torch.randint(0, 4, (world * LOCAL_EXPERTS,), generator=generator)
    counts[1] = 0
    if rank == 1:
        counts.zero_()
    rows = torch.randn(int(counts.sum()), FEATURES, generator=generator, dtype=torch.float64)
    shard = torch.randn(LOCAL_EXPERTS, FEATURES, FEATURES, generator=generator, dtype=torch.float64)
    return rows, counts, shard


def run_layer(rank: int) -> tuple[Tensor, ...]:
    group, world = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    results: tuple[Tensor, ...] = graph_of_a_layer(group.group_name, world)(
        *layer_inputs(rank, world)
    )
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_the_simulator_gives_what_real_ranks_give(
    request: pytest.FixtureRequest, world: int
) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{world}")
    real = pool.run(run_layer)
    inputs = [layer_inputs(rank, world) for rank in range(world)]
    simulated = run([graph_of_a_layer("none", world)] * world, inputs)
    for rank in range(world):
        for got, expected in zip(simulated[rank], real[rank], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, msg=f"rank {rank}")


def test_the_simulated_layer_multiplies_each_row_by_its_expert() -> None:
    """Against no ranks at all: the layer is a loop over experts."""
    world = 4
    inputs = [layer_inputs(rank, world) for rank in range(world)]
    weights = torch.cat([shard for _, _, shard in inputs])
    results = run([graph_of_a_layer("none", world)] * world, inputs)
    for (rows, counts, _), (back, *_) in zip(inputs, results, strict=True):
        experts = torch.repeat_interleave(torch.arange(world * LOCAL_EXPERTS), counts)
        torch.testing.assert_close(back, torch.einsum("rd,rdn->rn", rows, weights[experts]))


# -- what would hang -------------------------------------------------------------------------------


def graph_of(*collectives: str) -> GraphModule:
    """counts -> what the last of the collectives gives (or the counts, with none)."""
    graph = Graph()
    counts = graph.placeholder("counts")
    result = counts
    for name in collectives:
        if name == "all_gather":
            result = graph.call_function(
                functional.all_gather_into_tensor.default, (counts, 2, "none")
            )
        else:
            result = graph.call_function(ops.exchange_counts.default, (counts, "none"))
    graph.output(result)
    return GraphModule({}, graph)


COUNTS = [[torch.tensor([1, 2])], [torch.tensor([3, 4])]]


def test_ranks_at_different_collectives_disagree() -> None:
    with pytest.raises(RanksDisagree, match=r"\['exchange_counts', 'all_gather'\]"):
        run([graph_of("exchange_counts"), graph_of("all_gather")], COUNTS)


def test_ranks_that_part_after_a_common_collective_disagree() -> None:
    modules = [graph_of("all_gather", "all_gather"), graph_of("all_gather", "exchange_counts")]
    with pytest.raises(RanksDisagree, match=r"\['all_gather', 'exchange_counts'\]"):
        run(modules, COUNTS)


def test_a_rank_that_ends_while_another_still_exchanges_disagrees() -> None:
    with pytest.raises(RanksDisagree, match=r"'all_gather', 'the end'"):
        run([graph_of(), graph_of("all_gather")], COUNTS)


def test_a_rank_that_expects_other_rows_than_are_sent_disagrees() -> None:
    graph = Graph()
    rows, send, recv = (graph.placeholder(name) for name in ("rows", "send", "recv"))
    handle = graph.call_function(ops.all_to_all.default, (rows, send, recv, "none"))
    graph.output(graph.call_function(ops.wait.default, (handle, rows, send, recv, "none")))
    module = GraphModule({}, graph)
    right = [torch.zeros(2, 1), torch.tensor([1, 1]), torch.tensor([1, 1])]
    wrong = [torch.zeros(2, 1), torch.tensor([1, 1]), torch.tensor([2, 1])]
    received = run([module] * 2, [right, right])
    assert [tuple(rows.shape) for rows in received] == [(2, 1), (2, 1)]
    with pytest.raises(RanksDisagree, match=r"rank 1 expects \[2, 1\] rows"):
        run([module] * 2, [right, wrong])
