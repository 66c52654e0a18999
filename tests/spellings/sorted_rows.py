"""Rows sorted by expert and one grouped matmul over all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.base import (
    EXPERTS,
    HIDDEN,
    RENORMALISED,
    SIGMOID_BIASED,
    TOP_K,
    SigmoidRouter,
    SoftmaxRouter,
    Spelling,
    Stacked,
    SwiGLU,
    seeded,
)


def grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """torch's op, whose fake kernel for CPU takes bfloat16 only (torch 2.13); else this
    project's, which has the same meaning."""
    if rows.dtype == torch.bfloat16:
        return torch._grouped_mm(rows, weights, offs=offsets)
    return torch.ops.moe_fx.grouped_mm(rows, weights, offsets)


def scaled_sigmoid() -> nn.Module:
    return SigmoidRouter(scale=2.5)


Combine = Literal["scatter_add", "index_add", "bmm", "index_put"]


def counted_by_histc(ids: Tensor) -> Tensor:
    return torch.histc(ids.view(-1).float(), bins=EXPERTS, min=0, max=EXPERTS)


def counted_by_bincount(ids: Tensor) -> Tensor:
    return torch.bincount(ids.view(-1), minlength=EXPERTS)


def counted_by_one_hot(ids: Tensor) -> Tensor:
    return F.one_hot(ids.view(-1), EXPERTS).sum(dim=0)


def counted_by_scatter(ids: Tensor) -> Tensor:
    ones = torch.ones_like(ids.view(-1))
    return torch.zeros(EXPERTS, dtype=ids.dtype).scatter_add_(0, ids.view(-1), ones)


def counted_by_comparison(ids: Tensor) -> Tensor:
    return (ids.view(-1, 1) == torch.arange(EXPERTS)).sum(dim=0)


class Grouped(nn.Module):
    """torchtitan's block: gather of the sorted tokens, experts, and one of its ways back."""

    def __init__(
        self,
        router: Callable[[], nn.Module] = scaled_sigmoid,
        counts: Callable[[Tensor], Tensor] = counted_by_histc,
        combine: Combine = "scatter_add",
        before: bool = False,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.router, self.experts = router(), Stacked()
        self.shared = SwiGLU() if shared else None
        self.counts, self.combine, self.before = counts, combine, before

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        order = torch.argsort(ids.view(-1), stable=True)
        weights_sorted = weights.view(-1)[order]
        token_of_row = order // TOP_K
        index = token_of_row.reshape(-1, 1).expand(-1, HIDDEN)
        rows = torch.gather(tokens, dim=0, index=index)
        if self.before:
            rows = (rows.float() * weights_sorted.reshape(-1, 1)).to(x.dtype)
        rows = self._experts(rows, self.counts(ids))
        base = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens)
        if self.combine == "bmm":
            grouped = torch.zeros_like(rows)
            grouped[order] = rows
            summed = torch.bmm(weights.view(-1, 1, TOP_K), grouped.view(-1, TOP_K, HIDDEN).float())
            return (base + summed.squeeze(1).to(x.dtype)).view_as(x)
        if not self.before:
            rows = (rows.float() * weights_sorted.reshape(-1, 1)).to(x.dtype)
        if self.combine == "scatter_add":
            return base.scatter_add(dim=0, index=index, src=rows).view_as(x)
        if self.combine == "index_add":
            return base.index_add(0, token_of_row, rows).view_as(x)
        return base.index_put((token_of_row,), rows, accumulate=True).view_as(x)

    def _experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        offsets = torch.cumsum(counts, dim=0).to(torch.int32)
        w1, w2, w3 = (
            w.transpose(-2, -1) for w in (self.experts.w1, self.experts.w2, self.experts.w3)
        )
        gate = F.silu(grouped_mm(rows, w1, offsets))
        return grouped_mm(gate * grouped_mm(rows, w3, offsets), w2, offsets)


class Unpermuted(nn.Module):
    """Megatron's way back: rows scattered to pair order, weighted there, K summed per token."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(), Stacked()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        order = torch.argsort(ids.flatten(), stable=True)
        rows = tokens.index_select(0, order // TOP_K)
        rows = Grouped._experts(self, rows, counted_by_one_hot(ids))  # type: ignore[arg-type]
        pairs = torch.zeros(ids.numel(), HIDDEN, dtype=rows.dtype).index_copy_(0, order, rows)
        pairs = pairs.reshape(-1, TOP_K, HIDDEN) * weights.unsqueeze(-1)
        return pairs.sum(dim=1).view_as(x)


class RoutingMap(nn.Module):
    """Megatron's routing map: a boolean ``[T, E]`` from which rows are taken expert by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(), Stacked()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        count = tokens.shape[0]
        routed = torch.zeros(count, EXPERTS, dtype=torch.bool).scatter(1, ids, True)
        probs = torch.zeros(count, EXPERTS, dtype=x.dtype).scatter(1, ids, weights)
        by_expert = routed.T.contiguous()
        indices = torch.arange(count).unsqueeze(0).expand(EXPERTS, -1)
        token_of_row = indices.masked_select(by_expert)
        row_weights = probs.T.contiguous().masked_select(by_expert)
        rows = tokens.index_select(0, token_of_row)
        rows = Grouped._experts(self, rows, routed.sum(dim=0))  # type: ignore[arg-type]
        rows = rows * row_weights.unsqueeze(-1)
        out = torch.zeros_like(tokens)
        index = token_of_row.unsqueeze(1).expand(-1, HIDDEN)
        return out.scatter_add_(0, index, rows).view_as(x)


def _titan(name: str, notes: str = "", dtype: torch.dtype = torch.float32, **kwargs: object):
    softmax = kwargs.get("router") is SoftmaxRouter
    return Spelling(
        name,
        seeded(partial(Grouped, **kwargs), dtype),  # type: ignore[arg-type]
        "sorted rows",
        router=RENORMALISED if softmax else SIGMOID_BIASED,
        dtype=dtype,
        weights_first=bool(kwargs.get("before")),
        shared_expert=bool(kwargs.get("shared")),
        needs_fullgraph=kwargs.get("counts") is counted_by_bincount,
        notes=notes,
    )


SPELLINGS = (
    _titan("torchtitan_grouped"),
    _titan("torchtitan_grouped_bf16", dtype=torch.bfloat16),
    _titan("torchtitan_grouped_before", "weights multiply before experts", before=True),
    _titan("torchtitan_grouped_shared", "combined onto the shared expert's output", shared=True),
    _titan("torchtitan_grouped_bmm", "combined by a bmm with weights per token", combine="bmm"),
    _titan("sorted_index_add", combine="index_add", router=SoftmaxRouter),
    _titan("sorted_index_put", combine="index_put", router=SoftmaxRouter),
    _titan("sorted_index_add_shared", combine="index_add", router=SoftmaxRouter, shared=True),
    _titan("sorted_bincount", counts=counted_by_bincount, router=SoftmaxRouter),
    _titan("sorted_one_hot", counts=counted_by_one_hot, router=SoftmaxRouter),
    _titan("sorted_scatter_count", counts=counted_by_scatter, router=SoftmaxRouter),
    _titan("sorted_compared", counts=counted_by_comparison, router=SoftmaxRouter),
    Spelling("megatron_unpermute", seeded(Unpermuted), "sorted rows"),
    Spelling(
        "megatron_routing_map",
        seeded(RoutingMap),
        "sorted rows",
        needs_fullgraph=True,
        notes="masked_select: the number of rows is unbacked; rows of an expert in token order",
    ),
)
