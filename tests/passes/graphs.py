"""Captured MoE graphs for tests of the passes, and what tests do with them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from moe_fx import passes
from moe_fx.capture.capture import capture
from moe_fx.devices import device_for
from moe_fx.options import Options
from moe_fx.passes.evaluate import simulate
from moe_fx.report import Report
from tests.models import FAMILIES

BLOCKS = {
    "qwen3_moe": "Qwen3MoeSparseMoeBlock",
    "deepseek_v2": "DeepseekV2Moe",
    "deepseek_v3": "DeepseekV3MoE",
    "gpt_oss": "GptOssMLP",
    "nemotron_h": "NemotronHMoE",
}
_NEMOTRON = {
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.5,
}


@dataclass(frozen=True)
class Captured:
    """dynamo: the graph as the backend gets it; module: as functional ATen; inputs: of both, the
    parameters among them."""

    dynamo: GraphModule
    module: GraphModule
    inputs: list[Any]

    @property
    def token_inputs(self) -> list[int]:
        """Positions of floating inputs that are no parameters, buffers or numbers."""
        return [
            at
            for at, value in enumerate(self.inputs)
            if isinstance(value, Tensor)
            and value.is_floating_point()
            and value.dim() > 1
            and not isinstance(value, nn.Parameter)
            and not getattr(value, "is_buffer", False)
        ]

    def other_inputs(self, seed: int) -> list[Any]:
        """The same parameters, other tokens."""
        generator = torch.Generator().manual_seed(seed)
        values = list(self.inputs)
        for at in self.token_inputs:
            values[at] = torch.randn(values[at].shape, generator=generator).to(values[at].dtype)
        return values


def block(
    family: str, impl: str = "grouped_mm", dtype: torch.dtype = torch.float32, **config_kwargs: Any
) -> nn.Module:
    """One MoE block of the family, 2 of 8 experts and hidden size 64 unless said otherwise, with
    weights that tell experts apart."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kwargs = {"hidden_size": 64, "num_hidden_layers": 2, "experts_implementation": impl}
    if family == "nemotron_h":
        from transformers import NemotronHConfig as config_class

        kwargs |= _NEMOTRON
    else:
        config_class = FAMILIES[family].config_class
        kwargs |= FAMILIES[family].config_kwargs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config_class(**(kwargs | {"num_hidden_layers": 2} | config_kwargs))
        module = getattr(modeling, BLOCKS[family])(config)
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.is_floating_point():
                    tensor.normal_(std=0.2)
    for buffer in module.buffers():
        buffer.is_buffer = True  # type: ignore[attr-defined]
    return module.to(dtype).eval()


def tokens(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


class _Captured(Exception):
    """Ends the call of a compiled model that is not to run."""


def captured(
    model: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = False,
    execute: bool = True,
    **kwargs: Any,
) -> Captured:
    """The one graph of ``model(*args)``, through Dynamo and `moe_fx.capture.capture`.

    ``execute=False`` keeps the graph from running: for weights that are never to be touched.
    """
    found: list[Captured] = []

    def record(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        traced = capture(module, inputs)

        def run(*values: Any) -> Any:  # these are concrete where ``inputs`` may be symbols
            found.append(Captured(module, traced, list(values)))
            if not execute:
                raise _Captured
            return module.forward(*values)

        return run

    torch._dynamo.reset()
    with torch.no_grad(), contextlib.suppress(_Captured):
        torch.compile(model, backend=record, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    torch._dynamo.reset()
    (only,) = found
    return only


def rewritten(
    module: GraphModule,
    world: int = 1,
    rank: int = 0,
    verify: str = "compile",
    training: bool = False,
    **given: Any,
) -> tuple[GraphModule | None, Report]:
    """(rank's graph, or None if nothing was accepted; what the passes said)."""
    report = Report()
    options = Options(**{"verify": verify, "overlap": "off"} | given)
    inputs = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
    context = passes.Context(
        options=options, report=report, training=training, device=device_for(options, inputs)
    )
    result = passes.run(module, context, passes.for_ranks(world, rank))
    return (None if result is module else result), report


def rewritten_on_ranks(
    module: GraphModule, world: int, verify: str = "compile", **given: Any
) -> tuple[list[GraphModule] | None, Report]:
    """(a graph per rank, or None; what the passes said on the first). given: options."""
    first, report = rewritten(module, world, 0, verify, **given)
    if first is None:
        return None, report
    graphs = [first]
    for rank in range(1, world):
        graph, _ = rewritten(module, world, rank, "off", **given)
        assert graph is not None
        graphs.append(graph)
    return graphs, report


def run_ranks(graphs: Sequence[GraphModule], inputs: Sequence[Sequence[Any]]) -> list[Any]:
    """Outputs by rank; a single graph simply runs."""
    with torch.no_grad():
        if len(graphs) == 1:
            return [graphs[0](*inputs[0])]
        return simulate.run(graphs, inputs)


def relative_error(expected: Any, found: Any) -> float:
    """Largest difference of two outputs (tensors, or sequences of them), NaNs equal to NaNs."""
    if isinstance(expected, (tuple, list)):
        pairs = zip(expected, found, strict=True)
        return max((relative_error(a, b) for a, b in pairs), default=0.0)
    if not isinstance(expected, Tensor):
        return 0.0 if expected == found else float("inf")
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    left, right = expected.detach().double(), found.detach().double()
    if not torch.equal(left.isfinite(), right.isfinite()):
        return float("inf")
    difference = (left - right).nan_to_num(0, 0, 0).abs().max()
    return float(difference / left.nan_to_num(0, 0, 0).abs().max().clamp_min(1e-30))


def error_on_ranks(case: Captured, graphs: Sequence[GraphModule], seed: int = 10) -> float:
    """Of the rewritten graphs, one per rank, against the captured one, each on its own tokens."""
    inputs = [case.other_inputs(seed=seed + rank) for rank in range(len(graphs))]
    with torch.no_grad():
        expected = [case.module(*values) for values in inputs]
    return relative_error(expected, run_ranks(graphs, inputs))


def op_names(module: GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
