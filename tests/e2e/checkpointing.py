"""What runs on a rank in `test_checkpointing.py`: a model that computes its layers again in
backward, against the same model, whole and eager, on one process."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_fx
from moe_fx.integrations.transformers import sharded_loading
from moe_fx.weights.shard import shard_experts
from tests.e2e.ranks import (
    DenseExperts,
    _compare_gradients,
    _gradients,
    expert_block,
    relative_error,
)
from tests.models import build, token_ids


@dataclass
class Trained:
    """error, gradient_errors: relative to the eager reference. sent: bytes of rows that were sent
    in forward and backward. saved: bytes held between forward and backward that are no parameter's
    or input's."""

    error: float
    gradient_errors: dict[str, float]
    sent: tuple[int, int]
    saved: int
    report: dict[str, Any] = field(default_factory=dict)


class Saved(saved_tensors_hooks):
    """Counts the bytes of what autograd saves, once for each storage."""

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[int, int] = {}
        self.model = {_local(t).untyped_storage().data_ptr() for t in model.parameters()}
        self.model |= {t.untyped_storage().data_ptr() for t in model.buffers()}
        super().__init__(self._save, lambda saved: saved)

    def _save(self, saved: Tensor) -> Tensor:
        storage = _local(saved).untyped_storage()
        if storage.data_ptr() not in self.model:
            self.of[storage.data_ptr()] = storage.nbytes()
        return saved

    @property
    def bytes(self) -> int:
        return sum(self.of.values())


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def enable(model: PreTrainedModel, reentrant: bool | None) -> None:
    """Compute each layer again in backward; None: do not."""
    model.train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})


def train(
    rank: int,
    program: str,
    reentrant: bool | None,
    base: str = "aot_eager",
    folder: str | None = None,
    backend: str = "moe_fx",
    impl: str = "grouped_mm",
    lengths: tuple[int, ...] = (9, 5),
    family: str = "qwen3_moe",
    **given: Any,
) -> Trained:
    """One step of a two-layer model. program: "replicated", "gathered", "loaded" (gathered, as
    `sharded_loading` makes it from ``folder``) or "local". backend: "moe_fx", another compiler's,
    or "" for none. given: options."""
    model, config = build(family, impl)
    ids = token_ids(config, 1, lengths[rank], seed=rank)
    model.train()
    expected = model(input_ids=ids, use_cache=False).logits
    wanted = _gradients(model, expected)
    group = dist.group.WORLD
    assert group is not None
    if program == "gathered":
        shard_experts(model, group)
    elif program == "loaded":
        with sharded_loading(group):
            model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=impl)
    enable(model, reentrant)
    reports: list[moe_fx.Report] = []
    run: Callable[..., Any] = model
    if backend == "moe_fx":
        options: dict[str, Any] = {"base": base, "on_report": reports.append, "strict": True}
        if program == "replicated":
            options["ep_group"] = group
        run = torch.compile(model, backend="moe_fx", fullgraph=True, options=options | given)
    elif backend:
        run = torch.compile(model, backend=backend, fullgraph=True)
    sent = moe_fx.ops.exchange.bytes_sent
    run(input_ids=ids, use_cache=False)  # what is saved while it is compiled is not the model's
    before = sent(group.group_name)
    saved = Saved(model)
    with saved:
        found = run(input_ids=ids, use_cache=False).logits
    between = sent(group.group_name)
    gradients = _gradients(model, found)
    return Trained(
        error=relative_error(found.detach(), expected.detach()),
        gradient_errors=_compare_gradients(model, wanted, gradients),
        sent=(between - before, sent(group.group_name) - between),
        saved=saved.bytes,
        report=reports[0].to_dict() if reports else {},
    )


