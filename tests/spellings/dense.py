"""Every expert on every token; the routing only decides what is added up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.base import (
    BATCH,
    EXPERTS,
    HIDDEN,
    RENORMALISED,
    SEQ,
    SIGMOID,
    TOP_K,
    WIDTH,
    SoftmaxRouter,
    Spelling,
    Stacked,
    SwiGLU,
    TopkSoftmaxRouter,
    expert_list,
    seeded,
)


def gates_by_scatter(weights: Tensor, ids: Tensor) -> Tensor:
    """``[..., K]`` to ``[..., E]``: the weight of each expert, 0 where it was not selected."""
    zeros = torch.zeros(*ids.shape[:-1], EXPERTS, dtype=weights.dtype)
    return zeros.scatter(-1, ids, weights)


def gates_by_one_hot(weights: Tensor, ids: Tensor) -> Tensor:
    return (F.one_hot(ids, EXPERTS).to(weights.dtype) * weights.unsqueeze(-1)).sum(dim=-2)


class DenseEinsum(nn.Module):
    """``gates``: how the gate matrix is built; ``combine``: the equation that sums experts."""

    def __init__(
        self,
        gates: Literal["scatter", "one_hot", "masked"] = "scatter",
        combine: str = "tef,efd,te->td",
    ) -> None:
        super().__init__()
        self.router, self.combine, self.gates = SoftmaxRouter(), combine, gates
        self.w1 = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.w3 = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.w2 = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        gates = (gates_by_scatter if self.gates == "scatter" else gates_by_one_hot)(weights, ids)
        hidden = F.silu(torch.einsum("td,edf->tef", tokens, self.w1))
        hidden = hidden * torch.einsum("td,edf->tef", tokens, self.w3)
        if self.combine == "te,ted->td":
            rows = torch.einsum("tef,efd->ted", hidden, self.w2)
            return torch.einsum(self.combine, gates, rows).view_as(x)
        return torch.einsum(self.combine, hidden, self.w2, gates).view_as(x)


class Dense3d(nn.Module):
    """Batch and sequence stay apart from the router to the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(), Stacked()

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        gates = gates_by_scatter(weights, ids)
        hidden = F.silu(torch.einsum("bsd,efd->bsef", x, self.experts.w1))
        hidden = hidden * torch.einsum("bsd,efd->bsef", x, self.experts.w3)
        rows = torch.einsum("bsef,edf->bsed", hidden, self.experts.w2)
        return torch.einsum("bsed,bse->bsd", rows, gates)


class RepeatBmm(nn.Module):
    """Llama 4: tokens repeated for each expert, one bmm per projection; sigmoid of the scattered
    scores, which multiplies the tokens (``before``) or the experts' results."""

    def __init__(self, before: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.empty(EXPERTS, HIDDEN, 2 * WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))
        self.shared, self.before = SwiGLU(), before

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        logits = self.gate(tokens)
        values, ids = torch.topk(logits, TOP_K, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, values)
        scores = torch.sigmoid(scores.float()).to(x.dtype)
        rows = tokens.repeat(EXPERTS, 1)
        if self.before:
            rows = rows * scores.transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(rows.view(EXPERTS, -1, HIDDEN), self.gate_up).chunk(2, dim=-1)
        rows = torch.bmm(up * F.silu(gate), self.down)
        if not self.before:
            rows = rows * scores.transpose(0, 1).unsqueeze(-1)
        return (self.shared(tokens) + rows.view(EXPERTS, -1, HIDDEN).sum(dim=0)).view_as(x)


