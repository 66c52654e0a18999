"""A small MoE layer in plain torch, with siblings that break something; importable on ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """``[..., H] -> [..., H]``: 2 of 8 experts; each row meets its own copy of the weights."""

    def __init__(self, num_experts: int = 8, hidden: int = 32, width: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(sizes, generator=generator) / sizes[-1] ** 0.5)

        self.num_experts, self.hidden = num_experts, hidden
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.gate.weight = parameter(num_experts, hidden)
        self.experts = nn.ParameterDict(
            {
                "up": parameter(num_experts, hidden, width),
                "down": parameter(num_experts, width, hidden),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.hidden)
        weights, ids = self.select(self.gate(tokens).softmax(-1))
        out = experts(tokens, ids, weights, self.experts["up"], self.experts["down"])
        return out.view(x.shape)

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(2)  # type: ignore[return-value]


class LowestScores(Layer):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(2, largest=False)  # type: ignore[return-value]


class TwoGraphs(Layer):
    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        torch._dynamo.graph_break()
        return result + 1


class OtherOnEachCall(Layer):
    """Not a function of its arguments: adds what no other call adds, in the compiled graph too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(())


def experts(tokens: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """tokens ``[T, H]``, ids and weights ``[T, K]``, up ``[E, H, F]``, down ``[E, F, H]``."""
    pairs = ids.reshape(-1)
    rows = tokens.repeat_interleave(ids.shape[1], 0).unsqueeze(1)
    hidden = F.silu(torch.bmm(rows, up[pairs]))
    out = torch.bmm(hidden, down[pairs]).squeeze(1) * weights.reshape(-1, 1)
    return out.view(*ids.shape, tokens.shape[1]).sum(1)


def functional(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The layer with its weights as arguments; also returns the ids."""
    weights, ids = (x @ gate).softmax(-1).topk(2)
    return experts(x, ids, weights, up, down), ids


def two_layers(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    first, _ = functional(x, gate, up, down)
    return functional(x + first, gate, up, down)[0]


def arguments(*sizes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For `functional`: tokens of these sizes, gate and weights."""
    layer = Layer()
    weights = (layer.gate.weight.t(), layer.experts["up"], layer.experts["down"])
    gate, up, down = (weight.detach().clone() for weight in weights)
    return tokens(*sizes), gate, up, down


def tokens(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1))
