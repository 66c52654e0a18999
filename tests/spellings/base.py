"""What spellings are made of: the record that describes one, routers, experts, seeded weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_fx.region import Router

HIDDEN, WIDTH, EXPERTS, TOP_K = 32, 24, 8, 2
BATCH, SEQ = 2, 11

Dispatch = Literal["gathered weights", "sorted rows", "split rows", "loop", "dense", "capacity"]

SOFTMAX = Router("softmax", verified=True)
RENORMALISED = replace(SOFTMAX, renormalise=True)
SIGMOID = Router("sigmoid", verified=True)


@dataclass(frozen=True)
class Spelling:
    """One way public projects write an MoE block.

    build: the module in eval mode, with the same weights on every call. input_shape: of its one
    floating input (the block's first argument). dispatch: how tokens reach experts. router: the
    fields that a correct reading of the graph finds. weights_first: routing weights multiply
    tokens before the experts. drops: tokens beyond an expert's capacity are lost, so that the
    result for a token depends on other tokens. shared_expert: as in `moe_fx.Region`.
    needs_fullgraph: captured in one graph only where ops with data-dependent sizes are captured
    (``fullgraph=True``, or Dynamo's ``capture_scalar_outputs`` and
    ``capture_dynamic_output_shape_ops``). notes: what is peculiar to it.
    """

    name: str
    build: Callable[[], nn.Module]
    dispatch: Dispatch
    router: Router = RENORMALISED
    num_experts: int = EXPERTS
    top_k: int = TOP_K
    input_shape: tuple[int, ...] = (BATCH, SEQ, HIDDEN)
    dtype: torch.dtype = torch.float32
    weights_first: bool = False
    drops: bool = False
    shared_expert: bool = False
    needs_fullgraph: bool = False
    notes: str = ""

    def tokens(self, seed: int = 1) -> Tensor:
        """Random input of ``input_shape``."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.input_shape, generator=generator).to(self.dtype)


def seeded(
    make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32
) -> Callable[[], nn.Module]:
    """``make`` with weights that are the same on every call and tell experts apart."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = make()
            with torch.no_grad():
                for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                    if tensor.is_floating_point():
                        small = tensor.dim() < 2 or "bias" in name
                        tensor.normal_(std=0.1 if small else 1.5 * tensor.shape[-1] ** -0.5)
        for buffer in module.buffers():
            buffer.is_buffer = True  # type: ignore[attr-defined]
        return module.to(dtype).eval()

    return build


# -- routers: tokens [..., H] -> (weights [..., K], ids [..., K]) ----------------------------------


class SoftmaxRouter(nn.Module):
    """Softmax over all experts in float32, then the best K."""

    def __init__(self, top_k: int = TOP_K, renormalise: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.top_k, self.renormalise = top_k, renormalise

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.softmax(self.gate(tokens), dim=-1, dtype=torch.float)
        weights, ids = torch.topk(scores, self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(tokens.dtype), ids


class TopkSoftmaxRouter(nn.Module):
    """The best K logits, then a softmax over those."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=bias)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits, ids = torch.topk(self.gate(tokens), TOP_K)
        return F.softmax(logits, dim=-1, dtype=torch.float).to(tokens.dtype), ids


class SigmoidRouter(nn.Module):
    """Sigmoid scores; a bias per expert moves the selection only; sum to one, times ``scale``."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.register_buffer("expert_bias", torch.zeros(EXPERTS))
        self.scale = scale

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(self.gate(tokens).to(torch.float32))
        _, ids = torch.topk(scores + self.expert_bias, k=TOP_K, dim=-1, sorted=False)
        weights = scores.gather(dim=-1, index=ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.scale, ids


SIGMOID_BIASED = Router("sigmoid", select_bias=True, renormalise=True, scale=2.5, verified=True)


# -- experts ---------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """One expert as a module of its own."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, width, bias=False)
        self.w2 = nn.Linear(width, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, width, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(rows)) * self.w3(rows))


def expert_list() -> nn.ModuleList:
    return nn.ModuleList(SwiGLU() for _ in range(EXPERTS))


class Stacked(nn.Module):
    """The SwiGLU weights of all experts: w1, w3 ``[E, F, H]`` and w2 ``[E, H, F]``."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))
        self.w2 = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.w3 = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))
