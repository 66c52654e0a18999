"""Experts with room for so many tokens, one-hot dispatch and combine; and Switch's top-1."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.base import (
    EXPERTS,
    HIDDEN,
    SOFTMAX,
    Spelling,
    Stacked,
    expert_list,
    seeded,
)

AMPLE = 22  # as many places as tokens: nothing is dropped
SCARCE = 5


def expert_einsum(experts: Stacked, rows: Tensor) -> Tensor:
    """``[E, C, H]`` to ``[E, C, H]``."""
    hidden = F.silu(torch.einsum("ech,efh->ecf", rows, experts.w1))
    hidden = hidden * torch.einsum("ech,efh->ecf", rows, experts.w3)
    return torch.einsum("ecf,ehf->ech", hidden, experts.w2)


class GShard(nn.Module):
    """Top-2 by two argmaxes; a token's place with its expert by a running sum over tokens."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts, self.capacity = Stacked(), capacity

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        probs = F.softmax(self.gate(tokens), dim=1, dtype=torch.float)
        mask1 = F.one_hot(probs.argmax(dim=1), EXPERTS)
        mask2 = F.one_hot(probs.masked_fill(mask1.bool(), 0.0).argmax(dim=1), EXPERTS)
        place1 = torch.cumsum(mask1, dim=0) - 1
        place2 = torch.cumsum(mask2, dim=0) - 1 + mask1.sum(dim=0, keepdim=True)
        mask1 = mask1 * (place1 < self.capacity)
        mask2 = mask2 * (place2 < self.capacity)
        weight1, weight2 = (probs * mask1).sum(dim=1), (probs * mask2).sum(dim=1)
        total = (weight1 + weight2).clamp(min=torch.finfo(probs.dtype).eps)
        combine = self._placed(weight1 / total, mask1, place1)
        combine = combine + self._placed(weight2 / total, mask2, place2)
        dispatch = combine.bool().to(x.dtype)
        rows = torch.einsum("tec,td->ecd", dispatch, tokens)
        rows = expert_einsum(self.experts, rows)
        return torch.einsum("tec,ecd->td", combine.to(x.dtype), rows).view_as(x)

    def _placed(self, weight: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        where = F.one_hot((place * mask).sum(dim=1), self.capacity).to(weight.dtype)
        return torch.einsum("te,tc->tec", weight.unsqueeze(1) * mask, where)


class SwitchTop1(nn.Module):
    """The largest probability of each token is its weight and names its expert."""

    def __init__(
        self,
        spelling: Literal["capacity", "loop", "masked"],
        capacity: int = AMPLE,
        reduction: Literal["max", "argmax", "topk"] = "max",
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Stacked() if spelling == "capacity" else expert_list()
        self.spelling, self.capacity, self.reduction = spelling, capacity, reduction

    def _select(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        if self.reduction == "max":
            return probs.max(dim=-1)
        if self.reduction == "topk":
            weights, ids = probs.topk(1, dim=-1)
            return weights.squeeze(-1), ids.squeeze(-1)
        ids = torch.argmax(probs, dim=-1)
        return probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), ids

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self._select(F.softmax(self.gate(tokens).float(), dim=-1))
        if self.spelling == "capacity":
            return self._with_capacity(tokens, weights, ids).view_as(x)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):  # type: ignore[arg-type]
            if self.spelling == "loop":
                index = (ids == e).nonzero().flatten()
                out[index] = expert(tokens[index, :])
            else:
                out = torch.where((ids == e).unsqueeze(-1), expert(tokens), out)
        return (out * weights.unsqueeze(-1)).view_as(x)

    def _with_capacity(self, tokens: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        assert isinstance(self.experts, Stacked)
        mask = F.one_hot(ids, EXPERTS)
        place = (torch.cumsum(mask, dim=0) * mask).sum(dim=1) - 1
        kept = place < self.capacity
        where = F.one_hot(torch.where(kept, place, 0), self.capacity) * kept.unsqueeze(-1)
        dispatch = (mask.unsqueeze(-1) * where.unsqueeze(1)).to(tokens.dtype)
        rows = expert_einsum(self.experts, torch.einsum("tec,td->ecd", dispatch, tokens))
        combine = dispatch * weights.view(-1, 1, 1)
        return torch.einsum("ecd,tec->td", rows, combine)


class PaddedSlots(nn.Module):
    """Rows written to ``[E * C, H]`` at expert * C + place; beyond capacity, to a spare row."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts, self.capacity = Stacked(), capacity

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = torch.topk(F.softmax(self.gate(tokens), dim=-1), 2, dim=-1)
        chosen = F.one_hot(ids.view(-1), EXPERTS)
        place = (torch.cumsum(chosen, dim=0) * chosen).sum(dim=-1) - 1
        spare = EXPERTS * self.capacity
        slot = torch.where(place < self.capacity, ids.view(-1) * self.capacity + place, spare)
        rows = tokens.repeat_interleave(2, dim=0)
        buffer = torch.zeros(spare + 1, HIDDEN, dtype=x.dtype).index_copy(0, slot, rows)
        rows = expert_einsum(self.experts, buffer[:-1].view(EXPERTS, self.capacity, HIDDEN))
        rows = F.pad(rows.reshape(spare, HIDDEN), (0, 0, 0, 1))[slot]
        return (rows.view(-1, 2, HIDDEN) * weights.unsqueeze(-1)).sum(dim=1).view_as(x)


def _switch(name: str, notes: str = "", **kwargs: object) -> Spelling:
    loop = kwargs["spelling"] == "loop"
    return Spelling(
        name,
        seeded(partial(SwitchTop1, **kwargs)),  # type: ignore[arg-type]
        {"capacity": "capacity", "loop": "loop", "masked": "dense"}[str(kwargs["spelling"])],  # type: ignore[arg-type]
        router=SOFTMAX,
        top_k=1,
        drops=kwargs.get("capacity") == SCARCE,
        needs_fullgraph=loop,
        notes=notes,
    )


SPELLINGS = (
    Spelling("gshard", seeded(partial(GShard, AMPLE)), "capacity", notes="two argmaxes, no topk"),
    Spelling("gshard_drops", seeded(partial(GShard, SCARCE)), "capacity", drops=True),
    Spelling(
        "padded_slots", seeded(partial(PaddedSlots, 44)), "capacity", router=SOFTMAX, notes="ample"
    ),
    Spelling(
        "padded_slots_drops",
        seeded(partial(PaddedSlots, SCARCE)),
        "capacity",
        router=SOFTMAX,
        drops=True,
    ),
    _switch("switch_capacity", spelling="capacity"),
    _switch("switch_capacity_drops", spelling="capacity", capacity=SCARCE),
    _switch("switch_loop", "results written, not added", spelling="loop"),
    _switch("switch_loop_argmax", "argmax and gather", spelling="loop", reduction="argmax"),
    _switch("switch_loop_topk", "topk with k = 1", spelling="loop", reduction="topk"),
    _switch("switch_masked", "torch.where per expert on all tokens", spelling="masked"),
)
