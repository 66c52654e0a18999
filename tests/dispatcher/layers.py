"""Layers around a dispatcher, the same numbers on every rank, and what they give without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Experts = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Weights:
    """``up [E, H, 2 * F]``, ``down [E, F, H]``, ``shared [H, H]``."""

    up: Tensor
    down: Tensor
    shared: Tensor

    @staticmethod
    def make(
        experts: int, hidden: int = 16, width: int = 12, dtype: torch.dtype = torch.float64
    ) -> Weights:
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return (torch.randn(sizes, generator=generator, dtype=torch.float64) * 0.3).to(dtype)

        return Weights(
            random(experts, hidden, 2 * width),
            random(experts, width, hidden),
            random(hidden, hidden),
        )

    def own(self, first: int, count: int) -> Weights:
        """Those of a rank."""
        own = slice(first, first + count)
        return Weights(
            self.up[own].clone().requires_grad_(), self.down[own].clone().requires_grad_(),
            self.shared,
        )  # fmt: skip

    def expert(self, rows: Tensor, expert: int) -> Tensor:
        gate, value = (rows @ self.up[expert]).chunk(2, dim=-1)
        return (F.silu(gate) * value) @ self.down[expert]

    def experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by expert; those behind all are nobody's."""
        done, start = [rows.new_zeros((0, rows.shape[1]))], 0
        for expert, count in enumerate(counts.tolist()):
            done.append(self.expert(rows[start : start + count], expert))
            start += count
        assert start == rows.shape[0]
        return torch.cat(done)

    def share(self, tokens: Tensor) -> tuple[Tensor, str]:
        """A shared expert that returns more than its result, as vLLM's do."""
        return tokens @ self.shared, "bias"

    def dense(self, tokens: Tensor, probs: Tensor, ids: Tensor) -> Tensor:
        """Every token by its experts, one after another."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        out = flat * 0 + probs.sum() * 0
        for token in range(flat.shape[0]):
            for slot in range(ids.shape[1]):
                row = self.expert(flat[token : token + 1], int(ids[token, slot]))[0]
                out = out.index_add(
                    0, torch.tensor([token]), (probs[token, slot].to(row.dtype) * row)[None]
                )
        return out.view(tokens.shape)


def tokens_of(
    rank: int,
    count: int,
    experts: int,
    top_k: int,
    *,
    hidden: int = 16,
    dtype: torch.dtype = torch.float64,
    skew: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``[T, H], [T, K], [T, K]``: tokens, weights, ids; other ones on each rank. skew: how much the
    first experts are favoured."""
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(count, hidden, generator=generator, dtype=torch.float64).to(dtype)
    logits = torch.randn(count, experts, generator=generator, dtype=torch.float64)
    logits = logits - skew * torch.arange(experts)
    probs, ids = logits.softmax(-1).topk(top_k)
    return x, probs.to(dtype), ids


class GroupedLayer(nn.Module):
    """Router, dispatcher and this rank's experts as a user would write them."""

    def __init__(self, dispatcher: object, first: int, count: int, experts: int) -> None:
        super().__init__()
        weights = Weights.make(experts, dtype=torch.float32)
        self.dispatcher = dispatcher
        self.gate = nn.Parameter(
            torch.randn(experts, 16, generator=torch.Generator().manual_seed(3))
        )
        own = slice(first, first + count)
        self.up = nn.Parameter(weights.up[own].clone())
        self.down = nn.Parameter(weights.down[own].clone())
        self.shared = nn.Parameter(weights.shared.clone())
        self.whole = weights

    def forward(self, x: Tensor) -> Tensor:
        dispatcher: object = self.dispatcher
        probs, ids = dispatcher.route(F.linear(x, self.gate))  # type: ignore[attr-defined]
        dispatcher.set_shared_experts(lambda t: t @ self.shared)  # type: ignore[attr-defined]
        shared, rows, counts = dispatcher.token_permutation(x, probs, ids)  # type: ignore[attr-defined]
        ends = counts.cumsum(0).to(torch.int32)
        gate, value = torch.ops.moe_fx.grouped_mm(rows, self.up, ends).chunk(2, dim=-1)
        rows = torch.ops.moe_fx.grouped_mm(F.silu(gate) * value, self.down, ends)
        out, _ = dispatcher.token_unpermutation(rows)  # type: ignore[attr-defined]
        return out + shared
