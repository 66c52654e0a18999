"""Masks of foreign experts' rows, as transformers 5.17 puts them around its grouped matmuls, and
graphs captured for another device than the host, where they are verified."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule, Node

from moe_fx.graph.nodes import is_grouped_matmul
from moe_fx.passes.recognise.recognise import recognise_by_value
from tests.passes.graphs import (
    Captured,
    block,
    captured,
    error_on_ranks,
    rewritten_on_ranks,
    tokens,
)

aten = torch.ops.aten
EXPERTS = 8


def only(module: GraphModule, target: object) -> Node:
    (node,) = module.graph.find_nodes(op="call_function", target=target)
    return node


def masked(limit: int) -> Captured:
    """A block whose rows of experts from ``limit`` on are zero before and after the experts."""
    case = captured(block("qwen3_moe"), tokens(1, 13, 64))
    graph = case.module.graph
    sort = only(case.module, aten.sort.default)
    (ids,) = (user for user in sort.users if user.args == (sort, 0))
    products = [node for node in graph.nodes if is_grouped_matmul(node)]
    first, last = products[0], products[-1]
    with graph.inserting_before(first):
        foreign = graph.call_function(aten.ge.Scalar, (ids, limit))
        mask = graph.call_function(aten.unsqueeze.default, (foreign, -1))
        rows = first.args[0]
        assert isinstance(rows, Node)
        before = graph.call_function(aten.masked_fill.Scalar, (rows, mask, 0.0))
    first.replace_input_with(rows, before)
    with graph.inserting_after(last):
        after = graph.call_function(aten.masked_fill.Scalar, (last, mask, 0.0))
    last.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    foreign.meta["val"] = ids.meta["val"] >= limit
    mask.meta["val"] = foreign.meta["val"].unsqueeze(-1)
    before.meta, after.meta = dict(rows.meta), dict(last.meta)
    case.module.recompile()
    return case


@pytest.mark.parametrize("limit", [EXPERTS - 1, EXPERTS, EXPERTS + 1])
def test_rows_are_masked_or_there_is_nothing_to_mask(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = masked(limit)
    by_value = []

    def reading(*args: object) -> object:
        by_value.append(args)
        return recognise_by_value(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("moe_fx.passes.recognise.recognise.recognise_by_value", reading)
    graphs, report = rewritten_on_ranks(case.module, 2)
    if limit >= EXPERTS:
        assert graphs is not None, report.declined
        assert not by_value
    if graphs is None:
        assert report.declined[0].reason
        return
    assert error_on_ranks(case, graphs) <= 1e-5


@pytest.mark.parametrize("impl", ["grouped_mm", "batched_mm"])
def test_a_graph_of_another_device_is_verified_on_the_host(impl: str) -> None:
    case = captured(block("qwen3_moe", impl), tokens(1, 13, 64))
    there = torch.device("cuda", 0)
    moved = 0
    for node in case.module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": there}
            moved += 1
        elif node.target is aten.histc.default:  # of integers, which a host's histc does not take
            (cast,) = node.all_input_nodes
            cast.kwargs = {"dtype": torch.int32}
            cast.meta["val"], node.meta["val"] = (n.meta["val"].int() for n in (cast, node))
    assert moved or impl == "batched_mm"
    _, report = rewritten_on_ranks(case.module, 2)
    assert [region.verified for region in report.regions] == [True]
