"""Recognise the router: which description reproduces the captured weights and ids, by value.

Contract. In: a selection and its region's parts. Out: a `Router`; ``score="custom"``, with a
``note`` saying why, if no description gives the captured values. The captured router stays in the
graph in any case, so a wrong name could not change a result; it is checked by value all the same.

Pseudo-code::

    take out everything between the logits and (weights, ids); run it on random logits
    ids that are not the selected indices as they are: must be experts, whichever column wins
    for each way to select and each way to weigh (`scores.py`): equal -> that is the router

Rejects (`Refusal`): ids that were changed after the selection and are not always those of experts.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import ELEMENTWISE_COPIES, argument, same, shape, tensor_inputs, value
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.evaluate import simulate
from moe_fx.passes.evaluate.extract import Extract, extract, structure
from moe_fx.passes.evaluate.sizes import TokenCount, choose_token_count, concrete, example
from moe_fx.passes.evaluate.typical import scalar
from moe_fx.passes.recognise.router.scores import Sample, Unfit, fit
from moe_fx.passes.roles import Selection
from moe_fx.region import Gate, Parts, Router

aten = torch.ops.aten

_LOGIT_OPS = (aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default)
_FACTORS = {aten.mul.Tensor: operator.mul, aten.div.Tensor: operator.truediv}
_NUM_TOKENS = 64
_SEARCH_LIMIT = 100
_NEAR_TIES = (4.0, 0.1)
_STEP = 1009  # from one input's seed to the next
_SEEDS = (1, 101, 201)  # in coarse dtypes some samples have ties, which may be broken either way

RouterCache = dict[str, "tuple[Router, bool] | Refusal"]
"""Of a router: its description, and whether it holds for any bias."""


def recognise_router(
    selection: Selection, parts: Parts, cache: RouterCache | None = None
) -> tuple[Router, Gate | None]:
    """The router of a region, and where its description was read off. Equal routers are run once
    per ``cache``. Raises `Refusal` if the ids can't be shown to be those of experts."""
    try:
        captured = _take_out(selection, parts)
    except Unfit as unfit:
        if not selection.exact:
            raise _unproven(selection, parts, str(unfit)) from None
        return Router(note=str(unfit)), None
    key = f"{structure(captured.alone)}\n{selection.sizes}"
    cache = {} if cache is None else cache
    if key not in cache:
        try:
            cache[key] = _recognise(selection, parts, captured)
        except Refusal as refusal:
            cache[key] = refusal
    found = cache[key]
    if isinstance(found, Refusal):
        raise Refusal(found.reason, parts.ids, found.progress)
    router, holds = found
    gate = Gate(captured.logits, captured.bias, captured.groups[2])
    return router, gate if holds else None


def _recognise(selection: Selection, parts: Parts, captured: _Captured) -> tuple[Router, bool]:
    if not selection.exact:
        _check_ids(selection, parts, captured)
    note = ""
    for seed in _SEEDS:
        try:
            router = fit(captured.samples(seed), selection)
        except Unfit as unfit:
            note = str(unfit)
        else:
            return router, captured.holds(router)
    return Router(note=note), False


def _unproven(selection: Selection, parts: Parts, why: str) -> Refusal:
    return Refusal(
        f"the selected ids are changed before they dispatch, and are not shown to be those of the "
        f"{selection.num_experts} experts: {why}",
        parts.ids,
        5,
    )


def _check_ids(selection: Selection, parts: Parts, captured: _Captured) -> None:
    """Let each column of the logits win in turn: the ids must be those of experts."""
    columns = concrete(shape(captured.logits)[-1])
    firsts = range(0, columns, captured.tokens.wanted)
    for first, own in product(firsts, (False, True)):
        try:
            ids = captured.sample(winners_from=first, own=own).ids
        except Unfit as unfit:
            raise _unproven(selection, parts, str(unfit)) from None
        if int(ids.min()) < 0 or int(ids.max()) >= selection.num_experts:
            raise Refusal(
                f"ids from {int(ids.min())} to {int(ids.max())} are dispatched to "
                f"{selection.num_experts} experts",
                parts.ids,
                5,
            )


# -- the captured router, to be run ----------------------------------------------------------------


