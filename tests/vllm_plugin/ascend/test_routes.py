"""vLLM-Ascend's own compile functions run the pass, in both routes, on graphs with its opaque op.

Its compiler and its pass manager are real, its layers are not: nothing here computes anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch._inductor.config
from torch.fx import GraphModule, Node
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.config import CompilationConfig
from vllm.config.utils import Range

from moe_fx.devices.ascend import constraints
from moe_fx.devices.ascend.happens_before import races
from moe_fx.integrations import vllm_ascend
from moe_fx.integrations.vllm.vllm_pass import VllmMoEPass
from moe_fx.testing import RankPool
from tests.npu.ranks import final_graphs, on_device, prepare
from tests.vllm_plugin import layers

pytestmark = pytest.mark.vllm
RANGE = Range(start=1, end=64)
OWN_PASSES = ("fuse_norm_quant", "fuse_qknorm_rope", "fuse_muls_add", "fuse_allreduce_rms")


class Compiled(Exception):
    """What comes after is not of interest: there are no kernels."""


@dataclass
class Result:
    nodes: list[str]
    violated: list[str]
    races: list[str]
    plans: list[str]
    declined: list[str]
    lowered: set[str]


def by_vllm_ascend(
    group: Any, whole: bool, options: dict[str, Any], different: bool, tokens: int
) -> Result:
    prepare()
    vllm_ascend.register()
    from vllm_ascend.compilation import compiler_interface
    from vllm_ascend.compilation.graph_fusion_pass_manager import GraphFusionPassManager
    from vllm_ascend.utils import COMPILATION_PASS_KEY

    own = VllmMoEPass(options)
    ours = CompilationConfig(inductor_compile_config={"post_grad_custom_post_pass": own})
    passes = SimpleNamespace(enable_sp=False)  # which this vLLM's has no more
    config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(**{**vars(ours), "pass_config": passes}),
        additional_config={"ascend_compilation_config": dict.fromkeys(OWN_PASSES, False)},
        model_config=None,
        device_config=None,
    )
    ascend = SimpleNamespace(enable_npugraph_ex=whole, enable_static_kernel=False)
    compiler = compiler_interface.AscendCompiler()
    compiler.vllm_config = config
    manager = GraphFusionPassManager()
    manager.configure(config)
    graphs: list[Any] = []

    def backend(module: GraphModule, inputs: list[Any]) -> Any:
        with _seen(GraphFusionPassManager, graphs), pass_context(RANGE):
            compiler.compile(module, inputs, {COMPILATION_PASS_KEY: manager}, RANGE, "key")
        raise Compiled

    x, logits = (each.bfloat16().npu() for each in layers.tokens(0, tokens))
    for each in (x, logits):
        torch._dynamo.mark_dynamic(each, 0)
    run = torch.compile(layers.routed_and_shared, backend=backend, fullgraph=True)
    with (
        torch.no_grad(),
        layers.running(layers.runner(0, 2, different), group, not different),
        mock.patch.object(
            compiler_interface,
            "get_ascend_config",
            lambda: SimpleNamespace(ascend_compilation_config=ascend),
        ),
        torch._inductor.config.patch(enable_auto_functionalized_v2=False),
        final_graphs() as finals,
        pytest.raises(Exception, match="Compiled"),
    ):
        run(x, logits)
    [graph] = finals if whole else [module.graph for module in graphs]
    return Result(
        [str(node.target) for node in graph.nodes if node.op == "call_function"],
        [text for node in graph.nodes for text in _violations(node)],
        [str(race) for race in races(graph)],
        [plan.strategy for report in own.reports for plan in report.plans],
        [declined.reason for report in own.reports for declined in report.declined],
        {op for report in own.reports for each in report.lowered for op in each.to},
    )


@contextmanager
def _seen(manager: Any, graphs: list[Any]) -> Iterator[None]:
    before = manager.__call__

    def call(self: Any, graph: Any) -> Any:
        graphs.append(before(self, graph))
        return graphs[-1]

    with mock.patch.object(manager, "__call__", call):
        yield


def _violations(node: Node) -> list[str]:
    name = str(node.target).removesuffix(".default")
    if node.op != "call_function" or name not in constraints.checked_ops():
        return []
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return constraints.violations(name, args, kwargs)


@pytest.mark.parametrize(
    "whole, different, strategy, overlap",
    [
        (False, True, "alltoall", 2),
        (False, False, "replicated", 1),
        (True, True, "allgather", 1),
        (True, False, "replicated", 1),
    ],
)
def test_both_routes_open_layers_for_npus(
    ranks2: RankPool, whole: bool, different: bool, strategy: str, overlap: int
) -> None:
    options = {"strategy": strategy, "overlap": overlap, "strict": True}
    result = on_device(ranks2, by_vllm_ascend, whole, options, different, 7)
    assert result.declined == []
    assert result.plans == [strategy]
    assert result.violated == []
    assert result.races == []
    assert {"moe_fx_vllm.route.default", "moe_fx_vllm.experts.default"} <= set(result.nodes)
    assert "moe_fx_vllm.shared.default" in result.nodes
    assert not any("moe_forward" in node for node in result.nodes)
    assert {op for op in result.lowered if op.startswith("npu.")} != set()
    if whole and strategy == "allgather":
        assert "npugraph_ex.tagged_event_wait.default" in result.nodes


def test_what_waits_for_the_device_is_not_captured(ranks2: RankPool) -> None:
    result = on_device(ranks2, by_vllm_ascend, True, {"strategy": "alltoall"}, True, 7)
    assert "waits for the device, and this graph will be captured" in result.declined[0]
    assert any("moe_forward_shared" in node for node in result.nodes)


@pytest.mark.parametrize("whole", [False, True])
def test_ranges_of_few_tokens_are_left_alone(ranks2: RankPool, whole: bool) -> None:
    options = {"strategy": "replicated", "min_tokens": RANGE.end + 1}
    result = on_device(ranks2, by_vllm_ascend, whole, options, False, 7)
    assert (result.plans, result.declined) == ([], [])
    assert any("moe_forward_shared" in node for node in result.nodes)


def test_auto_takes_what_can_be_captured(ranks2: RankPool) -> None:
    assert on_device(ranks2, by_vllm_ascend, True, {}, True, 7).plans == ["allgather"]
    assert on_device(ranks2, by_vllm_ascend, False, {}, True, 7).plans == ["alltoall"]
