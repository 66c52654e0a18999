"""A Python loop over experts, unrolled by capture."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.base import (
    EXPERTS,
    HIDDEN,
    RENORMALISED,
    SIGMOID_BIASED,
    SOFTMAX,
    TOP_K,
    SigmoidRouter,
    SoftmaxRouter,
    Spelling,
    Stacked,
    SwiGLU,
    TopkSoftmaxRouter,
    expert_list,
    seeded,
)
from tests.spellings.sorted_rows import counted_by_histc


class SplitRows(nn.Module):
    """torchtitan's for-loop: sorted rows split by counts, stacked weights indexed by expert."""

    def __init__(self, before: bool = False) -> None:
        super().__init__()
        self.router, self.experts = SigmoidRouter(2.5), Stacked()
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        order = torch.argsort(ids.view(-1), stable=True)
        row_weights = weights.view(-1)[order].reshape(-1, 1)
        index = (order // TOP_K).reshape(-1, 1).expand(-1, HIDDEN)
        rows = torch.gather(tokens, dim=0, index=index)
        if self.before:
            rows = rows * row_weights
        counts = counted_by_histc(ids).long().tolist()
        outputs = []
        for e, part in enumerate(torch.split(rows, counts, dim=0)):
            hidden = F.silu(torch.matmul(part, self.experts.w1[e].transpose(-2, -1)))
            hidden = hidden * torch.matmul(part, self.experts.w3[e].transpose(-2, -1))
            outputs.append(torch.matmul(hidden, self.experts.w2[e].transpose(-2, -1)))
        rows = torch.cat(outputs, dim=0)
        if not self.before:
            rows = rows * row_weights
        return torch.zeros_like(tokens).scatter_add(0, index, rows).view_as(x)


class DeepseekSplit(nn.Module):
    """DeepSeek's inference form: experts as modules, rows put back by the sort's permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SigmoidRouter(2.5), expert_list()
        self.shared = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        counts = ids.new_zeros((ids.shape[0], EXPERTS)).scatter_(1, ids, 1).sum(dim=0)
        order = ids.view(-1).argsort(stable=True)
        parts = tokens[order // TOP_K].split(counts.tolist())
        rows = torch.cat([expert(p) for expert, p in zip(self.experts, parts, strict=True)])
        pairs = torch.empty_like(rows)
        pairs[order] = rows
        out = pairs.view(*ids.shape, -1).mul_(weights.unsqueeze(-1)).sum(dim=1)
        return (out + self.shared(tokens)).view_as(x)


class ClassicMixtral(nn.Module):
    """For each expert, the (slot, token) pairs of a one-hot mask; results added in place."""

    def __init__(self, stacked: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.router = SoftmaxRouter(renormalise=not shared)
        self.experts = Stacked() if stacked else expert_list()
        self.shared = SwiGLU() if shared else None
        self.shared_gate = nn.Linear(HIDDEN, 1, bias=False) if shared else None

    def _expert(self, e: int, rows: Tensor) -> Tensor:
        if isinstance(self.experts, nn.ModuleList):
            return self.experts[e](rows)
        hidden = F.silu(F.linear(rows, self.experts.w1[e])) * F.linear(rows, self.experts.w3[e])
        return F.linear(hidden, self.experts.w2[e])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        out = torch.zeros_like(tokens)
        mask = F.one_hot(ids, num_classes=EXPERTS).permute(2, 1, 0)
        for e in range(EXPERTS):
            slot, token = torch.where(mask[e])
            rows = tokens[None, token].reshape(-1, HIDDEN)
            rows = self._expert(e, rows) * weights[token, slot, None]
            out.index_add_(0, token, rows.to(x.dtype))
        if self.shared is not None and self.shared_gate is not None:
            out = out + torch.sigmoid(self.shared_gate(tokens)) * self.shared(tokens)
        return out.reshape(x.shape)


class LitGpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = TopkSoftmaxRouter(), expert_list()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        masks = (ids.unsqueeze(-1) == torch.arange(EXPERTS)).permute(2, 0, 1)
        out = torch.zeros_like(tokens)
        for mask, expert in zip(masks, self.experts, strict=True):
            token, slot = torch.where(mask)
            out[token] += weights[token, slot, None] * expert(tokens[token])
        return out.view(x.shape)


class MistralInference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = TopkSoftmaxRouter(), expert_list()

    def forward(self, tokens: Tensor) -> Tensor:
        weights, ids = self.router(tokens)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += weights[token, slot, None] * expert(tokens[token])
        return out


class DeepseekTrain(nn.Module):
    """A row per pair, in pair order; boolean masks pick an expert's rows and put them back."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(renormalise=False), expert_list()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        rows = tokens.repeat_interleave(TOP_K, dim=0)
        flat = ids.view(-1)
        out = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            out[flat == e] = expert(rows[flat == e])
        return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1).view_as(x)


class NonzeroTokens(nn.Module):
    """Tokens of an expert from its column of a ``[T, E]`` gate matrix (early DBRX, NLLB)."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SoftmaxRouter(), expert_list()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, ids = self.router(tokens)
        gates = torch.zeros(tokens.shape[0], EXPERTS, dtype=x.dtype).scatter_(1, ids, weights)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token = torch.nonzero(gates[:, e]).squeeze(-1)
            out = out.index_add(0, token, expert(tokens[token]) * gates[token, e].unsqueeze(-1))
        return out.view_as(x)


_AFTER = replace(RENORMALISED, softmax_after_topk=True)


def _loop(name: str, make: object, **kwargs: object) -> Spelling:
    return Spelling(name, seeded(make), "loop", needs_fullgraph=True, **kwargs)  # type: ignore[arg-type]


SPELLINGS = (
    Spelling(
        "torchtitan_for_loop",
        seeded(SplitRows),
        "split rows",
        router=SIGMOID_BIASED,
        needs_fullgraph=True,
        notes="split sizes are unbacked symbols read from a tensor",
    ),
    Spelling(
        "torchtitan_for_loop_before",
        seeded(partial(SplitRows, before=True)),
        "split rows",
        router=SIGMOID_BIASED,
        weights_first=True,
        needs_fullgraph=True,
    ),
    Spelling(
        "deepseek_split",
        seeded(DeepseekSplit),
        "split rows",
        router=SIGMOID_BIASED,
        shared_expert=True,
        needs_fullgraph=True,
        notes="experts' weights are separate parameters",
    ),
    _loop("classic_mixtral", ClassicMixtral),
    _loop("classic_mixtral_stacked", partial(ClassicMixtral, stacked=True)),
    _loop(
        "classic_qwen2", partial(ClassicMixtral, shared=True), router=SOFTMAX, shared_expert=True
    ),
    _loop("lit_gpt", LitGpt, router=_AFTER, notes="index_put without accumulate: read, add, write"),
    _loop("mistral_inference", MistralInference, router=_AFTER, input_shape=(22, HIDDEN)),
    _loop("deepseek_train", DeepseekTrain, router=SOFTMAX, notes="boolean index and index_put"),
    _loop("nonzero_tokens", NonzeroTokens, notes="a pair whose weight is zero is not computed"),
)
