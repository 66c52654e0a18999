"""A compiled dispatcher is a program that the passes recognise, cut into chunks and overlap."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_fx
from moe_fx.testing import RankPool
from tests.dispatcher.layers import GroupedLayer
from tests.dispatcher.test_tensor_parallel import groups
from tests.e2e.ranks import _RECORDED

EXPERTS, TOP_K = 8, 2


@dataclass
class Seen:
    error: float
    gradients: dict[str, float]
    program: list[str]
    declined: list[str]
    ops: Counter[str]
    graphs: int
    order: list[str]
    other_counts: list[float] = field(default_factory=list)


def layer(
    rank: int,
    kind: type[GroupedLayer] = GroupedLayer,
    fields: dict[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> GroupedLayer:
    local = EXPERTS // dist.get_world_size()
    config = moe_fx.MoEDispatcherConfig(
        num_local_experts=local, moe_router_topk=TOP_K, **(fields or {})
    )
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(config, group)
    return kind(d, rank * local, local, EXPERTS)


def tokens(rank: int, count: int) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(50 + rank))


def compiled(
    rank: int,
    backend: str,
    overlap: Any = 2,
    dynamic: bool = False,
    gradients: bool = True,
    base: str = "recording",
    kind: type[GroupedLayer] = GroupedLayer,
    fields: dict[str, Any] | None = None,
    strategy: str = "alltoall",
) -> Seen:
    with torch.set_grad_enabled(gradients):
        module = layer(rank, kind, fields)
        return _compiled(rank, module, backend, overlap, dynamic, gradients, base, strategy)


def _compiled(
    rank: int,
    module: GroupedLayer,
    backend: str,
    overlap: Any,
    dynamic: bool,
    gradients: bool,
    base: str,
    strategy: str,
) -> Seen:
    x = tokens(rank, 6 + rank).requires_grad_(gradients)
    expected = module(x)
    wanted = _gradients(module, x, expected) if gradients else {}
    reports: list[moe_fx.Report] = []
    _RECORDED.clear()
    options = {
        "overlap": overlap,
        "base": base,
        "on_report": reports.append,
        "strategy": strategy,
    }
    torch._dynamo.reset()
    call = torch.compile(
        module,
        backend=backend,
        fullgraph=True,
        dynamic=dynamic,
        options=options if backend == "moe_fx" else None,
    )
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    found = call(x)
    got = _gradients(module, x, found) if gradients else {}
    others = []
    if dynamic:
        for count in (9 - rank, 3, 2 + rank):
            y = tokens(rank, count).requires_grad_(gradients)
            others.append(_relative(call(y), module(y)))
    return Seen(
        _relative(found, expected),
        {name: _relative(got[name], each) for name, each in wanted.items()},
        [region.program for report in reports for region in report.regions],
        [d.reason for report in reports for d in report.declined],
        Counter(str(n.target) for g in _RECORDED for n in g.graph.nodes),
        len(reports),
        [str(n.target) for g in _RECORDED for n in g.graph.nodes],
        others,
    )


def _gradients(module: GroupedLayer, x: Tensor, out: Tensor) -> dict[str, Tensor]:
    names, leaves = zip(*module.named_parameters(), strict=True)
    return dict(
        zip((*names, "x"), torch.autograd.grad(out.square().sum(), (*leaves, x)), strict=True)
    )


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_it_is_cut_into_chunks(ranks2: RankPool, gradients: bool, dynamic: bool) -> None:
    for seen in ranks2.run(compiled, "moe_fx", 2, dynamic, gradients):
        assert seen.program == ["exchanged"] and not seen.declined
        assert seen.graphs == 1
        assert seen.error <= 1e-5 and all(e <= 1e-5 for e in seen.gradients.values())
        how, pieces = ("permute_chunks", 2) if gradients else ("permute_cut", 4)
        assert seen.ops[f"moe_fx.{how}.default"] == 1
        assert seen.ops["moe_fx.gather_counts.default"] == 0
        assert "_c10d_functional.all_gather_into_tensor.default" not in seen.ops
        assert seen.ops["moe_fx.all_to_all.default"] == 2 * pieces
        assert all(error <= 1e-5 for error in seen.other_counts)


def test_shared_experts_fill_the_waiting(ranks2: RankPool) -> None:
    """All chunks are on their way, then the shared experts run, then the first is waited for."""
    for seen in ranks2.run(compiled, "moe_fx", 4, False, False):
        start, wait = "moe_fx.all_to_all.default", "moe_fx.wait.default"
        first_wait = seen.order.index(wait)
        assert seen.ops[start] == 12 and seen.order[:first_wait].count(start) == 6
        shared = seen.order.index("aten.matmul.default")
        assert seen.order.index(start) < shared < first_wait


def test_weights_are_not_gathered_for_a_program_that_exchanges_tokens(ranks2: RankPool) -> None:
    for seen in ranks2.run(
        compiled, "moe_fx", 1, False, False, "recording", GroupedLayer, None, "gather_weights"
    ):
        assert seen.program == [] and "the program exchanges tokens" in seen.declined[0]
        assert "_c10d_functional.all_gather_into_tensor.default" not in seen.ops
        assert seen.error <= 1e-5


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_other_backends_run_it_as_one_graph(ranks2: RankPool, backend: str) -> None:
    for seen in ranks2.run(compiled, backend):
        assert seen.error <= 1e-5 and all(e <= 1e-5 for e in seen.gradients.values())


@pytest.mark.slow
def test_inductor_runs_the_chunks(ranks2: RankPool) -> None:
    for seen in ranks2.run(compiled, "moe_fx", 4, False, True, "inductor"):
        assert seen.program == ["exchanged"]
        assert seen.error <= 1e-5 and all(e <= 1e-5 for e in seen.gradients.values())


class MixesRows(GroupedLayer):
    """Experts that are not the sum over their rows: chunks would change the result."""

    def forward(self, x: Tensor) -> Tensor:
        d: Any = self.dispatcher
        probs, ids = d.route(torch.nn.functional.linear(x, self.gate))
        _, rows, counts = d.token_permutation(x, probs, ids)
        rows = rows - rows.mean(0, keepdim=True)
        ends = counts.cumsum(0).to(torch.int32)
        rows = torch.ops.moe_fx.grouped_mm(rows, self.up, ends).chunk(2, dim=-1)[0]
        rows = torch.ops.moe_fx.grouped_mm(rows, self.down, ends)
        return d.token_unpermutation(rows)[0]


class ReadsRows(GroupedLayer):
    """The rows that arrive are a result too."""

    def forward(self, x: Tensor) -> Tensor:
        d: Any = self.dispatcher
        probs, ids = d.route(torch.nn.functional.linear(x, self.gate))
        _, rows, counts = d.token_permutation(x, probs, ids)
        ends = counts.cumsum(0).to(torch.int32)
        seen = rows.sum()
        rows = torch.ops.moe_fx.grouped_mm(rows, self.up, ends).chunk(2, dim=-1)[0]
        rows = torch.ops.moe_fx.grouped_mm(rows, self.down, ends)
        return d.token_unpermutation(rows)[0] + seen


class KeepsRows(GroupedLayer):
    """The rows that arrive are an output of the graph."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        d: Any = self.dispatcher
        probs, ids = d.route(torch.nn.functional.linear(x, self.gate))
        _, rows, counts = d.token_permutation(x, probs, ids)
        self.kept = rows
        ends = counts.cumsum(0).to(torch.int32)
        rows = torch.ops.moe_fx.grouped_mm(rows, self.up, ends).chunk(2, dim=-1)[0]
        return d.token_unpermutation(torch.ops.moe_fx.grouped_mm(rows, self.down, ends))[0]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (KeepsRows, "is read by output"),
        (MixesRows, "with the experts of all ranks the result is another"),
        (ReadsRows, "is read by"),
    ],
)
def test_what_cannot_be_cut_is_left_as_it_is(
    ranks2: RankPool, kind: type[GroupedLayer], said: str
) -> None:
    for seen in ranks2.run(compiled, "moe_fx", 2, False, False, "recording", kind):
        assert seen.error <= 1e-5
        assert seen.program == [] and len(seen.declined) == 1 and said in seen.declined[0]
        assert "_c10d_functional.all_gather_into_tensor.default" not in seen.ops


