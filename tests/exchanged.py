"""Blocks that exchange tokens themselves: as written by others, run on the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import (
    all_reduce,
    all_to_all_single,
    all_to_all_single_autograd,
    wait_tensor,
)
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.expert_parallel import AllToAllEP, EPImplementationInterface

from tests.passes.graphs import block
from tests.spellings import SPELLINGS
from tests.spellings.base import EXPERTS, HIDDEN, TOP_K, SoftmaxRouter, Stacked, seeded


class OpenAllToAll(AllToAllEP):
    """transformers' dispatch, experts and combine without its branch on whether rows arrived."""

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows, ids, weights, state = self._dispatch_tokens(hidden_states, top_k_index, top_k_weights)
        return self._combine_tokens(self.experts_forward(rows, ids, weights), state)


def transformers_block(implementation: str, rank: int, impl: str = "grouped_mm") -> nn.Module:
    """A Qwen3 block whose experts are reached through transformers' ``ep_implementation``; a rank
    holds its contiguous slice of the experts."""
    world = dist.get_world_size()
    module: Any = block("qwen3_moe", impl)
    experts = module.experts
    local = experts.num_experts // world
    for name in ("gate_up_proj", "down_proj"):
        own = getattr(experts, name).detach()[rank * local : (rank + 1) * local].clone()
        setattr(experts, name, nn.Parameter(own))
    experts.num_experts = local
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("ep", "tp"))
    same_batch = implementation == "all_reduce"
    implementations = {**EPImplementationInterface._global_mapping, "open": OpenAllToAll}
    parallel = implementations[implementation](
        experts, mesh["ep"], mesh["ep"] if same_batch else mesh["tp"]
    )
    experts.forward = parallel
    return module


