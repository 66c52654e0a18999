"""What runs on a rank in the end-to-end tests: an unmodified model, eager against compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_fx
from moe_fx.integrations.transformers import sharded_loading
from moe_fx.weights.shard import shard_experts
from tests.models import build, token_ids

_RECORDED: list[GraphModule] = []


@register_backend(name="recording")
def recording(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A base compiler that runs the rewritten graph as it is, and keeps it for inspection."""
    _RECORDED.append(module)
    return module.forward


@dataclass
class Comparison:
    """Eager against compiled, on one rank; errors are relative to the largest eager value."""

    error: float
    graphs: int
    ops: list[str]
    report: dict[str, Any]
    gradient_errors: dict[str, float] = field(default_factory=dict)


def compare(
    rank: int,
    family: str,
    impl: str,
    dtype: torch.dtype,
    program: str,
    *,
    base: str = "recording",
    gradients: bool = False,
    lengths: tuple[int, ...] = (9, 5, 6, 7),
    batch: int = 1,
    **given: Any,
) -> Comparison:
    """One model, ``program`` "replicated" or "gathered", other tokens (and number) on each rank.
    given: options."""
    torch.set_grad_enabled(gradients)
    model, config = build(family, impl, dtype)
    ids = token_ids(config, batch, lengths[rank], seed=rank)
    expected = model(input_ids=ids, use_cache=False).logits
    wanted = _gradients(model, expected) if gradients else {}
    group = dist.group.WORLD
    assert group is not None
    if program == "gathered":
        shard_experts(model, group)
    reports: list[moe_fx.Report] = []
    options: dict[str, Any] = {"base": base, "on_report": reports.append, **given}
    if program == "replicated":
        options["ep_group"] = group
    _RECORDED.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="moe_fx", fullgraph=True, options=options)
    found = compiled(input_ids=ids, use_cache=False).logits
    comparison = Comparison(
        error=relative_error(found, expected),
        graphs=len(reports),
        ops=[str(n.target) for g in _RECORDED for n in g.graph.nodes if n.op == "call_function"],
        report=reports[0].to_dict(),
    )
    if gradients:
        comparison.gradient_errors = _compare_gradients(model, wanted, _gradients(model, found))
    torch.set_grad_enabled(True)
    return comparison


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


