"""transformers' expert parallelism with ``ep_implementation="moe_fx"``, loaded by its loader."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism

import moe_fx
import moe_fx.integrations.transformers
from moe_fx.testing import RankPool
from tests.e2e.ranks import _RECORDED
from tests.models import build, token_ids

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module")
def checkpoints() -> Iterator[dict[str, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for family in FAMILIES:
            model, _ = build(family, "grouped_mm", torch.float32)
            found[family] = Path(folder) / family
            model.save_pretrained(found[family])
        yield found


def load(path: Path, implementation: str, tp_size: int = 1) -> Any:
    world = dist.get_world_size()
    config = DistributedConfig(
        tp_size=tp_size,
        tp_plan=None if tp_size == 1 else "auto",
        fsdp_size=world // tp_size,
        fsdp_plan={},
        ep_size=world,
        ep_implementation=implementation,
    )
    return AutoModelForCausalLM.from_pretrained(
        path, distributed_config=config, experts_implementation="grouped_mm", dtype=torch.float32
    )


def split(path: Path, implementation: str) -> Any:
    """The same without FSDP, whose hooks break every graph: each rank has a batch of its own."""
    model = AutoModelForCausalLM.from_pretrained(
        path, experts_implementation="grouped_mm", dtype=torch.float32
    )
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("ep", "tp"))
    plan = model._expand_parallel_plan(dict(model.ep_plan))
    return apply_expert_parallelism(model, mesh["ep"], mesh["tp"], plan, implementation)


@dataclass
class Outcome:
    logits: Tensor
    gradients: dict[str, Tensor]
    expert_elements: int


def outcome(rank: int, path: Path, implementation: str, tp_size: int, length: int) -> Outcome:
    model = load(path, implementation, tp_size)
    seed = rank if tp_size == 1 else 0
    ids = token_ids(model.config, 1, length + (rank if tp_size == 1 else 0), seed=seed)
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().square().mean().backward()
    grads = {name: _local(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    held = sum(_local(p).numel() for name, p in model.named_parameters() if ".experts." in name)
    return Outcome(logits.detach(), grads, held)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_dtensors_that_are_computed_with_are_left_alone(
    ranks2: RankPool, checkpoints: dict[str, Path]
) -> None:
    """A tensor-parallel model: right, and the report says why nothing was cut."""
    for seen in ranks2.run(compiled, checkpoints["qwen3_moe"], "moe_fx", "eager", True, True):
        assert seen.programs == [] and "works on a DTensor" in seen.declined[0]
        assert seen.error <= 1e-5 and seen.gradient_error <= 1e-4


OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:]]


@pytest.mark.parametrize("tp_size", [1, 2], ids=["own batches", "one batch"])
@pytest.mark.parametrize("family", [FAMILIES[0], *OTHERS])
def test_equals_transformers_all_to_all(
    ranks2: RankPool, checkpoints: dict[str, Path], family: str, tp_size: int
) -> None:
    theirs = ranks2.run(outcome, checkpoints[family], "all_to_all", tp_size, 7)
    ours = ranks2.run(outcome, checkpoints[family], "moe_fx", tp_size, 7)
    for their, our in zip(theirs, ours, strict=True):
        assert torch.allclose(their.logits, our.logits, atol=1e-5, rtol=1e-4)
        assert their.gradients.keys() == our.gradients.keys()
        for name, grad in their.gradients.items():
            assert torch.allclose(grad, our.gradients[name], atol=1e-6, rtol=1e-3), name
        assert their.expert_elements == our.expert_elements > 0


def test_one_token(ranks2: RankPool, checkpoints: dict[str, Path]) -> None:
    """With one batch of one token, a rank's slice is empty."""
    theirs = ranks2.run(outcome, checkpoints["qwen3_moe"], "all_to_all", 2, 1)
    ours = ranks2.run(outcome, checkpoints["qwen3_moe"], "moe_fx", 2, 1)
    for their, our in zip(theirs, ours, strict=True):
        assert torch.allclose(their.logits, our.logits, atol=1e-5, rtol=1e-4)


@dataclass
class Compiled:
    error: float
    gradient_error: float
    graphs: int
    programs: list[str]
    declined: list[str]
    ops: Counter[str]


def compiled(
    rank: int, path: Path, backend: str, base: str, gradients: bool, one_batch: bool = False
) -> Compiled:
    with torch.set_grad_enabled(gradients):
        model = load(path, "moe_fx", 2) if one_batch else split(path, "moe_fx")
        return _compiled(rank * (not one_batch), model, backend, base, gradients)


def _compiled(rank: int, model: Any, backend: str, base: str, gradients: bool) -> Compiled:
    ids = token_ids(model.config, 1, 7 + rank, seed=rank)
    expected = model(input_ids=ids, use_cache=False).logits
    wanted = _gradients(model, expected) if gradients else {}
    reports: list[moe_fx.Report] = []
    counting: list[Any] = []

    def counted(module: Any, inputs: Any) -> Any:
        counting.append(module)
        return module.forward

    options = {"base": base, "overlap": 2, "strategy": "alltoall", "on_report": reports.append}
    torch._dynamo.reset()
    _RECORDED.clear()
    call = torch.compile(
        model,
        fullgraph=True,
        backend=counted if backend == "counted" else backend,
        options=options if backend == "moe_fx" else None,
    )
    found = call(input_ids=ids, use_cache=False).logits
    got = _gradients(model, found) if gradients else {}
    return Compiled(
        _relative(found, expected),
        max((_relative(got[name], each) for name, each in wanted.items()), default=0.0),
        len(counting) if backend == "counted" else len(reports),
        [region.program for report in reports for region in report.regions],
        [d.reason for report in reports for d in report.declined],
        Counter(str(n.target) for g in _RECORDED for n in g.graph.nodes),
    )


def _gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits.float().square().mean().backward()
    return {n: _local(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("one_batch", [False, True], ids=["own batches", "one batch"])
def test_a_model_of_two_layers_is_one_graph(
    ranks2: RankPool, checkpoints: dict[str, Path], one_batch: bool
) -> None:
    for seen in ranks2.run(compiled, checkpoints["qwen3_moe"], "counted", "", True, one_batch):
        assert seen.graphs == 1
        assert seen.error <= 1e-5 and seen.gradient_error <= 1e-4


@pytest.mark.parametrize(
    "gradients", [pytest.param(False, marks=pytest.mark.slow), True], ids=["inference", "training"]
)
@pytest.mark.parametrize("family", [FAMILIES[0], *OTHERS])
def test_its_exchange_is_cut_into_chunks(
    ranks2: RankPool, checkpoints: dict[str, Path], family: str, gradients: bool
) -> None:
    for seen in ranks2.run(compiled, checkpoints[family], "moe_fx", "recording", gradients):
        assert seen.graphs == 1 and not seen.declined
        assert set(seen.programs) == {"exchanged"} and seen.programs
        assert seen.error <= 1e-5 and seen.gradient_error <= 1e-4
        # Two chunks there and back; by rows each of them in halves.
        exchanges = 4 if gradients else 8
        assert seen.ops["moe_fx.all_to_all.default"] == exchanges * len(seen.programs)


@pytest.mark.slow
def test_inductor_compiles_it(ranks2: RankPool, checkpoints: dict[str, Path]) -> None:
    for seen in ranks2.run(compiled, checkpoints["qwen3_moe"], "moe_fx", "inductor", True):
        assert seen.error <= 1e-5 and seen.gradient_error <= 1e-4
