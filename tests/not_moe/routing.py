"""Tokens that are picked or mixed by score, in ways that are no top-k over experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.not_moe.base import ENTRIES, HIDDEN, TOP_K, LookAlike, Module

WIDTH, CAPACITY, RANK = 24, 5, 4
BATCHED = (4, 6, HIDDEN)


class _Experts(Module):
    def __init__(self, **sizes: tuple[int, ...]) -> None:
        super().__init__(
            router=(HIDDEN, ENTRIES),
            up=(ENTRIES, HIDDEN, WIDTH),
            down=(ENTRIES, WIDTH, HIDDEN),
            **sizes,
        )

    def experts(self, rows: Tensor) -> Tensor:
        """``[E, C, H]`` to ``[E, C, H]``."""
        return torch.bmm(F.silu(torch.bmm(rows, self.up)), self.down)


class ExpertChoice(_Experts):
    """Each expert picks its best tokens: the selection is over the transposed scores."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = F.softmax(x @ self.router, -1).t().topk(CAPACITY, dim=-1)
        rows = self.experts(x[chosen]) * weights.unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, chosen.flatten(), rows.flatten(0, 1))


class ExpertChoiceOneHot(_Experts):
    """The same by one-hot einsums."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = F.softmax(x @ self.router, -1).t().topk(CAPACITY, dim=-1)
        where = F.one_hot(chosen, x.shape[0]).to(x.dtype)
        rows = self.experts(torch.einsum("ect,th->ech", where, x))
        return torch.einsum("ect,ec,ech->th", where, weights, rows)


class MixtureOfDepths(Module):
    """The best tokens of each sequence pass through the block; the others go around it."""

    def __init__(self) -> None:
        super().__init__(router=(HIDDEN, 1), up=(HIDDEN, WIDTH), down=(WIDTH, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = (x @ self.router).squeeze(-1).topk(3, dim=-1)
        index = chosen.unsqueeze(-1).expand(-1, -1, HIDDEN)
        rows = F.silu(x.gather(1, index) @ self.up) @ self.down
        return x.scatter_add(1, index, rows * weights.sigmoid().unsqueeze(-1))


class SoftMoE(_Experts):
    """Slots are mixtures of all tokens: nothing is selected."""

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.router
        slots = torch.einsum("te,th->eh", F.softmax(logits, 0), x).unsqueeze(1)
        return torch.einsum("te,eh->th", F.softmax(logits, 1), self.experts(slots).squeeze(1))


class DenseMixture(_Experts):
    """All experts with all weights: nothing is selected."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.experts(x.expand(ENTRIES, -1, -1))
        return torch.einsum("te,eth->th", F.softmax(x @ self.router, -1), rows)


class TopkPooling(Module):
    """The best nodes of a graph, gated by their score."""

    def __init__(self) -> None:
        super().__init__(score=(HIDDEN,), up=(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        score = torch.tanh(x @ self.score / self.score.norm())
        best, nodes = score.topk(6)
        return (x[nodes] * best.unsqueeze(-1)) @ self.up


class Capsules(Module):
    """Routing by agreement, between the K best output capsules of each input."""

    def __init__(self) -> None:
        super().__init__(votes=(ENTRIES, HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.einsum("th,ehd->ted", x, self.votes)
        agreement = torch.zeros(x.shape[0], ENTRIES)
        for _ in range(2):
            kept, ids = agreement.topk(TOP_K, dim=-1)
            coupling = torch.zeros_like(agreement).scatter(-1, ids, F.softmax(kept, -1))
            capsules = torch.einsum("te,ted->ed", coupling, votes)
            agreement = agreement + torch.einsum("ted,ed->te", votes, capsules)
        return capsules


class LoraPerSample(Module):
    """Adapters picked for a whole sequence by its mean: each meets all tokens of the sequence."""

    def __init__(self) -> None:
        super().__init__(
            router=(HIDDEN, ENTRIES), down=(ENTRIES, HIDDEN, RANK), up=(ENTRIES, RANK, HIDDEN)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.softmax(x.mean(1) @ self.router, -1).topk(1, dim=-1)
        down, up = self.down[ids.view(-1)], self.up[ids.view(-1)]
        return x + torch.bmm(torch.bmm(x, down), up) * weights.unsqueeze(-1)


class TokensOfTopEntries(Module):
    """Each token reads the mean of the tokens that share its best entry: rows meet rows."""

    def __init__(self) -> None:
        super().__init__(router=(HIDDEN, ENTRIES), mix=(HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.softmax(x @ self.router, -1).topk(TOP_K, dim=-1)
        gates = torch.zeros(x.shape[0], ENTRIES).scatter(-1, ids, weights)
        means = (gates.t() @ x) / gates.sum(0).clamp(min=1e-6).unsqueeze(-1)
        return gates @ (means @ self.mix)


_EXPERT_CHOICE = "experts choose their tokens"
_NEVER = "selected indices never bring tokens to experts"

LOOK_ALIKES = (
    LookAlike(ExpertChoice, _EXPERT_CHOICE),
    LookAlike(ExpertChoiceOneHot, _EXPERT_CHOICE),
    LookAlike(MixtureOfDepths, _NEVER, input_shape=BATCHED),
    LookAlike(SoftMoE),
    LookAlike(DenseMixture),
    LookAlike(TopkPooling, "expected [tokens, experts]"),
    LookAlike(Capsules, _NEVER),
    LookAlike(
        LoraPerSample,
        "expert weights meet something that is not the token rows",
        input_shape=BATCHED,
        legal=True,
    ),
    LookAlike(TokensOfTopEntries, _NEVER),
)
