"""Recognise the router: which of the template's fields reproduce the captured weights and ids.

Contract. In: a selection and its region's parts. Out: a `Router`; ``score="custom"`` if no setting
of the template gives the captured values. The captured router stays in the graph in any case, so a
wrong name here could not change a result; it is checked by value all the same.

Pseudo-code::

    take out everything between the logits and (weights, ids); run it on random logits
    for each score function of the template: set bias and groups from the graph, read
    renormalisation and scale off the values, run moe_fx::route with these fields; equal -> that is
    the router. Ops say which to try first, values which it is: decomposed ones are found too
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx import simulate
from moe_fx.passes.extract import extract
from moe_fx.passes.roles import Selection, argument, shape, tensor_inputs
from moe_fx.passes.sizes import choose_token_count, example
from moe_fx.region import Parts, Router

aten = torch.ops.aten

_LOGIT_OPS = (aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default)
_SCORES = {
    "softmax": (aten.softmax.int,),
    "sigmoid": (aten.sigmoid.default,),
    "topk_softmax": (aten.softmax.int,),
}
_NUM_TOKENS = 16
_SEARCH_LIMIT = 100
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}


def recognise_router(selection: Selection, parts: Parts) -> Router:
    if parts.weights is None:
        return Router()
    nodes = _between(selection, parts)
    if nodes is None:
        return Router()
    logits, inner = nodes
    select_bias = _selection_bias(selection, inner, logits)
    groups, chosen, group_score = _groups(selection, inner)
    alone = extract(inner, [parts.weights, parts.ids])
    tokens = choose_token_count(
        selection.num_tokens, selection.top_k, selection.num_experts, _NUM_TOKENS
    )
    generator = torch.Generator().manual_seed(0)
    values = {
        node: example(node, tokens, generator, per_token=node is logits) for node in alone.inputs
    }
    if select_bias is not None:
        values[select_bias] = values[select_bias] * 0.1
    try:
        [(weights, ids)] = simulate.run(
            [alone.module], [[values[n] for n in alone.inputs]], resize=[tokens.resize]
        )
    except (RuntimeError, ValueError, TypeError, IndexError):
        return Router()
    weights = weights.view(tokens.wanted, selection.top_k)
    bias = None if select_bias is None else values[select_bias].reshape(-1)
    for score in _likeliest_first(inner):
        found = _fit(
            score, values[logits], bias, groups, chosen, group_score, weights, ids, selection.top_k
        )
        if found is not None:
            return found
    return Router()


def _between(selection: Selection, parts: Parts) -> tuple[Node, list[Node]] | None:
    """(logits, the router's nodes in graph order): everything between weights, ids and the one
    ``[T, E]`` matmul result they come from."""
    assert parts.weights is not None
    logits: set[Node] = set()
    inner: set[Node] = set()
    stack = [parts.weights, parts.ids]
    while stack:
        node = stack.pop()
        if node in inner or node in logits or node.op != "call_function":
            continue
        if node.target in _LOGIT_OPS:
            logits.add(node)
            continue
        inner.add(node)
        if len(inner) > _SEARCH_LIMIT:
            return None
        stack.extend(tensor_inputs(node))
    if len(logits) != 1:
        return None
    order = {node: at for at, node in enumerate(selection.node.graph.nodes)}
    return logits.pop(), sorted(inner, key=order.__getitem__)


def _selection_bias(selection: Selection, inner: list[Node], logits: Node) -> Node | None:
    """The one ``[E]`` tensor from outside that is added on the way to the selection."""
    inside = {logits, *inner}
    leaves = {
        source
        for node in inner
        for source in tensor_inputs(node)
        if source not in inside
        and shape(source)
        and shape(source)[-1] == selection.num_experts
        and all(size == 1 for size in shape(source)[:-1])
    }
    return leaves.pop() if len(leaves) == 1 else None


def _groups(selection: Selection, inner: list[Node]) -> tuple[int, int, str]:
    """(number of groups, groups selected, how a group is scored) of a group-limited selection."""
    groups, chosen, group_score = 1, 1, "top2"
    for node in inner:
        if node is selection.node or node.target not in (
            aten.topk.default,
            aten.amax.default,
            aten.max.dim,
        ):
            continue
        dims = shape(node.args[0])
        if len(dims) == 3:
            groups = int(dims[1])
            best_two = node.target is aten.topk.default and node.args[1] == 2
            group_score = "top2" if best_two else "max"
        elif node.target is aten.topk.default:
            chosen = int(argument(node, 1, "k"))
    return groups, chosen, group_score


def _likeliest_first(inner: list[Node]) -> list[str]:
    """The template's score functions, those first whose op is there: few tokens with one expert
    each, whose weight is one whatever its score, do not tell score functions apart."""
    ops = {node.target for node in inner}
    return sorted(_SCORES, key=lambda score: ops.isdisjoint(_SCORES[score]))


def _fit(
    score: str,
    logits: Tensor,
    bias: Tensor | None,
    groups: int,
    chosen: int,
    group_score: str,
    weights: Tensor,
    ids: Tensor,
    top_k: int,
) -> Router | None:
    plain, plain_ids = torch.ops.moe_fx.route(
        logits, top_k, score, bias, groups, chosen, group_score
    )
    if not torch.equal(plain_ids.sort(1).values, ids.long().sort(1).values):
        return None
    num_experts = logits.shape[1]
    theirs = _dense(weights.float(), ids, num_experts)
    ours = _dense(plain, plain_ids, num_experts)
    after_topk = score == "topk_softmax"
    tolerance = _TOLERANCE.get(weights.dtype, 1e-2)
    for renormalise in (False, True):
        mine = ours / ours.sum(1, keepdim=True) if renormalise else ours
        scale = float(theirs.sum() / mine.sum())
        if torch.allclose(theirs, mine * scale, rtol=tolerance, atol=tolerance):
            return Router(
                score="softmax" if after_topk else score,
                select_bias=bias is not None,
                num_groups=groups,
                topk_group=chosen,
                renormalise=renormalise or after_topk,
                scale=float(f"{scale:.4g}") if weights.dtype == torch.float32 else round(scale, 2),
                softmax_after_topk=after_topk,
                verified=True,
            )
    return None


def _dense(weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    return weights.new_zeros((weights.shape[0], num_experts)).scatter(1, ids.long(), weights)
