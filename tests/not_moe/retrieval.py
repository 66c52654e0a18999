"""Top-k that picks keys, values, tokens or hidden units: no experts anywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.not_moe.base import ENTRIES, HIDDEN, TOP_K, LookAlike, Module

VOCABULARY, KEYS = 40, 24


class Sampling(Module):
    """The best K of the vocabulary, renormalised; the token is drawn by inverting the sum."""

    def __init__(self) -> None:
        super().__init__(head=(VOCABULARY, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        values, ids = (x @ self.head.t()).topk(TOP_K, dim=-1)
        below = F.softmax(values, -1).cumsum(-1) < 0.5
        return ids.gather(-1, below.sum(-1, keepdim=True).clamp(max=TOP_K - 1))


class SoftToken(Module):
    """The next input is the mean embedding of the K likeliest tokens."""

    def __init__(self) -> None:
        super().__init__(head=(VOCABULARY, HIDDEN), embed=(VOCABULARY, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.softmax(x @ self.head.t(), -1).topk(TOP_K, dim=-1)
        return (F.embedding(ids, self.embed) * weights.unsqueeze(-1)).sum(1)


class NearestNeighbours(Module):
    """Values of the K nearest keys, weighted and summed: a table of rows that meets no token."""

    def __init__(self) -> None:
        super().__init__(keys=(ENTRIES, HIDDEN), values=(ENTRIES, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x.unsqueeze(0), self.keys.unsqueeze(0)).squeeze(0)
        nearest, ids = (-distance).topk(TOP_K, dim=-1)
        return (self.values[ids] * F.softmax(nearest, -1).unsqueeze(-1)).sum(dim=1)


class NearestNeighboursFlat(NearestNeighbours):
    """The same with a row per pair and the token added to each."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.softmax(x @ self.keys.t(), -1).topk(TOP_K, dim=-1)
        rows = x.repeat_interleave(TOP_K, 0) + self.values[ids.reshape(-1)]
        rows = rows * weights.reshape(-1, 1)
        return rows.view(-1, TOP_K, HIDDEN).sum(dim=1)


class EmbeddingBag(NearestNeighbours):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.softmax(x @ self.keys.t(), -1).topk(TOP_K, dim=-1)
        return F.embedding_bag(ids, self.values, per_sample_weights=weights, mode="sum")


class ProductKeys(Module):
    """Two half keys, their K × K sums, the best K of those, and a table of values."""

    def __init__(self) -> None:
        half = (ENTRIES, HIDDEN // 2)
        super().__init__(first=half, second=half, values=(ENTRIES**2, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        s1, i1 = (left @ self.first.t()).topk(TOP_K, dim=-1)
        s2, i2 = (right @ self.second.t()).topk(TOP_K, dim=-1)
        scores = (s1.unsqueeze(2) + s2.unsqueeze(1)).flatten(1)
        ids = (i1.unsqueeze(2) * ENTRIES + i2.unsqueeze(1)).flatten(1)
        best, at = scores.topk(TOP_K, dim=-1)
        rows = F.embedding(ids.gather(1, at), self.values)
        return (rows * F.softmax(best, -1).unsqueeze(-1)).sum(1)


class _Attention(Module):
    def __init__(self) -> None:
        square = (HIDDEN, HIDDEN)
        super().__init__(query=square, key=square, value=square, indexer=square)

    def scores(self, x: Tensor) -> Tensor:
        return (x @ self.query) @ (x @ self.key).t() * HIDDEN**-0.5


class TopkAttention(_Attention):
    """Scores below the K best are masked."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        kth = scores.topk(TOP_K, dim=-1).values[:, -1:]
        return F.softmax(scores.masked_fill(scores < kth, float("-inf")), -1) @ (x @ self.value)


class ScatteredAttention(_Attention):
    """The K best probabilities scattered to a row of zeros: a gate matrix over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        values, ids = scores.topk(TOP_K, dim=-1)
        gates = torch.zeros_like(scores).scatter(-1, ids, F.softmax(values, -1))
        return torch.einsum("te,ed->td", gates, x @ self.value)


class GatheredAttention(_Attention):
    """An indexer picks K keys per query; the query meets the gathered keys in a matmul."""

    def forward(self, x: Tensor) -> Tensor:
        _, ids = torch.relu((x @ self.indexer) @ x.t()).topk(TOP_K, dim=-1)
        keys, values = (x @ self.key)[ids], (x @ self.value)[ids]
        scores = torch.einsum("td,tkd->tk", x @ self.query, keys) * HIDDEN**-0.5
        return torch.einsum("tk,tkd->td", F.softmax(scores, -1), values)


class BlockSparseAttention(_Attention):
    """Blocks of keys picked by their mean: the table of blocks is made of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        keys, values = (x @ self.key)[:16].view(4, 4, HIDDEN), (x @ self.value)[:16].view(4, 4, -1)
        query = x @ self.query
        _, ids = (query @ keys.mean(1).t()).topk(TOP_K, dim=-1)
        scores = torch.einsum("td,tknd->tkn", query, keys[ids]).flatten(1)
        return torch.einsum("tn,tnd->td", F.softmax(scores, -1), values[ids].flatten(1, 2))


class BeamSearch(Module):
    """The K best continuations of two beams; states follow their beam."""

    def __init__(self) -> None:
        super().__init__(head=(VOCABULARY, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        scores = F.log_softmax(x @ self.head.t(), -1).view(-1, 2 * VOCABULARY)
        best, ids = scores.topk(TOP_K, dim=-1)
        beams = x.view(-1, 2, HIDDEN)
        states = beams.gather(1, (ids // VOCABULARY).unsqueeze(-1).expand(-1, -1, HIDDEN))
        return (states * best.unsqueeze(-1)).sum(1)


class ActiveUnits(Module):
    """A dense FFN of which each token keeps the K largest hidden units."""

    def __init__(self) -> None:
        super().__init__(up=(KEYS, HIDDEN), down=(KEYS, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(x @ self.up.t())
        values, ids = hidden.topk(TOP_K, dim=-1)
        return torch.zeros_like(hidden).scatter(-1, ids, values) @ self.down


class PredictedUnits(ActiveUnits):
    """A predictor picks hidden units; their rows of both matrices are gathered. Every unit is an
    expert of width one."""

    def forward(self, x: Tensor) -> Tensor:
        _, ids = (x @ self.up.t()).topk(TOP_K, dim=-1)
        hidden = F.relu(torch.einsum("th,tkh->tk", x, self.up[ids]))
        return torch.einsum("tk,tkh->th", hidden, self.down[ids])


_NEVER = "selected indices never bring tokens to experts"

LOOK_ALIKES = (
    LookAlike(Sampling, _NEVER),
    LookAlike(SoftToken, _NEVER),
    LookAlike(NearestNeighbours, _NEVER),
    LookAlike(NearestNeighboursFlat, "meet no expert's matrix"),
    LookAlike(EmbeddingBag, "embedding_bag"),
    LookAlike(ProductKeys, _NEVER),
    LookAlike(TopkAttention, _NEVER),
    LookAlike(ScatteredAttention, _NEVER),
    LookAlike(GatheredAttention, _NEVER),
    LookAlike(BlockSparseAttention, _NEVER),
    LookAlike(BeamSearch, _NEVER),
    LookAlike(ActiveUnits, _NEVER),
    LookAlike(PredictedUnits, _NEVER, legal=True),
)
