"""`MoEPass` in the hooks of npugraph_ex and torchair, for users who compile with those directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import moe_fx
from moe_fx.devices.ascend import npu
from moe_fx.devices.ascend.compile import device_pass
from moe_fx.devices.ascend.ge import compile_ge
from moe_fx.errors import ConfigurationError
from moe_fx.report import Report
from moe_fx.testing import RankError, RankPool
from tests.npu.ranks import case, final_graphs, ge_graphs, moved, prepare

GATHERED = {"strategy": "allgather", "overlap": 2}


def by_npugraph_ex(rank: int, options: dict[str, Any]) -> tuple[list[str], list[str], str]:
    """(ops of the graphs that run, ops lowered to, the pass's key)."""
    prepare()
    torch.set_grad_enabled(False)
    group = dist.new_group(backend="hccl")
    own = moe_fx.MoEPass({"base": "npugraph_ex", "ep_group": group, **options})
    module, inputs = case("qwen3_moe", torch.bfloat16, False)
    given = {k: moved(v) for k, v in inputs(rank, 9).items()}
    hooks = {"post_grad_custom_pre_pass": own, "inplace_pass": False}
    compiled = torch.compile(module.npu(), backend="npugraph_ex", options=hooks, fullgraph=True)
    with final_graphs() as finals:
        compiled(**given)
    nodes = [str(node.target) for graph in finals for node in graph.nodes]
    lowered = [op for report in own.reports for each in report.lowered for op in each.to]
    return nodes, lowered, own.uuid()


def test_npugraph_ex(ranks2: RankPool) -> None:
    results = ranks2.run(by_npugraph_ex, GATHERED)
    for nodes, lowered, _ in results:
        assert {"npu.npu_grouped_matmul", "npu_define.all_to_all_single_npu"} <= set(lowered)
        assert "npu.npu_grouped_matmul.default" in nodes
        assert "moe_fx.agree.default" in nodes
        assert "npugraph_ex.tagged_event_wait.default" in nodes


def test_npugraph_ex_is_not_given_what_it_cannot_capture(ranks2: RankPool) -> None:
    with pytest.raises(RankError, match="npugraph_ex would capture this graph, but it is not"):
        ranks2.run(by_npugraph_ex, {"strategy": "alltoall"})


def by_torchair(rank: int, options: dict[str, Any]) -> tuple[list[str], list[str]]:
    torchair = npu.torchair()
    prepare()
    torch.set_grad_enabled(False)
    group = dist.new_group(backend="hccl")
    own = moe_fx.MoEPass({"base": "torchair", "ep_group": group, **options})
    config = torchair.CompilerConfig()
    config.post_grad_custom_pre_pass = own
    module, inputs = case("qwen3_moe", torch.bfloat16, True)
    given = {k: moved(v) for k, v in inputs(rank, 9).items()}
    backend = torchair.get_npu_backend(compiler_config=config)
    compiled = torch.compile(module.npu(), backend=backend, fullgraph=True)
    with ge_graphs() as ops, pytest.raises(RuntimeError, match="compiled summary"):
        compiled(**given)
    return [op.type for op in ops], [
        op for report in own.reports for each in report.lowered for op in each.to
    ]


@pytest.mark.parametrize("options", [GATHERED, {"strategy": "alltoall"}])
def test_torchair(torchair_ranks: RankPool, options: dict[str, Any]) -> None:
    for kinds, lowered in torchair_ranks.run(by_torchair, options):
        assert kinds.count("MoeInitRoutingV3") == len(
            [op for op in lowered if op == "npu.npu_moe_init_routing_v2"]
        )
        assert "HcomAllToAllV" in kinds and "GroupedMatmul" in kinds


def key(rank: int, options: dict[str, Any]) -> str:
    return moe_fx.MoEPass({"base": "npugraph_ex", "ep_group": dist.group.WORLD, **options}).uuid()


def test_the_key_is_of_the_options(ranks2: RankPool) -> None:
    keys = [ranks2.run(key, options)[0] for options in (GATHERED, GATHERED, {"overlap": 1})]
    assert keys[0] == keys[1] != keys[2]


def refused(rank: int) -> list[str]:
    """What torchair is not given."""
    options = moe_fx.Options(base="torchair", base_options={"debug.no_such": 1})
    own = device_pass(options, Report())
    module = torch.fx.symbolic_trace(torch.nn.ReLU())
    said = []
    for attempt in (
        lambda: compile_ge(module, [], own, options),
        lambda: own.among({"post_grad_custom_pre_pass": print}),
    ):
        try:
            attempt()
        except ConfigurationError as error:
            said.append(str(error))
    return said


def test_a_hook_that_is_taken_and_an_option_that_is_none(torchair_ranks: RankPool) -> None:
    for unknown, taken in torchair_ranks.run(refused):
        assert "has no 'debug.no_such'" in unknown
        assert "moe_fx sets post_grad_custom_pre_pass itself" in taken


def one_after_the_other(rank: int) -> str:
    prepare()
    torch.compile(torch.relu, backend="npugraph_ex")(torch.ones(1).npu())
    try:
        npu.torchair_compiler(npu.torchair().CompilerConfig())
    except ConfigurationError as error:
        return str(error)
    return ""


def test_torchair_after_npugraph_ex_is_refused() -> None:
    with RankPool(1) as pool:
        (said,) = pool.run(one_after_the_other)
    assert "torchair can't be used in a process that has used npugraph_ex" in said
