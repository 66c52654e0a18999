"""Each token gathers the weights of its own experts: small batches, no permutation."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_fx.region import Router
from tests.spellings.base import (
    BATCH,
    EXPERTS,
    HIDDEN,
    RENORMALISED,
    SEQ,
    WIDTH,
    SoftmaxRouter,
    Spelling,
    Stacked,
    TopkSoftmaxRouter,
    seeded,
)

_GPT_OSS = replace(RENORMALISED, softmax_after_topk=True)


class GptFast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(), Stacked()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        w1, w3, w2 = self.experts.w1[ids], self.experts.w3[ids], self.experts.w2[ids]
        gate = F.silu(torch.einsum("ti,taoi->tao", tokens, w1))
        up = torch.einsum("ti,taoi->tao", tokens, w3)
        rows = torch.einsum("tao,taio->tai", gate * up, w2)
        return torch.einsum("tai,ta->ti", rows, weights).reshape(x.shape)


class GptOssReference(nn.Module):
    """Biases gathered beside the weights; interleaved gate and up; a residual around it all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.router = TopkSoftmaxRouter(bias=True)
        self.mlp1_weight = nn.Parameter(torch.empty(EXPERTS, 2 * WIDTH, HIDDEN))
        self.mlp1_bias = nn.Parameter(torch.empty(EXPERTS, 2 * WIDTH))
        self.mlp2_weight = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.mlp2_bias = nn.Parameter(torch.empty(EXPERTS, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x)
        weights, ids = self.router(tokens)
        rows = torch.einsum("beck,bk->bec", self.mlp1_weight[ids, ...], tokens)
        rows = rows + self.mlp1_bias[ids, ...]
        gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(min=-7.0, max=7.0)
        rows = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        rows = torch.einsum("beck,bek->bec", self.mlp2_weight[ids, ...], rows)
        rows = rows + self.mlp2_bias[ids, ...]
        return x + torch.einsum("bec,be->bc", rows, weights)


class GatheredMatmul(nn.Module):
    """Broadcasting matmuls of one-row matrices in place of einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(renormalise=False), Stacked()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = self.router(tokens)
        row = tokens[:, None, None, :]
        gate = row @ self.experts.w1[ids].transpose(-1, -2)
        up = row @ self.experts.w3[ids].transpose(-1, -2)
        rows = (F.silu(gate) * up) @ self.experts.w2[ids].transpose(-1, -2)
        return (rows.squeeze(2) * weights.unsqueeze(-1)).sum(dim=1).view_as(x)


class GatheredOneHot(nn.Module):
    """The gather itself spelled as a product with one-hot ids."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(), Stacked()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = self.router(tokens)
        chosen = F.one_hot(ids, EXPERTS).to(tokens.dtype)
        w1 = torch.einsum("tke,efh->tkfh", chosen, self.experts.w1)
        w3 = torch.einsum("tke,efh->tkfh", chosen, self.experts.w3)
        w2 = torch.einsum("tke,ehf->tkhf", chosen, self.experts.w2)
        rows = F.silu(torch.einsum("th,tkfh->tkf", tokens, w1))
        rows = rows * torch.einsum("th,tkfh->tkf", tokens, w3)
        rows = torch.einsum("tkf,tkhf->tkh", rows, w2)
        return torch.einsum("tkh,tk->th", rows, weights).view_as(x)


class Gathered3d(nn.Module):
    """Batch and sequence stay apart from the router to the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(), Stacked()

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.router(x)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self._route(x)
        w1, w3, w2 = self.experts.w1[ids], self.experts.w3[ids], self.experts.w2[ids]
        rows = F.silu(torch.einsum("bsh,bskfh->bskf", x, w1))
        rows = rows * torch.einsum("bsh,bskfh->bskf", x, w3)
        return torch.einsum("bskf,bskhf,bsk->bsh", rows, w2, weights)


class HashRouted(Gathered3d):
    """DeepSeek-V4's first layers: a table gives the experts of each vocabulary entry; the router
    only weighs them."""

    def __init__(self) -> None:
        super().__init__()
        entries = torch.arange(16)
        self.register_buffer("experts_of", torch.stack([entries * 3 % 8, (entries * 3 + 5) % 8], 1))
        self.register_buffer("input_ids", torch.arange(BATCH * SEQ).view(BATCH, SEQ) * 7 % 16)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.experts_of[self.input_ids]
        weights = torch.sqrt(F.softplus(self.router.gate(x))).gather(-1, ids)
        return weights / weights.sum(dim=-1, keepdim=True), ids


_PLAIN = replace(RENORMALISED, renormalise=False)

SPELLINGS = (
    Spelling("gpt_fast", seeded(GptFast), "gathered weights"),
    Spelling(
        "gpt_oss_reference",
        seeded(GptOssReference),
        "gathered weights",
        router=_GPT_OSS,
        input_shape=(22, HIDDEN),
        notes="biases per expert, interleaved clamped SwiGLU, norm before and residual after",
    ),
    Spelling(
        "gathered_3d", seeded(Gathered3d), "gathered weights", notes="selection over [B, S, E]"
    ),
    Spelling(
        "hash_routed",
        seeded(HashRouted),
        "gathered weights",
        router=Router("softplus_sqrt", selection="lookup", renormalise=True, verified=True),
        notes="ids from a table indexed by vocabulary entry: no selection by score",
    ),
    Spelling("gathered_matmul", seeded(GatheredMatmul), "gathered weights", router=_PLAIN),
    Spelling(
        "gathered_one_hot",
        seeded(GatheredOneHot),
        "gathered weights",
        notes="no op indexes the weights: a one-hot matmul picks them",
    ),
)