def _gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that weighs every logit differently, summed over the ranks."""
    model.zero_grad(set_to_none=True)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float32).view_as(logits)
    (logits.float() * weights).sum().backward()
    summed = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        gradient = gradient.detach().clone()
        if isinstance(gradient, DTensor):
            gradient = gradient.to_local()
        else:
            dist.all_reduce(gradient)
        summed[name] = gradient
    return summed


def _compare_gradients(
    model: nn.Module, wanted: dict[str, Tensor], found: dict[str, Tensor]
) -> dict[str, float]:
    """Per parameter; a shard is compared with its block of the whole gradient."""
    rank, world = dist.get_rank(), dist.get_world_size()
    errors = {}
    for name, gradient in found.items():
        whole = wanted[name]
        if gradient.shape != whole.shape:
            whole = whole.chunk(world)[rank]
        errors[name] = relative_error(gradient, whole)
    assert found.keys() == wanted.keys()
    return errors


def expert_block(num_experts: int = 8, top_k: int = 2, impl: str = "grouped_mm") -> nn.Module:
    """One Qwen3-MoE sparse block, hidden size 64, with seeded weights."""
    config = Qwen3MoeConfig(
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        experts_implementation=impl,
    )
    block = Qwen3MoeSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return block.eval()


def only_expert(block: nn.Module, expert: int) -> None:
    """Make the router send every token with positive features to ``expert``."""
    with torch.no_grad():
        weight = block.get_parameter("gate.weight")
        weight.zero_()
        weight[expert] = 1.0


def block_errors(
    rank: int,
    token_counts: tuple[tuple[int, ...], ...],
    *,
    impl: str = "grouped_mm",
    top_k: int = 2,
    favourite: int | None = None,
    unbacked: bool = False,
    dynamic: bool | None = None,
    base: str = "recording",
    gathered: bool = False,
    fullgraph: bool = True,
) -> tuple[list[float], int]:
    """(error per step, graphs compiled): at step ``s`` this rank has ``token_counts[s][rank]``
    tokens. ``favourite``: all tokens go to that expert."""
    block = expert_block(top_k=top_k, impl=impl)
    if favourite is not None:
        only_expert(block, favourite)
    inputs = [torch.rand(1, counts[rank], 64) + 0.1 for counts in token_counts]
    with torch.no_grad():
        expected = [block(x) for x in inputs]
    group = dist.group.WORLD
    assert group is not None
    if gathered:
        shard_experts(block, group)
    reports: list[moe_fx.Report] = []
    options = {"ep_group": group, "base": base, "on_report": reports.append, "strict": True}
    compiled = torch.compile(
        block, backend="moe_fx", fullgraph=fullgraph, dynamic=dynamic, options=options
    )
    errors = []
    for x, want in zip(inputs, expected, strict=True):
        if unbacked:
            torch._dynamo.decorators.mark_unbacked(x, 1)
        with torch.no_grad():
            found = compiled(x)
        errors.append(relative_error(found, want) if want.numel() else 0.0)
        assert found.shape == want.shape
    return errors, len(reports)


def model_graphs(rank: int, family: str, lengths: tuple[int, ...]) -> tuple[list[float], int, int]:
    """(error per sequence length, graphs compiled by moe_fx, graphs of plain capture)."""
    model, config = build(family)
    group = dist.group.WORLD
    plain: list[GraphModule] = []
    reports: list[moe_fx.Report] = []

    def count(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        plain.append(module)
        return module.forward

    options = {"ep_group": group, "base": "recording", "on_report": reports.append}
    compiled = torch.compile(model, backend="moe_fx", fullgraph=True, dynamic=True, options=options)
    captured = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    errors = []
    for length in lengths:
        ids = token_ids(config, 1, length, seed=rank)
        with torch.no_grad():
            expected = captured(input_ids=ids, use_cache=False).logits
            found = compiled(input_ids=ids, use_cache=False).logits
        errors.append(relative_error(found, expected))
    return errors, len(reports), len(plain)


class LargestExpertTensors(TorchDispatchMode):
    """Bytes of the largest tensor made so far that has the trailing sizes of expert weights."""

    def __init__(self, trailing: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.trailing = trailing
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, DTensor):  # its sizes are the whole's, its memory a shard's
                value = value.to_local()
            if isinstance(value, Tensor) and value.device.type != "meta" and value.dim() == 3:
                sizes = tuple(value.shape[1:])
                if sizes in self.trailing or sizes[::-1] in self.trailing:
                    self.largest = max(self.largest, value.nbytes)
        return result


def expert_memory(rank: int, path: str) -> tuple[int, int, int, int]:
    """Load sharded, compile, run. (bytes held, bytes of the whole model's experts, bytes of one
    layer's largest whole expert tensor, bytes of the largest expert tensor ever made here)."""
    group = dist.group.WORLD
    assert group is not None
    with LargestExpertTensors({(64, 64), (64, 32)}) as seen, sharded_loading(group):
        model = AutoModelForCausalLM.from_pretrained(path)

    def watching(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with seen:
                return module(*args)

        return run

    register_backend(watching, name="watching")
    options = {"base": "watching", "strict": True}
    compiled = torch.compile(model, backend="moe_fx", fullgraph=True, options=options)
    ids = torch.randint(model.config.vocab_size, (1, 9 + rank))
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
    held, whole = moe_fx.expert_parameter_bytes(model)
    largest_whole = 8 * 64 * 64 * 4
    return held, whole, largest_whole, seen.largest


class DenseExperts(nn.Module):
    """Every expert on every token, and a sum that no weights can stand for."""

    def __init__(self, num_experts: int = 4, hidden: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(num_experts, hidden, hidden, generator=generator) * 0.3
        self.num_experts = num_experts
        self.weight = nn.Parameter(weights)
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        with torch.no_grad():
            self.gate.weight.copy_(torch.randn(num_experts, hidden, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        values, ids = self.gate(x).softmax(-1).topk(2)
        mask = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype).scatter(1, ids, values)
        everything = torch.einsum("th,ehk->etk", x, self.weight)
        return torch.tanh(everything * mask.t().unsqueeze(-1)).sum(0)


def unknown_spelling(rank: int) -> tuple[float, list[dict[str, str]], bool]:
    """(error of the sharded, compiled model, what was declined, whether weights are gathered)."""
    model = DenseExperts()
    x = torch.rand(5 + rank, 16)
    expected = model(x)
    group = dist.group.WORLD
    shard_experts(model, group)
    reports: list[moe_fx.Report] = []
    options = {"base": "recording", "on_report": reports.append}
    _RECORDED.clear()
    found = torch.compile(model, backend="moe_fx", fullgraph=True, options=options)(x)
    gathers = any("all_gather" in str(n.target) for g in _RECORDED for n in g.graph.nodes)
    return relative_error(found, expected), reports[0].to_dict()["declined"], gathers