CAPACITY: dict[str, dict[str, Any]] = {
    "drops": {"moe_expert_capacity_factor": 0.6},
    "pads": {"moe_expert_capacity_factor": 0.6, "moe_pad_expert_input_to_capacity": True},
}


@pytest.mark.parametrize("name", CAPACITY)
def test_limited_capacity_is_left_as_it_is(ranks2: RankPool, name: str) -> None:
    given = ("moe_fx", 2, False, True, "recording", GroupedLayer, CAPACITY[name])
    for seen in ranks2.run(compiled, *given):
        assert seen.program == [] and len(seen.declined) == 1, seen.declined
        assert seen.error <= 1e-5 and all(e <= 1e-5 for e in seen.gradients.values())


class TwoLayers(GroupedLayer):
    """The same dispatcher for two layers, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(super().forward(x)))


@pytest.mark.parametrize("backend", ["moe_fx", "aot_eager"])
def test_one_dispatcher_for_two_layers(ranks2: RankPool, backend: str) -> None:
    for seen in ranks2.run(compiled, backend, 2, False, True, "recording", TwoLayers):
        assert seen.program == ["exchanged"] * 2 * (backend == "moe_fx") and not seen.declined
        assert seen.error <= 1e-5 and all(e <= 1e-4 for e in seen.gradients.values())


def tensor_parallel(rank: int) -> tuple[float, int, int]:
    """(error, regions, declined) of two by two ranks."""
    ep_group, tp_group = groups(rank)
    config = moe_fx.MoEDispatcherConfig(
        num_moe_experts=EXPERTS, num_local_experts=4, moe_grouped_gemm=True
    )
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(config, ep_group, tp_group)
    module = GroupedLayer(d, 4 * d.ep_rank, 4, EXPERTS)
    reports: list[moe_fx.Report] = []
    options = {"base": "eager", "on_report": reports.append}
    with torch.no_grad():
        x = tokens(rank, 6)
        expected = module(x)
        torch._dynamo.reset()
        call = torch.compile(module, backend="moe_fx", fullgraph=True, options=options)
        error = _relative(call(x), expected)
    (report,) = reports
    return error, len(report.regions), len(report.declined)


@pytest.mark.slow
def test_tensor_parallel_programs_are_left_as_they_are(ranks4: RankPool) -> None:
    for error, regions, declined in ranks4.run(tensor_parallel):
        assert error <= 1e-5 and regions == 0 and declined >= 1
