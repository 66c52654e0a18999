"""A layer compiled under whatever the caller has switched on: found, with eager's values and
gradients, and nothing of the caller's is disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moe_fx
from moe_fx.entry.ambient import neutral
from moe_fx.testing import RankPool

E, H, T, K = 4, 16, 6, 2
EXACT = 1e-5
COARSE = 3e-2  # both in bfloat16


class Experts(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Parameter(torch.randn(E, H))
        self.w1 = nn.Parameter(torch.randn(E, H, 24) / 4)
        self.w2 = nn.Parameter(torch.randn(E, 24, H) / 4)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        w, ids = torch.softmax(x @ self.gate.t(), -1).topk(K)
        h = torch.relu(torch.einsum("th,tkhi->tki", x, self.w1[ids]))
        out = (torch.einsum("tki,tkih->tkh", h, self.w2[ids]) * w[..., None]).sum(1)
        return F.dropout(out, self.dropout)


class Compiled:
    def __init__(self, model: Callable[..., Any], base: str = "aot_eager") -> None:
        torch._dynamo.reset()
        self.reports: list[moe_fx.Report] = []
        options = {"base": base, "on_report": self.reports.append}
        self.run = torch.compile(model, backend="moe_fx", options=options)

    @property
    def found(self) -> int:
        assert not [d.reason for report in self.reports for d in report.declined]
        assert all(region.verified for report in self.reports for region in report.regions)
        return sum(len(report.regions) for report in self.reports)


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(T, H, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.requires_grad_()


def outcome(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The result, and, if there are any, the gradients of tokens and parameters."""
    model.zero_grad()
    x = tokens()
    result = call(x)
    if not result.requires_grad:
        return [result]
    result.float().square().sum().backward()
    gradients = [value.grad for value in (x, *model.parameters())]
    return [result.detach(), *(g.clone() for g in gradients if g is not None)]


def assert_close(expected: list[Tensor], found: list[Tensor], tolerance: float) -> None:
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        error = (one.double() - other.double()).abs().max() / one.double().abs().max()
        assert error <= tolerance


# -- states that stand around the call -------------------------------------------------------------


@contextmanager
def packing_hooks() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: ("packed", t), lambda p: p[1]):
        yield