@dataclass(frozen=True)
class _Captured:
    """alone: the router's nodes, from ``logits`` (times ``logit_scale``) to weights and ids.
    bias, expert_scale: the ``[E]`` tensors from outside that are added on the way to the selection,
    or looked up by the selected ids; learned_scales: the scalars from outside."""

    selection: Selection
    alone: Extract
    inner: tuple[Node, ...]
    logits: Node
    logit_scale: float
    bias: Node | None
    expert_scale: Node | None
    learned_scales: tuple[Node, ...]
    tokens: TokenCount
    groups: tuple[int, int, str]
    has_weights: bool

    def holds(self, router: Router) -> bool:
        """Whether ``router`` describes this with any bias. It does not where experts of groups that
        are not selected score zero, not less than all others: they are selected where those score
        below zero."""
        if router.num_groups == 1 or self.bias is None:
            return True
        try:
            return fit(self.sample(bias_shift=-3.0), self.selection) == router
        except Unfit:
            return False

    def samples(self, seed: int) -> Sample:
        """`sample` of at least `_NUM_TOKENS` tokens, also where the graph is for fewer."""
        rounds = -(-_NUM_TOKENS // self.tokens.wanted)
        found = [self.sample(seed=seed) for seed in range(seed, seed + rounds)]
        weights = [sample.weights for sample in found if sample.weights is not None]
        return replace(
            found[0],
            logits=torch.cat([sample.logits for sample in found]),
            weights=torch.cat(weights) if weights else None,
            ids=torch.cat([sample.ids for sample in found]),
        )

    def sample(
        self,
        winners_from: int | None = None,
        seed: int = 1,
        bias_shift: float = 0.0,
        own: bool = False,
    ) -> Sample:
        """Weights and ids for random logits; token ``i`` prefers column ``winners_from + i``. The
        logits and ids that come from outside depend on ``seed``. own: other inputs are as they were
        when the graph was captured, where that is known."""
        values: dict[Node, Any] = {}
        for at, node in enumerate(self.alone.inputs):
            values[node] = example(
                node,
                self.tokens,
                _STEP * at + (seed if node is self.logits else 0),
                per_token=node in (self.logits, self.selection.node) and self._resizable,
                own=own,
            )
        logits = values[self.logits]
        if not self._selects_by_topk:
            center, spread = _NEAR_TIES
            logits = logits * spread + center
        logits = logits / self.logit_scale
        flat = logits.reshape(-1, logits.shape[-1])
        if winners_from is not None:
            rows = torch.arange(flat.shape[0])
            flat[rows, (winners_from + rows) % flat.shape[1]] += 100.0
        values[self.logits] = flat.reshape(logits.shape)
        if self.bias is not None:
            values[self.bias] = values[self.bias] * 0.3 + bias_shift
        for node in self.learned_scales:
            values[node] = torch.full_like(values[node], 1.25)
        if self.selection.looked_up:
            values[self.selection.node] = self._random_ids(values[self.selection.node], seed)
        weights, ids = self._run([values[node] for node in self.alone.inputs])
        return Sample(
            logits=flat * self.logit_scale,
            bias=None if self.bias is None else values[self.bias].reshape(-1),
            expert_scale=None if self.expert_scale is None else values[self.expert_scale],
            learned_scale=1.25 ** len(self.learned_scales),
            logit_scale=self.logit_scale,
            groups=self.groups,
            thresholds=tuple(
                t for n in self.inner if n.target is aten.gt.Scalar and (t := _number(n.args[1]))
            ),
            weights=None if weights is None else weights.reshape(-1, self.selection.top_k),
            ids=ids.reshape(-1, self.selection.top_k).long(),
        )

    @property
    def _resizable(self) -> bool:
        return len(self.selection.lead) == 1

    @property
    def _selects_by_topk(self) -> bool:
        return self.selection.looked_up or any(
            n.target is aten.topk.default for n in self.selection.selectors
        )

    def _random_ids(self, like: Tensor, seed: int) -> Tensor:
        experts = self.selection.num_experts
        generator = torch.Generator().manual_seed(seed)
        ids = torch.rand(self.tokens.wanted, experts, generator=generator).argsort(1)
        return ids[:, : self.selection.top_k].reshape(like.shape).to(like.dtype)

    def _run(self, inputs: list[Any]) -> tuple[Tensor | None, Tensor]:
        try:
            [outputs] = simulate.run([self.alone.module], [inputs], resize=[self.tokens.resize])
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            message = str(error).splitlines()[0] if str(error) else ""
            raise Unfit(f"the router does not run alone: {message}") from error
        return outputs if self.has_weights else (None, outputs[0])


def _take_out(selection: Selection, parts: Parts) -> _Captured:
    logits, inner = _between(selection, parts)
    logits, factor = _scaled(logits, inner)
    inside = {logits, *inner}
    outputs = [n for n in (parts.weights, parts.ids) if n is not None]
    alone = extract([n for n in inner if n is not logits], outputs)
    if logits not in alone.copies:
        raise Unfit("neither weights nor ids depend on the logits")
    leaves = {
        source: node
        for node in inner
        for source in tensor_inputs(node)
        if source not in inside and isinstance(value(source), Tensor)
    }
    per_expert = [
        n for n in leaves if shape(n) and shape(n)[-1] in (selection.columns, selection.num_experts)
    ]
    per_expert = [n for n in per_expert if all(size == 1 for size in shape(n)[:-1])]
    scales = [n for n in per_expert if leaves[n].target is aten.index.Tensor]
    biases = [n for n in per_expert if n not in scales]
    scalars = [n for n in leaves if value(n).numel() == 1 and n not in per_expert]
    num_tokens, k, experts = selection.num_tokens, selection.top_k, selection.num_experts
    fixed = [n for n in alone.inputs if n not in (logits, selection.node) and _leads(n, num_tokens)]
    if len(selection.lead) == 1 and not fixed:
        tokens = choose_token_count(num_tokens, k, experts, _NUM_TOKENS)
    else:
        tokens = TokenCount(num_tokens, k, concrete(num_tokens))
    return _Captured(
        selection=selection,
        alone=alone,
        inner=tuple(inner),
        logits=logits,
        logit_scale=factor,
        bias=biases[0] if len(biases) == 1 else None,
        expert_scale=scales[0] if len(scales) == 1 else None,
        learned_scales=tuple(n for n in scalars if value(n).dtype.is_floating_point),
        tokens=tokens,
        groups=_groups(selection, inner),
        has_weights=parts.weights is not None,
    )


def _leads(node: Node, size: Any) -> bool:
    """Whether the first dim of ``node`` is of this size: a mask of the tokens, it may be."""
    return bool(shape(node)) and same(shape(node)[0], size)


def _between(selection: Selection, parts: Parts) -> tuple[Node, list[Node]]:
    """(logits, the router's nodes in graph order): everything between weights, ids and the one
    matmul result they come from."""
    logits: set[Node] = set()
    inner: set[Node] = set()
    stack = [n for n in (parts.weights, parts.ids) if n is not None]
    while stack:
        node = stack.pop()
        if node in inner or node in logits or node.op != "call_function":
            continue
        if selection.looked_up and node is selection.node:
            continue
        if node.target in _LOGIT_OPS:
            logits.add(node)
            continue
        inner.add(node)
        if len(inner) > _SEARCH_LIMIT:
            raise Unfit(f"the router has more than {_SEARCH_LIMIT} ops after its last matmul")
        stack.extend(tensor_inputs(node))
    if len(logits) != 1:
        names = ", ".join(sorted(n.name for n in logits)) or "none"
        raise Unfit(f"the router does not score with one matmul, but {names}")
    return logits.pop(), sorted(inner)


def _scaled(logits: Node, inner: list[Node]) -> tuple[Node, float]:
    """(logits, constant factor on them): muse_spark."""
    members = set(inner)
    node = logits
    while True:
        readers = [user for user in node.users if user in members]
        if len(readers) != 1:
            return logits, 1.0
        (reader,) = readers
        if reader.target in _FACTORS:
            number = _number(reader.args[1])
            return logits, float(_FACTORS[reader.target](1.0, number)) if number else 1.0
        if reader.target not in ELEMENTWISE_COPIES:
            return logits, 1.0
        node = reader


def _number(argument: Any) -> float | None:
    """A constant of the graph. Under ``dynamic=True`` the model's floats are nodes."""
    if isinstance(argument, Node) and isinstance(value(argument), torch.SymFloat):
        return float(scalar(argument))
    return float(argument) if isinstance(argument, (int, float)) else None


def _groups(selection: Selection, inner: list[Node]) -> tuple[int, int, str]:
    """(number of groups, groups selected, how a group is scored) of a group-limited selection."""
    groups, chosen, group_score = 1, 1, "top2"
    for node in inner:
        if node in selection.selectors or node.target not in (
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