class OwnDispatch(nn.Module):
    """torchtitan's token dispatch around grouped matmuls over this rank's experts.

    ``autograd``: exchanges with a derivative, or plain functional ones.
    """

    def __init__(self, rank: int, world: int, autograd: bool = True) -> None:
        super().__init__()
        whole: Any = seeded(_Whole)()
        self.world, self.local = world, EXPERTS // world
        self.router = whole.router
        _take(self, whole.experts, slice(rank * self.local, (rank + 1) * self.local))
        self.exchange: Callable[..., Tensor] = (
            all_to_all_single_autograd if autograd else all_to_all_single
        )

    def forward(self, x: Tensor) -> Tensor:
        group = dist.group.WORLD
        weights, ids = self.router(x)
        order = self.order(ids)
        counts = torch.histc(ids.view(-1).float(), bins=EXPERTS, min=0, max=EXPERTS).long()
        with torch.no_grad():
            received = wait_tensor(all_to_all_single(counts, None, None, group))
            sent_to = counts.view(self.world, -1).sum(dim=1).tolist()
            got_from = received.view(self.world, -1).sum(dim=1).tolist()
        rows = self.exchange(self.rows(x, order), got_from, sent_to, group)
        owner = torch.arange(self.local).repeat(self.world)
        owner = owner.repeat_interleave(received, output_size=sum(got_from))
        local_order = torch.argsort(owner, stable=True)
        rows = rows[local_order]
        offsets = received.view(self.world, -1).sum(dim=0).cumsum(0).to(torch.int32)
        rows = self.experts(rows, offsets)
        unsorted = torch.empty_like(rows)
        unsorted[local_order] = rows
        rows = self.exchange(unsorted, sent_to, got_from, group)
        rows = rows * weights.view(-1)[order].unsqueeze(-1)
        return self.summed(x, order, rows)

    def order(self, ids: Tensor) -> Tensor:
        return torch.argsort(ids.view(-1), stable=True)

    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // TOP_K]

    def summed(self, x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        index = (order // TOP_K).unsqueeze(-1).expand(-1, HIDDEN)
        return torch.zeros_like(x).scatter_add(0, index, rows)

    def experts(self, rows: Tensor, offsets: Tensor) -> Tensor:
        grouped = torch.ops.moe_fx.grouped_mm
        hidden = F.silu(grouped(rows, self.w1.transpose(-2, -1), offsets))
        hidden = hidden * grouped(rows, self.w3.transpose(-2, -1), offsets)
        return grouped(hidden, self.w2.transpose(-2, -1), offsets)


class Unsorted(OwnDispatch):
    """Pairs are sent as they come, in blocks that have nothing to do with their experts."""

    def order(self, ids: Tensor) -> Tensor:
        return (ids.view(-1) * 0).cumsum(0) + torch.arange(ids.numel())


class NeverSummed(OwnDispatch):
    """Returns a row per pair."""

    def summed(self, x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        return torch.empty_like(rows).index_copy(0, order, rows)


class TwoSources(OwnDispatch):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // TOP_K] + x.tanh()[order // TOP_K]


class TooManyExperts(OwnDispatch):
    """Tables with two experts more than the rank's share, which get no rows."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world)
        for name in ("w1", "w2", "w3"):
            own = getattr(self, name).detach()
            setattr(self, name, nn.Parameter(F.pad(own, (0, 0, 0, 0, 0, 2))))

    def experts(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return super().experts(rows, torch.cat([offsets, offsets[-1:].expand(2)]))


class _Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(), Stacked()


def _take(module: nn.Module, experts: nn.Module, own: slice, dim: int = 0) -> None:
    """Register this rank's part of each stacked weight."""
    for name in ("w1", "w2", "w3"):
        at = 0 if dim == 0 else (2 if name == "w2" else 1)
        index = (slice(None),) * at + (own,)
        module.register_parameter(name, nn.Parameter(getattr(experts, name)[index].clone()))


class SharedBatch(nn.Module):
    """Every rank holds all tokens, computes its own experts densely and the sums are reduced."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        whole: Any = seeded(_Whole)()
        self.first, self.local = rank * (EXPERTS // world), EXPERTS // world
        self.router = whole.router
        _take(self, whole.experts, slice(self.first, self.first + self.local))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        gates = torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)
        gates = gates[:, self.first : self.first + self.local]
        hidden = F.silu(torch.einsum("th,efh->tef", x, self.w1))
        hidden = hidden * torch.einsum("th,efh->tef", x, self.w3)
        partial = torch.einsum("tef,ehf,te->th", hidden, self.w2, gates)
        return all_reduce(partial, "sum", dist.group.WORLD)


class TensorParallel(nn.Module):
    """Every rank holds a slice of the width of all experts."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        whole: Any = seeded(_Whole)()
        width = whole.experts.w1.shape[1] // world
        self.router = whole.router
        _take(self, whole.experts, slice(rank * width, (rank + 1) * width), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        gates = torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)
        hidden = F.silu(torch.einsum("th,efh->tef", x, self.w1))
        hidden = hidden * torch.einsum("th,efh->tef", x, self.w3)
        partial = torch.einsum("tef,ehf,te->th", hidden, self.w2, gates)
        return all_reduce(partial, "sum", dist.group.WORLD)


@dataclass(frozen=True)
class Program:
    """build(rank, world): this rank's module; whole: the same layer on one device."""

    build: Callable[[int, int], nn.Module]
    kind: str
    whole: Callable[[], Callable[[Tensor], Any]]
    input_shape: tuple[int, ...] = (11, HIDDEN)

    def tokens(self, rank: int) -> Tensor:
        """Other tokens on each rank where rows travel, the same where results are summed."""
        seed = 0 if self.kind == "allreduce" else rank
        return torch.randn(self.input_shape, generator=torch.Generator().manual_seed(seed))


def _own() -> Callable[[Tensor], Tensor]:
    spelling = SPELLINGS["sorted_index_add"].build()
    return lambda x: spelling(x.unsqueeze(0))[0]


def _hugging_face() -> nn.Module:
    return block("qwen3_moe")


def _build(implementation: str) -> Callable[[int, int], nn.Module]:
    return lambda rank, world: transformers_block(implementation, rank)


def _two(layer: Callable[[int, int], nn.Module]) -> Callable[[int, int], nn.Module]:
    return lambda rank, world: nn.Sequential(layer(rank, world), layer(rank, world))


_HF_SHAPE = (1, 11, 64)
PROGRAMS = {
    "own_dispatch": Program(OwnDispatch, "alltoall", _own),
    "own_dispatch_plain": Program(partial(OwnDispatch, autograd=False), "alltoall", _own),
    "transformers_open": Program(_build("open"), "alltoall", _hugging_face, _HF_SHAPE),
    "transformers_all_reduce": Program(_build("all_reduce"), "allreduce", _hugging_face, _HF_SHAPE),
    "shared_batch": Program(SharedBatch, "allreduce", _own),
}
BUILDERS = PROGRAMS | {
    "two_layers": Program(_two(OwnDispatch), "alltoall", _own),
    "two_shared_layers": Program(_two(SharedBatch), "allreduce", _own),
    "unsorted": Program(Unsorted, "alltoall", _own),
    "never_summed": Program(NeverSummed, "alltoall", _own),
    "two_sources": Program(TwoSources, "alltoall", _own),
    "too_many_experts": Program(TooManyExperts, "alltoall", _own),
    "tensor_parallel": Program(TensorParallel, "allreduce", _own),
}