@contextmanager
def restoring(switch: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    switch(value)
    try:
        yield
    finally:
        switch(before)


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "saved-tensor hooks": packing_hooks,
    "save on cpu": torch.autograd.graph.save_on_cpu,
    "saved-tensor hooks forbidden": lambda: torch.autograd.graph.disable_saved_tensors_hooks("no"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": lambda: restoring(torch.use_deterministic_algorithms, True, False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "default dtype": lambda: restoring(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: restoring(torch.set_default_device, "meta", None),
    "torch-function mode": SeesFunctions,
    "compiled autograd": lambda: torch._dynamo.config.patch(compiled_autograd=True),
    "forward-mode level": torch.autograd.forward_ad.dual_level,
    "matmul precision": lambda: restoring(
        torch.set_float32_matmul_precision, "medium", torch.get_float32_matmul_precision()
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_a_layer_compiled_in_a_state_is_found_and_computes_what_eager_does(state: str) -> None:
    model = Experts()
    compiled = Compiled(model)

    def within(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with STATES[state]():
            return outcome(model, call)

    coarse = state in ("autocast", "matmul precision")
    assert_close(within(model), within(compiled.run), COARSE if coarse else EXACT)
    assert compiled.found == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_compiled_block_can_be_checkpointed(reentrant: bool) -> None:
    model = Experts()
    compiled = Compiled(model)
    expected = outcome(model, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    found = outcome(model, lambda x: checkpoint(compiled.run, x, use_reentrant=reentrant))
    assert_close(expected, found, EXACT)
    assert compiled.found >= 1  # again for the recomputation, where that has another gradient mode


def test_with_fake_tensors_a_layer_is_found_and_its_result_is_fake() -> None:
    with FakeTensorMode():
        model = Experts()
        compiled = Compiled(model)
        assert compiled.run(tokens()).shape == (T, H)
    assert compiled.found == 1


class Own(torch.autograd.Function):
    """Compiles in its forward, where gradients are off, and again within a backward pass."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x)
        return call(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return None, torch.autograd.grad(ctx.call(x), x, grads[0])[0]


def test_a_layer_compiled_within_a_backward_pass() -> None:
    model = Experts()
    compiled = Compiled(model)
    expected = outcome(model, lambda x: Own.apply(model, x))
    assert_close(expected, outcome(model, lambda x: Own.apply(compiled.run, x)), EXACT)
    assert compiled.found == 2


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_of_a_compiled_layer(transform: str) -> None:
    model = Experts()
    compiled, x = Compiled(model), tokens().detach()

    def transformed(call: Callable[[Tensor], Tensor]) -> Any:
        if transform == "grad":
            return torch.func.grad(lambda v: call(v).square().sum())(x)
        if transform == "vmap":
            return torch.vmap(call)(x.expand(3, T, H))
        return torch.func.jvp(call, (x,), (x,))[1]

    assert_close([transformed(model)], [transformed(compiled.run)], EXACT)


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward too"])
def test_backward_inside_the_compiled_step(forward: bool) -> None:
    """With compiled autograd, the backward pass is a graph of its own that the backend gets."""
    model = Experts()

    def step(x: Tensor) -> Tensor:
        loss = model(x).square().sum()
        if not forward:
            loss.backward()
        return loss.detach()

    compiled = Compiled(step)
    with torch._dynamo.config.patch(compiled_autograd=True):
        assert_close(outcome(model, step), outcome(model, compiled.run), EXACT)
    assert compiled.found == 1


def test_a_compiled_layer_draws_the_random_numbers_of_eager() -> None:
    model = Experts(dropout=0.5)
    compiled = Compiled(model)

    def drawn(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        result = outcome(model, lambda x: call(x) + torch.rand(()))
        return [*result, torch.rand(3)]

    assert_close(drawn(model), drawn(compiled.run), EXACT)
    assert compiled.found == 1


# -- what the shield itself promises ---------------------------------------------------------------


def settings() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_anomaly_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.get_num_threads(),
        torch._C._functorch.maybe_current_level(),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
    )


@pytest.mark.parametrize("state", STATES)
def test_afterwards_everything_is_as_it_was(state: str) -> None:
    with STATES[state]():
        before, stream = settings(), torch.default_generator.get_state()
        with neutral():
            torch.rand(7, device="cpu")
            assert settings()[:5] == (False, False, False, False, False)
        assert settings() == before
        assert torch.equal(torch.default_generator.get_state(), stream)
        with pytest.raises(KeyError), neutral():
            raise KeyError
        assert settings() == before


class Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))


def test_ops_within_are_seen_by_no_mode_hook_or_transform() -> None:
    saved: list[Tensor] = []
    counts = Counts()

    def one(v: Tensor) -> Tensor:
        with neutral(), torch.enable_grad():
            leaf = torch.ones(3, dtype=torch.float32, device="cpu").requires_grad_()
            inside.append(torch.autograd.grad((leaf * leaf).sum(), leaf)[0])
        return v

    inside: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with counts, hooks, torch.autocast("cpu", torch.bfloat16):
        one(torch.ones(()))
    torch.vmap(one)(torch.ones(2))
    assert not saved and counts.ops <= 1  # the argument
    for gradient in inside:
        assert not torch._C._functorch.is_functorch_wrapped_tensor(gradient)
        assert torch.equal(gradient, torch.full((3,), 2.0))


# -- data-parallel wrappers ------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.first, self.second = Experts(), Experts()
        self.calls = [wrap(self.first), wrap(self.second)]

    def forward(self, x: Tensor) -> Tensor:
        for call in self.calls:
            x = x + call(x)
        return x


def data_parallel(rank: int, wrapper: str, whole: bool) -> tuple[float, int, list[str]]:
    """whole: the wrapped model is compiled, instead of its blocks."""
    torch.set_grad_enabled(True)
    torch._dynamo.reset()
    reports: list[moe_fx.Report] = []
    options = {"base": "aot_eager", "on_report": reports.append}

    def compiled(module: Any) -> Any:
        return torch.compile(module, backend="moe_fx", options=options)

    def wrapped(model: nn.Module) -> nn.Module:
        if wrapper == "ddp":
            return DistributedDataParallel(model)
        for block in (model.first, model.second):
            fully_shard(block)
        return fully_shard(model)

    results = []
    for compiles in (False, True):
        model = Blocks(compiled if compiles and not whole else lambda block: block)
        parallel: Any = wrapped(model)
        call = compiled(parallel) if compiles and whole else parallel
        x = tokens().detach() + rank
        out = call(x)
        out.square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        whole_gradients = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        results.append([out.detach(), *whole_gradients])
    dist.barrier()
    errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)]
    found = sum(len(report.regions) for report in reports)
    return max(errors), found, [d.reason for report in reports for d in report.declined]


@pytest.mark.parametrize(
    ("wrapper", "whole"), [("ddp", False), ("ddp", True), ("fsdp", False), ("fsdp", True)]
)
def test_data_parallel_models_are_found_and_train_as_in_eager(
    ranks2: RankPool, wrapper: str, whole: bool
) -> None:
    for error, found, declined in ranks2.run(data_parallel, wrapper, whole):
        assert error <= EXACT
        assert (found, declined) == (2, [])
