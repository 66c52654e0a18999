"""Ways to score, select and weigh experts, and which of them a router's values show.

Shapes: ``N`` tokens, ``C`` columns of logits, ``E`` experts, ``K`` experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.passes.roles import Selection
from moe_fx.region import Router

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
_NEG_INF = float("-inf")

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "softplus_sqrt": lambda logits: F.softplus(logits).sqrt(),
    "softplus": F.softplus,
    "logits": lambda logits: logits,
}


class Unfit(Exception):
    """Why the router is called custom."""


@dataclass(frozen=True)
class Sample:
    """What a captured router made of random logits.

    logits ``[N, C]``, with ``logit_scale`` applied. weights ``[N, K]`` (None: rows are not
    weighted), ids ``[N, K]``. bias, expert_scale ``[E]``: tensors found in the router.
    learned_scale: product of the scalars found. groups: (number, selected, "top2" or "max").
    thresholds: constants that something is compared with.
    """

    logits: Tensor
    weights: Tensor | None
    ids: Tensor
    bias: Tensor | None
    expert_scale: Tensor | None
    learned_scale: float
    logit_scale: float
    groups: tuple[int, int, str]
    thresholds: tuple[float, ...]


def fit(sample: Sample, selection: Selection) -> Router:
    """The description that gives the sample's ids and weights; raises `Unfit` if none does."""
    if sample.weights is None:
        raise Unfit("the experts' rows are not weighted")
    selects = list(_ways_to_select(sample, selection))
    if not selects:
        raise Unfit("no known selection gives the captured ids")
    for router in selects:
        if router.score == "sparsemixer":
            return router
        for weighed in _ways_to_weigh(sample, selection, router):
            return weighed
    raise Unfit("the ids are those of a known selection, but no known score gives the weights")


# -- selecting -------------------------------------------------------------------------------------


def _ways_to_select(sample: Sample, selection: Selection) -> Iterator[Router]:
    """Routers that give the sample's ids; ``score`` is what the selection is over."""
    plain = Router(logit_scale=float(f"{sample.logit_scale:.4g}"))
    if selection.looked_up:
        yield replace(plain, selection="lookup")
        return
    yield from _sparsemixer(sample, selection, plain)
    groups, chosen, group_score = sample.groups
    biases = [sample.bias] if sample.bias is not None else []
    for bias in (*biases, None):
        for name, score in SCORES.items():
            choice = score(sample.logits.float())[:, : selection.columns]
            if bias is not None and bias.numel() != choice.shape[1]:
                continue
            choice = choice if bias is None else choice + bias
            if groups > 1 and choice.shape[1] % groups:
                continue
            choice = _best_groups(choice, groups, chosen, group_score) if groups > 1 else choice
            ids = choice.topk(selection.top_k, dim=-1).indices
            if _same_ids(ids, sample, selection):
                yield replace(
                    plain,
                    score=name,
                    select_bias=bias is not None,
                    num_groups=groups,
                    topk_group=chosen,
                )


def _best_groups(choice: Tensor, groups: int, chosen: int, group_score: str) -> Tensor:
    grouped = choice.unflatten(-1, (groups, -1))
    best = grouped.topk(2 if group_score == "top2" else 1, dim=-1).values.sum(-1)
    kept = torch.zeros_like(best).scatter(-1, best.topk(chosen, dim=-1).indices, 1.0).bool()
    return grouped.masked_fill(~kept.unsqueeze(-1), _NEG_INF).flatten(-2)


def _same_ids(ids: Tensor, sample: Sample, selection: Selection) -> bool:
    """The same experts for each token. A column that is no expert must have weight zero."""
    if selection.columns == selection.num_experts:
        return torch.equal(ids.sort(1).values, sample.ids.sort(1).values)
    assert sample.weights is not None
    skipped = ids >= selection.num_experts
    return bool(torch.where(skipped, sample.weights == 0, ids == sample.ids).all())


