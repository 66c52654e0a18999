"""Bodies of activation checkpoints, opened for the passes and closed again, on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import moe_fx
from moe_fx.capture.bodies import open_bodies, path_of
from tests.e2e.ranks import _RECORDED, expert_block, relative_error

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


class Residual(nn.Module):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.moe, self.reentrant = expert_block(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.whole, x.tanh(), use_reentrant=self.reentrant)
        return out.cos()

    def whole(self, x: Tensor) -> Tensor:
        return x + self.moe(x)


def targets(module: GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_rewritten_layer_is_in_the_body(reentrant: bool) -> None:
    torch._dynamo.reset()
    _RECORDED.clear()
    reports: list[moe_fx.Report] = []
    options = {"base": "recording", "strict": True, "on_report": reports.append}
    model, x = Residual(reentrant), torch.rand(1, 7, 64)
    expected = model(x)
    found = torch.compile(model, backend="moe_fx", fullgraph=True, options=options)(x)
    assert relative_error(found.detach(), expected.detach()) <= 1e-5
    (module,) = _RECORDED
    (call,) = (node for node in module.graph.nodes if node.target is CHECKPOINT)
    body = module.get_submodule(str(call.args[0].target))
    assert isinstance(body, GraphModule)
    assert torch.ops.moe_fx.permute.default in targets(body)
    assert torch.ops.moe_fx.remember.default in targets(body)
    assert not any("moe_fx" in str(target) for target in targets(module))
    outside = str(targets(module))
    assert "tanh" in outside and "cos" in outside
    (region,) = reports[0].regions
    assert "modeling_qwen3_moe.py:" in region.source


def test_explain_looks_into_checkpoints() -> None:
    report = moe_fx.explain(Residual(), torch.rand(1, 7, 64), ranks=2)
    assert len(report.regions) == 1
    assert report.declined == []


def graph_of(function: Callable[..., Any], x: Tensor) -> GraphModule:
    graphs: list[GraphModule] = []

    def keep(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(x)
    return graphs[0]


def test_nodes_of_an_opened_body_are_noted() -> None:
    def inner(x: Tensor) -> Tensor:
        return x.sin()

    def outer(x: Tensor) -> Tensor:
        return checkpoint(inner, x.cos(), use_reentrant=False).exp()

    def function(x: Tensor) -> Tensor:
        return checkpoint(outer, x, use_reentrant=False).neg()

    x = torch.rand(3)
    opened, bodies = open_bodies(graph_of(function, x))
    assert len(bodies) == 2
    depth = {str(n.target): len(path_of(n)) for n in opened.graph.nodes if n.op == "call_method"}
    assert depth == {"cos": 1, "sin": 2, "exp": 1, "neg": 0}
    (result,) = opened(x)
    assert torch.equal(result, function(x))


def test_a_graph_without_checkpoints_is_not_copied() -> None:
    module = graph_of(lambda x: x.sin(), torch.rand(3))
    assert open_bodies(module) == (module, {})


def test_remember_passes_opcheck() -> None:
    opcheck(torch.ops.moe_fx.remember, (torch.tensor([[1, 0], [2, 1]]),))


def test_a_node_that_is_nowhere_noted_is_outside() -> None:
    graph = torch.fx.Graph()
    node: Node = graph.call_function(torch.ops.aten.ones.default, ([2],))
    assert path_of(node) == ()
