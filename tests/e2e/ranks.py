"""What runs on a rank in the end-to-end tests: an unmodified model, eager against compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch.fx import GraphModule

import moe_fx
from moe_fx.shard import shard_experts
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
) -> Comparison:
    """One model, ``program`` "replicated" or "gathered", other tokens (and number) on each rank."""
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
    options: dict[str, Any] = {"base": base, "on_report": reports.append}
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
        gradient = gradient.clone()
        if ".parametrizations." not in name:
            dist.all_reduce(gradient)
        summed[name.replace(".parametrizations", "").removesuffix(".original")] = gradient
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