def _sparsemixer(sample: Sample, selection: Selection, plain: Router) -> Iterator[Router]:
    """Phi-3.5-MoE: each slot takes the best expert left, weighed by a softmax over those that come
    close to it."""
    for threshold in set(sample.thresholds):
        logits = sample.logits.float()
        left, ids, weights = logits, [], []
        for _ in range(selection.top_k):
            best, at = left.max(-1, keepdim=True)
            far = (best - logits) / logits.abs().clamp(min=best) > threshold
            weights.append(left.masked_fill(far, _NEG_INF).softmax(-1).gather(-1, at))
            ids.append(at)
            left = left.scatter(-1, at, _NEG_INF)
        if torch.equal(torch.cat(ids, -1), sample.ids) and _close(sample, torch.cat(weights, -1)):
            yield replace(plain, score="sparsemixer", verified=True)
            return


# -- weighing --------------------------------------------------------------------------------------


def _ways_to_weigh(sample: Sample, selection: Selection, router: Router) -> Iterator[Router]:
    assert sample.weights is not None
    logits = sample.logits.float()
    shared = logits.shape[1] - selection.columns if selection.columns else 0
    for name, base, others in _scored(sample, selection, router):
        ways = {False: base, True: base / base.sum(1, keepdim=True)}
        for renormalise, weights in ways.items():
            yield from _scaled(sample, selection, router, name, renormalise, weights)
        if shared and others is not None:
            weights = base / (base.sum(1, keepdim=True) + others.sum(1, keepdim=True))
            for found in _scaled(sample, selection, router, name, True, weights):
                yield replace(found, shared_columns=shared)


def _scored(
    sample: Sample, selection: Selection, router: Router
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(score, scores of the selected, scores of the columns that can't be selected)."""
    logits = sample.logits.float()
    columns = selection.columns or logits.shape[1]
    free = router.score == "logits" or not _depends_on_score(router)
    for name in SCORES if free else (router.score,):
        scores = SCORES[name](logits)
        yield name, scores.gather(1, sample.ids), scores[:, columns:]
    if free:
        yield "topk_softmax", logits.gather(1, sample.ids).softmax(-1), None


def _scaled(
    sample: Sample,
    selection: Selection,
    router: Router,
    name: str,
    renormalise: bool,
    weights: Tensor,
) -> Iterator[Router]:
    """The router, if ``weights`` are the sample's up to factors."""
    assert sample.weights is not None
    theirs = sample.weights.float()
    zero = selection.columns - selection.num_experts if selection.columns else 0
    after_topk = name == "topk_softmax"
    for learned in sorted({sample.learned_scale, 1.0}, reverse=True):
        for expert_scale in (sample.expert_scale, None):
            mine = weights * learned
            if expert_scale is not None:
                mine = mine * expert_scale.float().reshape(-1)[sample.ids]
            if zero:
                mine = torch.where(theirs == 0, theirs, mine)
            scale = float(theirs.sum() / mine.sum())
            if not _close(sample, mine * scale):
                continue
            yield replace(
                router,
                score="softmax" if after_topk else name,
                renormalise=renormalise or after_topk,
                softmax_after_topk=after_topk,
                select_on_logits=_depends_on_score(router) and name != router.score,
                expert_scale=expert_scale is not None,
                learned_scale=learned != 1.0,
                zero_experts=zero,
                scale=_rounded(scale, sample.weights.dtype),
                verified=True,
            )
            return


def _depends_on_score(router: Router) -> bool:
    """Without bias and groups every score function selects the same experts."""
    return router.select_bias or router.num_groups > 1


def _rounded(scale: float, dtype: torch.dtype) -> float:
    return float(f"{scale:.4g}") if dtype == torch.float32 else round(scale, 2)


def _close(sample: Sample, mine: Tensor) -> bool:
    assert sample.weights is not None
    tolerance = _TOLERANCE.get(sample.weights.dtype, 1e-2)
    return torch.allclose(sample.weights.float(), mine, rtol=tolerance, atol=tolerance)
