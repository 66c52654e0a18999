"""MoE forwards with something odd: rows that depend on other rows, randomness, strange ids."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.not_moe.base import LookAlike
from tests.passes.grouped import Grouped


class Convolved(Grouped):
    """A short convolution along the rows of the sorted tokens."""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        hidden = super().between(rows, weights)
        kernel = torch.ones(self.width, 1, 3, dtype=rows.dtype) / 3
        return F.conv1d(hidden.t().unsqueeze(0), kernel, padding=1, groups=self.width)[0].t()


class BatchNormalised(Grouped):
    """Batch statistics of the experts' rows."""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        return F.batch_norm(super().between(rows, weights), None, None, training=True)


class RunningSum(Grouped):
    def dispatch(self, x: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
        return super().dispatch(x, perm, weights).cumsum(0)


class NeighbourAdded(Grouped):
    """Each row also reads the row before it."""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        hidden = super().between(rows, weights)
        return hidden + F.pad(hidden, (0, 0, 1, 0))[:-1]


class PlaceAdded(Grouped):
    """A row's place among the sorted rows enters."""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        place = torch.arange(rows.shape[0], dtype=rows.dtype).unsqueeze(-1)
        return super().between(rows, weights) + 0.01 * place


class LoadScaled(Grouped):
    """Rows scaled by how many tokens their expert got."""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        expert_ids, perm = self.sort(ids.reshape(-1))
        counts = self.counts(expert_ids)
        offsets = self.offsets(counts)
        rows = self.grouped(self.dispatch(x, perm, weights), self.gate_up, offsets)
        rows = self.grouped(self.between(rows, weights), self.down, offsets)
        rows = rows / counts.unsqueeze(-1)[expert_ids]
        weighted = self.weigh(rows, self.weights_of_rows(weights, perm))
        return self.combine(weighted[self.way_back(perm)], x)


class Dropped(Grouped):
    """Dropout between the experts' matmuls."""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        return F.dropout(super().between(rows, weights), 0.5, training=True)


class NoisyRows(Grouped):
    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        hidden = super().between(rows, weights)
        return hidden + torch.randn_like(hidden)


class StaleBias(Grouped):
    """Sorted rows take the bias of the unsorted ids."""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        expert_ids, perm = self.sort(ids.reshape(-1))
        offsets = self.offsets(self.counts(expert_ids))
        rows = self.grouped(self.dispatch(x, perm, weights), self.gate_up, offsets)
        rows = self.grouped(self.between(rows, weights), self.down, offsets)
        rows = rows + self.bias[ids.reshape(-1)]
        weighted = self.weigh(rows, self.weights_of_rows(weights, perm))
        return self.combine(weighted[self.way_back(perm)], x)


class NextExpertsBias(Grouped):
    """Rows take the bias of the expert after theirs."""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        expert_ids, perm = self.sort(ids.reshape(-1))
        offsets = self.offsets(self.counts(expert_ids))
        rows = self.grouped(self.dispatch(x, perm, weights), self.gate_up, offsets)
        rows = self.grouped(self.between(rows, weights), self.down, offsets)
        rows = rows + self.bias[(expert_ids + 1) % self.num_experts]
        weighted = self.weigh(rows, self.weights_of_rows(weights, perm))
        return self.combine(weighted[self.way_back(perm)], x)


class OffsetsOfOtherIds(Grouped):
    """The counts are those of the experts after the selected ones."""

    def counts(self, ids: Tensor) -> Tensor:
        return super().counts((ids + 1) % self.num_experts)


class _WithPlacement(Grouped):
    def __init__(self) -> None:
        super().__init__()
        placement = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
        placement.is_buffer = True  # type: ignore[attr-defined]
        self.register_buffer("placement", placement)


class Placed(_WithPlacement):
    """Experts stand elsewhere than the router says: ids go through a table."""

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().select(scores)
        return weights, self.placement[ids]


class StaleWeights(Grouped):
    """Weights are read where another score had its best experts."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        _, stale = (scores @ self.other).topk(self.top_k, dim=-1)
        _, ids = super().select(scores)
        return scores.gather(1, stale), ids


class TwoSelections(Grouped):
    """The same experts serve two selections, one after the other."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + super().forward(x))


class GeneratedExperts(Grouped):
    """The experts' matrices are made from the tokens: other ranks would make others."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.generate = nn.Parameter(torch.randn(32, 32, generator=generator) / 32**0.5)

    def forward(self, x: Tensor) -> Any:
        scale = torch.tanh(x.mean(0) @ self.generate)
        weights, ids = self.select(self.scores(x))
        expert_ids, perm = self.sort(ids.reshape(-1))
        offsets = self.offsets(self.counts(expert_ids))
        table = self.gate_up * scale.view(1, -1, 1)
        rows = self.grouped(self.dispatch(x, perm, weights), table, offsets)
        rows = self.grouped(self.between(rows, weights), self.down, offsets)
        weighted = self.weigh(rows, self.weights_of_rows(weights, perm))
        return self.combine(weighted[self.way_back(perm)], x)


class NoisyRouter(Grouped):
    """Noise on the scores: the selection differs on every call, and from rank to rank."""

    def scores(self, x: Tensor) -> Tensor:
        return F.softmax(x @ self.router + torch.randn(x.shape[0], self.num_experts), -1)


class BalancedRouter(Grouped):
    """Scores balanced over tokens by alternating normalisation."""

    def scores(self, x: Tensor) -> Tensor:
        scores = torch.exp(x @ self.router)
        for _ in range(3):
            scores = scores / scores.sum(0, keepdim=True)
            scores = scores / scores.sum(1, keepdim=True)
        return scores


LOOK_ALIKES = (
    LookAlike(Convolved, "works across rows"),
    LookAlike(BatchNormalised, "batch_norm_legit.no_stats is not known to keep rows apart"),
    LookAlike(RunningSum, "cumsum.default works across rows"),
    LookAlike(NeighbourAdded, "pad.default is not known to keep rows apart"),
    LookAlike(PlaceAdded, "varies from row to row"),
    LookAlike(LoadScaled, "depends on what was selected"),
    LookAlike(Dropped, "a random op (aten.dropout.default with p=0.5) takes part"),
    LookAlike(NoisyRows, "a random op (aten.randn_like.default) takes part"),
    LookAlike(StaleBias, "pair order meet rows sorted by expert"),
    LookAlike(NextExpertsBias, "varies from row to row", legal=True),
    LookAlike(OffsetsOfOtherIds, "offsets are not the running sum of counts"),
    LookAlike(GeneratedExperts, "as the tokens are"),
    LookAlike(Placed, legal=True),
    LookAlike(StaleWeights, "varies from row to row", legal=True),
    LookAlike(TwoSelections, legal=True),
    LookAlike(NoisyRouter, legal=True, random=True),
    LookAlike(BalancedRouter, legal=True),
)