class Layer(nn.Module):
    """A residual block with experts. where: what of it is a checkpoint: "layer", "block",
    "experts", "router", "nested" (the block in that of the layer), or "" for nothing."""

    def __init__(self, moe: nn.Module, where: str, dropout: float, **options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.linear = nn.Linear(64, 64, bias=False)
        self.linear.weight.data = torch.randn(64, 64, generator=generator) / 8
        self.moe, self.where, self.dropout = moe, where, dropout
        self.again: Callable[..., Any] = functools.partial(checkpoint, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.where in ("layer", "nested"):
            return self.again(self.whole, x)
        return self.whole(x)

    def whole(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(torch.tanh(self.linear(x)), self.dropout)
        if self.where in ("block", "nested"):
            return x + self.again(self.moe, hidden)
        if self.where not in ("experts", "router"):
            return x + self.moe(hidden)
        moe: Any = self.moe
        flat = hidden.view(-1, 64)
        gate, experts = moe.gate, moe.experts
        if self.where == "router":
            gate = functools.partial(self.again, gate)
        else:
            experts = functools.partial(self.again, experts)
        _, weights, ids = gate(flat)
        return x + experts(flat, ids, weights).view(x.shape)


class ReadsOften(nn.Module):
    """A loop over experts that reads the table anew for each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.num_experts = 4
        self.weight = nn.Parameter(torch.randn(4, 64, 64, generator=generator) / 8)
        self.gate = nn.Linear(64, 4, bias=False)
        self.gate.weight.data = torch.randn(4, 64, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, 64)
        weights, ids = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for expert in range(4):
            weight = (weights * (ids == expert)).sum(-1, keepdim=True)
            out = out + weight * torch.tanh(flat @ self.weight[expert])
        return out.view(x.shape)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = DenseExperts(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x.view(-1, 64)).view(x.shape)


MOE: dict[str, Callable[[], nn.Module]] = {
    "grouped_mm": expert_block,
    "eager": lambda: expert_block(impl="eager"),
    "reads often": ReadsOften,
    "unknown": Unknown,
}


def save_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def selective() -> Any:
    return create_selective_checkpoint_contexts(save_products)


class Calls(TorchDispatchMode):
    """Counts the ops that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.of[str(func).removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Step:
    """errors: of result and gradients, the largest for each step. again: ops called in backward of
    the last step."""

    errors: list[float]
    again: dict[str, int]
    reports: list[dict[str, Any]]


def layers(
    rank: int,
    where: str,
    moe: str = "grouped_mm",
    *,
    reentrant: bool = False,
    backend: str = "moe_fx",
    selects: bool = False,
    counts: tuple[tuple[int, int], ...] = ((6, 9),),
    gathered: bool = True,
    around: bool = False,
    **given: Any,
) -> Step:
    """Two layers, step by step with so many tokens on each rank, against two that save all they
    need. around: the checkpoint is not compiled, but the layer in it."""
    options: dict[str, Any] = {"use_reentrant": reentrant}
    if selects:
        options["context_fn"] = selective
    reference = nn.ModuleList(Layer(MOE[moe](), "", 0.0) for _ in range(2))
    model = nn.ModuleList(Layer(MOE[moe](), where, 0.0, **options) for _ in range(2))
    group = dist.group.WORLD
    assert group is not None
    if gathered:
        shard_experts(model, group)
    reports: list[moe_fx.Report] = []
    settings = {"base": "aot_eager", "strict": True, "on_report": reports.append, **given}

    def whole(x: Tensor) -> Tensor:
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=reentrant) if around else layer(x)
        return x

    run = whole
    compiled = {"options": settings} if backend == "moe_fx" else {}
    if around:
        for layer in model:
            layer.compile(backend=backend, fullgraph=True, **compiled)
    elif backend:
        run = torch.compile(whole, backend=backend, fullgraph=True, **compiled)
    errors = []
    for step in counts:
        x = torch.rand(1, step[rank], 64, generator=torch.Generator().manual_seed(rank)) + 0.1
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = theirs
        for layer in reference:
            expected = layer(expected)
        wanted = _gradients(reference, expected)
        found = run(ours)
        calls = Calls()
        with nullcontext() if around else calls:  # Dynamo compiles nothing under such a mode
            gradients = _gradients(model, found)
        assert ours.grad is not None and theirs.grad is not None
        pairs = [(found.detach(), expected.detach()), (ours.grad, theirs.grad)]
        own = [relative_error(*pair) for pair in pairs if pair[0].numel()]
        errors.append(max([*own, *_compare_gradients(model, wanted, gradients).values()]))
    return Step(errors, dict(calls.of), [report.to_dict() for report in reports])


def slope(rank: int, base: str) -> tuple[float, float, int]:
    """(derivative by the gradients, by differences, layers found) of layers with dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(expert_block(), "layer", 0.5, use_reentrant=False) for _ in "ab"))
    shard_experts(model, dist.group.WORLD)
    reports: list[moe_fx.Report] = []
    options = {"base": base, "strict": True, "on_report": reports.append}
    run = torch.compile(model, backend="moe_fx", fullgraph=True, options=options)
    x = torch.rand(1, 7, 64, generator=torch.Generator().manual_seed(rank))
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(x.shape, generator=generator)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        out = run(x)
        torch.manual_seed(4)  # what is drawn again must not depend on the state in backward
        return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    step = 1e-3 * direction
    with torch.no_grad():
        difference = (loss(x + step) - loss(x - step)) / 2e-3
    return float((leaf.grad * direction).sum()), float(difference), len(reports[0].regions)
