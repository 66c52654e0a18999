"""Run a part of a captured graph on values of its own making: tokens, parameters, router logits.

Contract. ``Trials.run(case)`` computes every node between the inputs (tokens, logits, parameters,
and what else comes from outside) and a result, and the parameters that a body reads. Cases differ
in the logits, and in the number of tokens where that is not fixed in the graph. Each input has
values of its own, so that ``rerun`` can change one alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_fx.compat import number, symbols
from moe_fx.graph.flow import closure
from moe_fx.graph.gathers import gather_of
from moe_fx.graph.names import view_root
from moe_fx.graph.nodes import is_integer, shape, value
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.evaluate.on_host import ROUNDED, call_on_host, can_be_exact, exactly
from moe_fx.passes.evaluate.typical import drawn, kind_of
from moe_fx.passes.evaluate.uses import reads_values
from moe_fx.passes.recognise.by_value.rows.layout import Body
from moe_fx.passes.recognise.by_value.surroundings import Surroundings
from moe_fx.passes.roles import Selection

_UNKNOWN = 6  # what stands for a size of which nothing is known
_MOST_TOKENS = 2048
_SEEDS, _FIXED = 1009, 7  # of an input; of a parameter, in every case
_SLIGHT = 0.01  # of what is added to scores, where each expert is to be selected in turn
_SIZES = (1.0, 0.0, 1e6, 1e-3, 1e-30, 1e12, 1e-8, 1e-16)

_LIMITS = (
    *(getattr(torch.ops.aten, name).Scalar for name in ("lt", "le", "gt", "ge")),
    torch.ops.aten.clamp.default,
    torch.ops.aten.clamp_max.default,
)

Values = dict[Node, Any]


@dataclass(frozen=True)
class Case:
    """logits: how they are drawn; ``first``: the expert that the first token prefers, if every
    expert is preferred in turn, or the size that it has. more_tokens: than the graph was captured
    with. own: inputs have the values that are known of them. sizes: tokens, and logits, are from
    zero to very large."""

    name: str
    logits: str
    seed: int = 0
    more_tokens: bool = False
    own: bool = False
    first: int = 0
    sizes: bool = False


CASES = (
    Case("random routing", "normal", 1),
    Case("other random routing", "normal", 2),
    Case("only the last experts", "last"),
    Case("only the first experts", "first"),
    Case("extreme scores", "extreme", 3),
    Case("ties", "ties"),
    Case("every expert in turn", "turns"),
)
SIZES = (
    Case("tokens from zero to very large", "sizes", 9, sizes=True),
    Case("tokens from very small to large", "sizes", 10, sizes=True, first=4),
)
OWN = Case("the values at capture", "normal", 6, own=True)
MORE_TOKENS = (
    Case("more tokens", "normal", 4, more_tokens=True),
    Case("more tokens, only the last experts", "last", 5, more_tokens=True),
)


class Trials:
    """nodes: what is computed, in graph order; inputs: what is made up."""

    def __init__(
        self,
        selection: Selection,
        around: Surroundings,
        tokens: list[Node],
        result: Node,
        body: Body,
        ids: Iterable[Node],
    ) -> None:
        self.selection, self.around, self.tokens, self.result = selection, around, tokens, result
        operands = [of for each in body.operands.values() for of in _as_tuple(each)]
        self.nodes, self.inputs = self._region([result, *operands, *ids])
        for node in self.nodes:
            if "c10d" in getattr(node.target, "namespace", ""):
                raise Refusal("a collective takes part between tokens and result", node, 5)
        self.exact = can_be_exact(self.nodes)
        dims = [size for node in self.inputs for size in shape(node)]
        dims += [value(n) for n in self.inputs if isinstance(value(n), torch.SymInt)]
        self._numbers = symbols(dims, _UNKNOWN)
        lead = shape(tokens[0])[:-1]
        self._growing = [s for s in symbols(lead, _UNKNOWN) if s in self._numbers]
        if self._growing:
            self._check_reach()

    def _check_reach(self) -> None:
        """A number that positions or counts are compared with may be a capacity: trials must have
        so many tokens."""
        for node in self.nodes:
            source: Any = node.args[0] if node.args else None
            if node.target not in _LIMITS or not isinstance(source, Node) or not is_integer(source):
                continue
            reached = [a for a in node.args[1:] if type(a) is int and abs(a) >= _MOST_TOKENS // 2]
            if reached and self.around.what(source) == "route":
                raise Refusal(
                    f"unproved: what {node} compares with {reached[0]} is a count or a position, "
                    f"perhaps, and trials have {_MOST_TOKENS} tokens at most",
                    node,
                    5,
                )

    @property
    def cases(self) -> tuple[Case, ...]:
        known = any("real" in node.meta or "scalar" in node.meta for node in self.inputs)
        return CASES + SIZES + (OWN,) * known + MORE_TOKENS * bool(self._growing)

    @property
    def turns(self) -> Iterator[Case]:
        """Cases in which each expert is selected by some token of one of them."""
        for first in range(self.selection.num_experts):
            yield Case(f"expert {first} and others", "turns", 8, first=first)

    @cached_property
    def perturbed(self) -> list[tuple[Node, ...]]:
        """The inputs whose values are read, each alone; views of the tokens together."""
        tokens = tuple(node for node in self.inputs if node in self.tokens)
        return [(n,) for n in self.inputs if n not in tokens and self._is_read(n)] + [tokens]

    def _is_read(self, node: Node) -> bool:
        if node not in self.around.logits and kind_of(node) in ("size", "constant"):
            return False
        inside = {*self.nodes}
        return any(user in inside and reads_values(user) for user in node.users)

    def _region(self, ends: list[Node]) -> tuple[list[Node], list[Node]]:
        inside: set[Node] = set()
        inputs: dict[Node, None] = {}
        outside = {*self.tokens, *self.around.logits}
        stack = list(ends)
        while stack:
            node = stack.pop()
            if node in inside or node in inputs:
                continue
            made_up = (
                node.op != "call_function"
                or node in outside
                or gather_of(node) is not None
                or self.around.is_above(node)
            )
            if made_up:
                inputs[node] = None
            else:
                inside.add(node)
                stack += node.all_input_nodes
        return sorted(inside), sorted(inputs)

    def run(self, case: Case, gradients: bool = False) -> Values:
        """Values of all nodes; with ``gradients``, such as autograd follows, from the floating
        inputs on. Raises `Refusal` if the graph can't be run so."""
        values = {node: self._drawn(node, case) for node in self.inputs}
        if gradients:
            for made in values.values():
                if isinstance(made, Tensor) and made.is_floating_point():
                    made.requires_grad_()
        cut = _without_gradients(self.result.graph) if gradients else set()
        self._compute(self.nodes, values, case, cut)
        return values

    def rerun(
        self, case: Case, values: Values, changed: Collection[Node], again: int = 1
    ) -> Values:
        """As ``values`` of a run of ``case``, with other values of the inputs ``changed``: the
        ``again``-th others."""
        after = dict(values)
        touched = set(changed)
        for node in changed:
            after[node] = self._drawn(node, case, again)
        later = []
        for node in self.nodes:
            if not touched.isdisjoint(node.all_input_nodes):
                touched.add(node)
                later.append(node)
        self._compute(later, after, case)
        return after

    def _compute(
        self, nodes: Iterable[Node], values: Values, case: Case, cut: Collection[Node] = ()
    ) -> None:
        """cut: nodes that no gradient flows through."""
        try:
            with exactly(self.exact):
                for node in nodes:
                    made = call_on_host(node, values, self.exact)
                    cuts = node in cut and isinstance(made, Tensor)
                    values[node] = made.detach() if cuts else made
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise Refusal(
                f"could not be run with {case.name}: {type(error).__name__}: {error}", node, 5
            ) from None

    def _drawn(self, node: Node, case: Case, again: int = 0) -> Any:
        """again: another value than that of 0."""
        made = self._typical(node, case, again)
        if not isinstance(made, Tensor) or made.dtype not in ROUNDED:
            return made
        whole = made.double() if self.exact else made
        if case.logits == "turns" and node in self._shifts:
            whole = whole * _SLIGHT
        if case.sizes and node in self.tokens:
            flat = whole.reshape(-1, made.shape[-1])
            at = (torch.arange(len(flat)) + case.first) % len(_SIZES)
            factors = torch.tensor(_SIZES, dtype=whole.dtype)[at]
            whole = (flat * factors.unsqueeze(1)).reshape(made.shape)
        return whole

    @cached_property
    def _shifts(self) -> set[Node]:
        """Inputs that scores are shifted by, as by the bias of a router trained for balance: they
        may outweigh what a router prefers."""
        inside = {*self.nodes}
        above = closure(
            self.selection.selectors, lambda node: node.all_input_nodes if node in inside else []
        )
        return above.intersection(self.inputs).difference(self.tokens, self.around.logits)

    def _typical(self, node: Node, case: Case, again: int) -> Any:
        numbers = self._sizes(case)
        val = value(node)
        if isinstance(val, torch.SymInt):
            return number(val, numbers)
        sizes = [number(size, numbers) for size in shape(node)]
        root = view_root(node)
        first = next((n for n in self.tokens if view_root(n) is root), node)
        is_token = node in self.tokens
        at = self.inputs.index(first if is_token and first in self.inputs else node)
        fixed = self.around.what(node) == "parameter" and node not in self.around.logits
        seed = _SEEDS * (at + 1) + (_FIXED if fixed else case.seed)
        if node in self.around.logits:
            generator = torch.Generator().manual_seed(seed + again)
            return self._logits(node, case, numbers, generator)
        if is_token and first is not node and first in self.inputs:
            return self._typical(first, case, again).reshape(sizes)
        return drawn(node, sizes, seed, again=again, own=case.own, weight=not is_token)

    def _sizes(self, case: Case) -> dict[Any, int]:
        if not case.more_tokens:
            return self._numbers
        constants = [
            size for n in self.nodes for size in shape(n) if isinstance(size, int) and size < 1024
        ]
        wanted = max(2 * max(constants, default=1), 3 * max(self._numbers.values()))
        grown = dict(self._numbers)
        last = self._growing[-1]
        grown[last] *= max(2, -(-min(wanted, _MOST_TOKENS) // grown[last]))
        return grown

    def _logits(
        self, node: Node, case: Case, numbers: dict[Any, int], generator: torch.Generator
    ) -> Tensor:
        sizes, dtype = [number(size, numbers) for size in shape(node)], value(node).dtype
        experts = self.selection.num_experts
        if is_integer(node):
            if case.own:
                return drawn(node, sizes, case.seed, own=True)
            if case.logits == "last":
                return torch.full(sizes, experts - 1, dtype=dtype)
            if case.logits in ("first", "ties"):
                return torch.zeros(sizes, dtype=dtype)
            return torch.randint(experts, sizes, generator=generator).to(dtype)
        noise = torch.randn(sizes, generator=generator)
        slope = torch.linspace(0.0, 8.0, sizes[-1])
        turns = torch.arange(noise.numel() // sizes[-1]).view(*sizes[:-1], 1) * 3 + case.first
        preferred = (torch.arange(sizes[-1]) == turns % sizes[-1]) * 8.0
        ways = {
            "normal": noise,
            "extreme": noise * 40,
            "ties": torch.zeros(sizes),
            "last": noise * 0.1 + slope,
            "first": noise * 0.1 - slope,
            "turns": noise + preferred,
            "sizes": noise * 1e3,
        }
        return ways[case.logits].to(dtype)


def _without_gradients(graph: Graph) -> set[Node]:
    """Nodes that the model computes under ``torch.no_grad``."""
    enabled, found = True, set()
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled:
            found.add(node)
    return found


def _as_tuple(nodes: Node | tuple[Node, ...]) -> tuple[Node, ...]:
    return (nodes,) if isinstance(nodes, Node) else nodes