class GptOssDense(nn.Module):
    """Softmax over the selected, scattered to all experts; biases beside both bmms."""

    def __init__(self) -> None:
        super().__init__()
        self.router = TopkSoftmaxRouter(bias=True)
        self.gate_up = nn.Parameter(torch.empty(EXPERTS, HIDDEN, 2 * WIDTH))
        self.gate_up_bias = nn.Parameter(torch.empty(EXPERTS, 2 * WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))
        self.down_bias = nn.Parameter(torch.empty(EXPERTS, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = self.router(tokens)
        scores = gates_by_scatter(weights, ids)
        rows = tokens.repeat(EXPERTS, 1).view(EXPERTS, -1, HIDDEN)
        rows = torch.bmm(rows, self.gate_up) + self.gate_up_bias[..., None, :]
        gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(min=-7.0, max=7.0)
        rows = torch.bmm((up + 1) * gate * torch.sigmoid(gate * 1.702), self.down)
        rows = (rows + self.down_bias[..., None, :]).view(EXPERTS, BATCH, -1, HIDDEN)
        rows = rows * scores.transpose(0, 1).view(EXPERTS, BATCH, -1)[..., None]
        return rows.sum(dim=0)


class ExpandMatmul(nn.Module):
    """Broadcasting matmul ``[1, T, H] @ [E, H, F]`` and the experts picked by gather afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(), Stacked()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = self.router(tokens)
        hidden = F.silu(torch.matmul(tokens, self.experts.w1.mT))
        hidden = hidden * torch.matmul(tokens, self.experts.w3.mT)
        rows = torch.matmul(hidden, self.experts.w2.mT).transpose(0, 1)
        picked = rows.gather(1, ids.unsqueeze(-1).expand(-1, -1, HIDDEN))
        return (picked * weights.unsqueeze(-1)).sum(dim=1).view_as(x)


class MaskedLoop(nn.Module):
    """For each expert: its result on all tokens times its weight, which is 0 for most."""

    def __init__(self, spelling: Literal["sum", "where", "stack", "gate"] = "sum") -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(), expert_list()
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        if self.spelling == "stack":
            rows = torch.stack([expert(tokens) for expert in self.experts], dim=1)
            return (rows * gates_by_one_hot(weights, ids).unsqueeze(-1)).sum(dim=1).view_as(x)
        gates = gates_by_scatter(weights, ids)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            if self.spelling == "gate":
                out = out + expert(tokens) * gates[:, e, None]
            elif self.spelling == "sum":
                out += expert(tokens) * (weights * (ids == e)).sum(dim=-1, keepdim=True)
            else:
                weight = torch.where(ids == e, weights, 0.0).sum(dim=-1, keepdim=True)
                out = out + torch.where(weight > 0, expert(tokens) * weight, 0.0)
        return out.view_as(x)


class LoopPerSlot(nn.Module):
    """Slots outside, experts inside: each slot's result is taken from all experts by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(), expert_list()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        results = [expert(tokens) for expert in self.experts]
        out = torch.zeros_like(tokens)
        for slot in range(TOP_K):
            for e, result in enumerate(results):
                out = out + (ids[:, slot, None] == e) * weights[:, slot, None] * result
        return out.view_as(x)


_AFTER = replace(RENORMALISED, softmax_after_topk=True)

SPELLINGS = (
    Spelling("dense_einsum", seeded(DenseEinsum), "dense", notes="one three-way einsum at the end"),
    Spelling("dense_einsum_one_hot", seeded(partial(DenseEinsum, gates="one_hot")), "dense"),
    Spelling("dense_einsum_ted", seeded(partial(DenseEinsum, combine="te,ted->td")), "dense"),
    Spelling(
        "dense_einsum_3d",
        seeded(Dense3d),
        "dense",
        input_shape=(BATCH, SEQ, HIDDEN),
        notes="the selection is over [B, S, E]",
    ),
    Spelling(
        "llama4_before",
        seeded(RepeatBmm),
        "dense",
        router=SIGMOID,
        weights_first=True,
        shared_expert=True,
    ),
    Spelling(
        "llama4_after",
        seeded(partial(RepeatBmm, before=False)),
        "dense",
        router=SIGMOID,
        shared_expert=True,
    ),
    Spelling("gpt_oss_dense", seeded(GptOssDense), "dense", router=_AFTER, notes="biases"),
    Spelling("dense_matmul_gather", seeded(ExpandMatmul), "dense", notes="no gate matrix"),
    Spelling("masked_loop", seeded(MaskedLoop), "dense"),
    Spelling("masked_loop_where", seeded(partial(MaskedLoop, "where")), "dense"),
    Spelling("masked_loop_gate", seeded(partial(MaskedLoop, "gate")), "dense"),
    Spelling("masked_loop_stack", seeded(partial(MaskedLoop, "stack")), "dense"),
    Spelling("masked_loop_per_slot", seeded(LoopPerSlot), "dense"),
)
