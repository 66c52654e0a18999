"""Numbers of experts that the ranks do not divide: every strategy, results and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

import moe_fx
from moe_fx.integrations.transformers import sharded_loading
from moe_fx.testing import RankPool
from tests.models import build
from tests.passes.graphs import block, relative_error, tokens

EXACT = 1e-5
WAYS: dict[str, dict[str, Any]] = {
    "all-to-all": {"strategy": "alltoall", "overlap": "off"},
    "cut by rows": {"strategy": "alltoall", "overlap": 3, "base": "inductor"},
    "cut by expert": {"strategy": "alltoall", "overlap": 2, "base": "eager"},
    "allgather": {"strategy": "allgather", "overlap": 2},
    "padded": {"strategy": "padded_alltoall"},
    "direct": {"strategy": "direct"},
    "direct, fused": {"strategy": "direct", "lower": "cuda"},
    "gathered": {"strategy": "gather_weights"},
}
APART = ("cut by rows", "gathered")
"""Inductor takes long; and only shards are gathered."""


def trained(
    rank: int, family: str, experts: int, way: dict[str, Any], training: bool, sharded: bool = False
) -> tuple[float, dict[str, float], list[tuple[str, int]]]:
    """Errors of the result and, summed over the ranks, of every gradient; and what was planned."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"num_local_experts" if family == "gpt_oss" else "num_experts": experts}
    whole, module = (block(family, **sizes).requires_grad_(training) for _ in range(2))
    group = dist.new_group()
    if sharded:
        moe_fx.shard_experts(module, group)
    reports: list[moe_fx.Report] = []
    options = {
        "base": "aot_eager",
        "ep_group": group,
        "strict": True,
        "on_report": reports.append,
        **way,
    }
    compiled = torch.compile(module, backend="moe_fx", options=options)
    found = []
    for call, held in ((whole, whole), (compiled, module)):
        x = tokens(1, 12, 64, seed=rank).requires_grad_(training)
        with torch.set_grad_enabled(training):
            out = call(x)
            out = out if isinstance(out, torch.Tensor) else out[0]
        grads = {}
        if training:
            out.square().sum().backward()
            assert x.grad is not None
            grads = {name: summed(param.grad) for name, param in held.named_parameters()}
            grads["tokens"] = x.grad
        found.append((out.detach(), grads))
    (right, wanted), (made, given) = found
    assert all(float(value.abs().max()) > 0 for value in (right, *wanted.values()))
    errors = {name: relative_error(wanted[name], given[name]) for name in wanted}
    plans = [(plan.strategy, plan.num_experts) for each in reports for plan in each.plans]
    return relative_error(right, made), errors, plans


def summed(grad: Any) -> torch.Tensor:
    """Over the ranks; a shard's gradient is already."""
    if isinstance(grad, DTensor):
        return grad.full_tensor()
    grad = grad.clone()
    dist.all_reduce(grad)
    return grad


def check(results: list[Any], way: dict[str, Any], experts: int) -> None:
    for error, gradients, plans in results:
        assert error <= EXACT
        assert {name: off for name, off in gradients.items() if off > EXACT} == {}
        assert {(way["strategy"], experts)} == set(plans)


@pytest.mark.parametrize("experts", [5, 7])
@pytest.mark.parametrize("way", [each for each in WAYS if each not in APART])
def test_two_ranks(ranks2: RankPool, way: str, experts: int) -> None:
    """Each rank has all weights."""
    check(ranks2.run(trained, "qwen3_moe", experts, WAYS[way], True), WAYS[way], experts)


@pytest.mark.parametrize("experts", [5, 6, 7])
@pytest.mark.parametrize("way", ["all-to-all", "allgather", "padded", "direct", "gathered"])
def test_four_ranks_that_have_shards(ranks4: RankPool, way: str, experts: int) -> None:
    """Of 5 and 6 experts the last rank has none."""
    found = ranks4.run(trained, "qwen3_moe", experts, WAYS[way], True, True, timeout=100)
    check(found, WAYS[way], experts)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_chunks_cut_by_rows(ranks2: RankPool, training: bool) -> None:
    way = WAYS["cut by rows"]
    check(ranks2.run(trained, "qwen3_moe", 7, way, training, timeout=280), way, 7)


def test_biases_too(ranks2: RankPool) -> None:
    way = WAYS["all-to-all"]
    check(ranks2.run(trained, "gpt_oss", 5, way, True), way, 5)


# ---- Saved, loaded, whole again


def kept(rank: int, path: Path, saves: bool) -> dict[str, float]:
    """Differences from the whole model, of 7 experts, by what was done. saves: also writes what
    other numbers of ranks read."""
    original, _ = build("qwen3_moe", "grouped_mm", torch.float32, num_experts=7)
    wanted = {name: value.clone() for name, value in original.state_dict().items()}
    model, _ = build("qwen3_moe", "grouped_mm", torch.float32, num_experts=7)
    moe_fx.shard_experts(model)
    found = {}
    if saves:
        found["full"] = apart(moe_fx.full_state_dict(model), wanted)
        model.save_pretrained(path / "pretrained")
        dcp.save(get_model_state_dict(model), checkpoint_id=path / "dcp")
    found["saved"] = apart(type(model).from_pretrained(path / "pretrained").state_dict(), wanted)
    with sharded_loading():
        loaded = type(model).from_pretrained(path / "pretrained")
    found["loaded"] = apart(moe_fx.full_state_dict(loaded), wanted)
    for param in model.parameters():
        param.detach().zero_()
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=path / "dcp")
    set_model_state_dict(model, state)
    found["dcp"] = apart(moe_fx.full_state_dict(model), wanted)
    for param in model.parameters():
        param.detach().zero_()
    model.load_state_dict(wanted)
    found["cut"] = apart(moe_fx.full_state_dict(model), wanted)
    found["whole"] = apart(moe_fx.unshard_experts(model).state_dict(), wanted)
    return found


def refused(rank: int, path: Path) -> str:
    """Of 5 experts on 4 ranks the last has none."""
    model, _ = build("qwen3_moe", "grouped_mm", torch.float32, num_experts=5)
    moe_fx.shard_experts(model).save_pretrained(path)
    with sharded_loading(), pytest.raises(moe_fx.ConfigurationError) as caught:
        type(model).from_pretrained(path)
    return str(caught.value)


def test_a_rank_without_experts_is_not_loaded(ranks4: RankPool, tmp_path: Path) -> None:
    for said in ranks4.run(refused, tmp_path):
        assert "has 5 experts, of which the last of 4 ranks would have none" in said


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference; of what only the first rank has, 0 on others."""
    if not found and dist.get_rank():
        return 0.0
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


def test_shards_are_saved_and_loaded(ranks2: RankPool, ranks4: RankPool, tmp_path: Path) -> None:
    """What two ranks have saved, four read."""
    for pool in (ranks2, ranks4):
        for found in pool.run(kept, tmp_path, pool is ranks2):
            assert set(found.values()) == {0.0}, found
