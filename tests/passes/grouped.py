"""A grouped MoE forward by hand, in steps, so that tests can override one of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers.integrations.moe as _registers_grouped_mm_fallback  # noqa: F401
from torch import Tensor, nn


class Grouped(nn.Module):
    """Rows sorted by expert, two grouped matmuls with a SwiGLU between, weighted, brought back."""

    num_experts, top_k, hidden, width = 8, 2, 32, 16
    num_tables = num_experts

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(sizes, generator=generator) / sizes[-1] ** 0.5)

        self.router = parameter(self.hidden, self.num_experts)
        self.gate_up = parameter(self.num_tables, self.hidden, 2 * self.width)
        self.down = parameter(self.num_tables, self.width, self.hidden)
        self.bias = parameter(self.num_experts, self.hidden)

    def scores(self, x: Tensor) -> Tensor:
        return F.softmax(x @ self.router, -1)

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(self.top_k, dim=-1)  # type: ignore[return-value]

    def sort(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids)  # type: ignore[return-value]

    def token_of_row(self, perm: Tensor) -> Tensor:
        return perm // self.top_k

    def dispatch(self, x: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
        return x[self.token_of_row(perm)]

    def counts(self, ids: Tensor) -> Tensor:
        return torch.histc(ids.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)

    def offsets(self, counts: Tensor) -> Tensor:
        return counts.cumsum(0, dtype=torch.int32)

    def grouped(self, rows: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(rows, table, offsets)

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return F.silu(gate) * up

    def weights_of_rows(self, weights: Tensor, perm: Tensor) -> Tensor:
        return weights.reshape(-1)[perm].unsqueeze(-1)

    def weigh(self, rows: Tensor, weights: Tensor) -> Tensor:
        return rows * weights

    def way_back(self, perm: Tensor) -> Tensor:
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.size(0))
        return inverse

    def combine(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.view(x.shape[0], self.top_k, self.hidden).sum(dim=1)

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        expert_ids, perm = self.sort(ids.reshape(-1))
        rows = self.dispatch(x, perm, weights)
        offsets = self.offsets(self.counts(expert_ids))
        hidden = self.between(self.grouped(rows, self.gate_up, offsets), weights)
        out = self.grouped(hidden, self.down, offsets)
        weighted = self.weigh(out, self.weights_of_rows(weights, perm))
        return self.result(self.combine(weighted[self.way_back(perm)], x), out)

    def result(self, combined: Tensor, rows: Tensor) -> Any:
        return combined
