"""Under bfloat16 autocast two ranks give what ``aot_eager`` gives under it, and rows travel in the
dtype that autocast gives them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

import moe_fx
from moe_fx.testing import RankPool
from moe_fx.weights.shard import shard_experts
from tests.e2e.ranks import _compare_gradients, _gradients, expert_block, relative_error
from tests.models import build, token_ids

BF16 = torch.bfloat16


class Exchanged(TorchDispatchMode):
    """The dtypes of the rows that are sent."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.moe_fx.all_to_all.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


_EXCHANGED = Exchanged()


@register_backend(name="exchanging")
def exchanging(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A base compiler that runs the rewritten graph as it is, and notes what it exchanges."""

    def run(*args: Any) -> Any:
        with _EXCHANGED:
            return module(*args)

    return run


@dataclass
class Seen:
    """error, gradient_errors: relative to the largest value of aot_eager's."""

    error: float
    dtypes: list[torch.dtype]
    regions: int
    declined: list[str]
    gradient_errors: dict[str, float] = field(default_factory=dict)


class Inside(nn.Module):
    """As accelerate wraps a forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", BF16):
            return self.module(*args, **kwargs)


def under_autocast(
    rank: int, kind: str, impl: str, program: str, inside: bool, training: bool, base: str
) -> Seen:
    if kind == "block":
        module: nn.Module = expert_block(impl=impl)
        x = torch.randn(1, 9 - 2 * rank, 64, generator=torch.Generator().manual_seed(rank))
        given: dict[str, Any] = {"hidden_states": x}
    else:
        module, config = build("qwen3_moe", impl, torch.float32)
        ids = token_ids(config, 1, 9 - 2 * rank, seed=rank)
        given = {"input_ids": ids, "use_cache": False}
    around: Any = nullcontext() if inside else torch.autocast("cpu", BF16)
    _EXCHANGED.dtypes.clear()

    def step(backend: str, **options: Any) -> Tensor:
        torch._dynamo.reset()
        whole = Inside(module) if inside else module
        compiled = torch.compile(whole, backend=backend, fullgraph=True, **options)
        with around, torch.set_grad_enabled(training):
            result = compiled(**given)
        return result if isinstance(result, Tensor) else result.logits

    expected = step("aot_eager")
    wanted = _gradients(module, expected) if training else {}
    group = dist.group.WORLD
    assert group is not None
    if program == "gathered":
        shard_experts(module, group)
    reports: list[moe_fx.Report] = []
    found = step(
        "moe_fx",
        options={
            "base": base,
            "ep_group": group if program == "replicated" else None,
            "on_report": reports.append,
        },
    )
    assert found.dtype == expected.dtype
    seen = Seen(
        error=relative_error(found, expected),
        dtypes=list(_EXCHANGED.dtypes),
        regions=sum(len(report.regions) for report in reports),
        declined=[declined.reason for report in reports for declined in report.declined],
    )
    if training:
        seen.gradient_errors = _compare_gradients(module, wanted, _gradients(module, found))
    return seen


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("program", ["replicated", "gathered"])
@pytest.mark.parametrize(
    ("kind", "layers"), [("block", 1), pytest.param("model", 2, marks=pytest.mark.slow)]
)
def test_rows_travel_in_bfloat16(
    ranks2: RankPool, kind: str, layers: int, program: str, inside: bool, training: bool
) -> None:
    """Autocast casts what ``batched_mm`` multiplies."""
    case = (kind, "batched_mm", program, inside, training, "exchanging")
    for seen in ranks2.run(under_autocast, *case):
        assert (seen.regions, seen.declined) == (layers, [])
        assert seen.error <= 2e-2
        assert set(seen.dtypes) == {BF16} and len(seen.dtypes) >= 2 * layers
        assert all(error <= 5e-2 for error in seen.gradient_errors.values())
        assert bool(seen.gradient_errors) == training


@pytest.mark.parametrize("program", ["replicated", "gathered"])
def test_what_autocast_leaves_in_float32_travels_in_float32(ranks2: RankPool, program: str) -> None:
    """Autocast has no rule for grouped matmuls."""
    case = ("block", "grouped_mm", program, True, True, "exchanging")
    for seen in ranks2.run(under_autocast, *case):
        assert (seen.regions, seen.declined) == (1, [])
        assert set(seen.dtypes) == {torch.float32}
        assert seen.error <= 1e-5
        assert all(error <= 1e-4 for error in seen.gradient_errors.values())


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_under_inductor(ranks2: RankPool, inside: bool) -> None:
    case = ("block", "batched_mm", "gathered", inside, True, "inductor")
    for seen in ranks2.run(under_autocast, *case, timeout=600.0):
        assert (seen.regions, seen.declined) == (1, [])
        assert seen.error <= 5e-2
        assert all(error <= 1e-1 for error in seen.gradient_errors.values())
