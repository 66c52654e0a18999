"""Run a part of a captured graph on values of its own making: tokens, parameters, router logits.

Contract. ``Trials.run(case)`` computes every node between the inputs (tokens, logits, parameters,
and what else comes from outside) and a result, and the parameters that a body reads. Cases differ
in the logits, and in the number of tokens where that is not fixed in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_fx.compat import number, symbols
from moe_fx.passes.gathers import gather_of
from moe_fx.passes.layout import Body
from moe_fx.passes.names import view_root
from moe_fx.passes.on_host import call_on_host
from moe_fx.passes.roles import Refusal, Selection, is_integer, shape, value
from moe_fx.passes.sizes import random_tensor, scalar
from moe_fx.passes.surroundings import Surroundings

_UNKNOWN = 6  # what stands for a size of which nothing is known
_MOST_TOKENS = 2048

Values = dict[Node, Any]


@dataclass(frozen=True)
class Case:
    """logits: how they are drawn. more_tokens: than the graph was captured with."""

    name: str
    logits: str
    seed: int = 0
    more_tokens: bool = False


CASES = (
    Case("random routing", "normal", 1),
    Case("other random routing", "normal", 2),
    Case("only the last experts", "last"),
    Case("only the first experts", "first"),
    Case("extreme scores", "extreme", 3),
    Case("ties", "ties"),
    Case("every expert in turn", "turns"),
)
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
        dims = [size for node in self.inputs for size in shape(node)]
        dims += [value(n) for n in self.inputs if isinstance(value(n), torch.SymInt)]
        self._numbers = symbols(dims, _UNKNOWN)
        lead = shape(tokens[0])[:-1]
        self._growing = [s for s in symbols(lead, _UNKNOWN) if s in self._numbers]

    @property
    def cases(self) -> tuple[Case, ...]:
        return CASES + MORE_TOKENS if self._growing else CASES

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
        numbers = self._sizes(case)
        generator = torch.Generator().manual_seed(case.seed)
        drawn = torch.Generator().manual_seed(7)  # parameters: the same in every case
        values: Values = {}
        tokens: dict[Node, Tensor] = {}
        for node in self.inputs:
            if node in self.around.logits:
                made = self._logits(node, case, numbers, generator)
            elif node in self.tokens:
                sizes = [number(size, numbers) for size in shape(node)]
                root = view_root(node)
                if root not in tokens:
                    tokens[root] = random_tensor(sizes, value(node).dtype, generator)
                made = tokens[root].reshape(sizes)
            else:
                parameter = self.around.what(node) == "parameter"
                made = self._other(node, numbers, drawn if parameter else generator)
            if gradients and isinstance(made, Tensor) and made.is_floating_point():
                made = made.requires_grad_()
            values[node] = made
        cut = _without_gradients(self.result.graph) if gradients else set()
        try:
            for node in self.nodes:
                made = call_on_host(node, values)
                values[node] = made.detach() if node in cut and isinstance(made, Tensor) else made
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise Refusal(
                f"could not be run with {case.name}: {type(error).__name__}: {error}", node, 4
            ) from None
        return values

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
            if case.logits == "last":
                return torch.full(sizes, experts - 1, dtype=dtype)
            if case.logits in ("first", "ties"):
                return torch.zeros(sizes, dtype=dtype)
            return torch.randint(experts, sizes, generator=generator).to(dtype)
        noise = torch.randn(sizes, generator=generator)
        slope = torch.linspace(0.0, 8.0, sizes[-1])
        turns = torch.arange(noise.numel() // sizes[-1]).view(*sizes[:-1], 1) * 3
        preferred = (torch.arange(sizes[-1]) == turns % sizes[-1]) * 8.0
        drawn = {
            "normal": noise,
            "extreme": noise * 40,
            "ties": torch.zeros(sizes),
            "last": noise * 0.1 + slope,
            "first": noise * 0.1 - slope,
            "turns": noise + preferred,
        }
        return drawn[case.logits].to(dtype)

    def _other(self, node: Node, numbers: dict[Any, int], generator: torch.Generator) -> Any:
        val = value(node)
        if isinstance(val, torch.SymInt):
            return number(val, numbers)
        if isinstance(val, torch.SymFloat):
            return scalar(node)
        if not isinstance(val, Tensor):
            return val
        sizes = [number(size, numbers) for size in val.shape]
        if not sizes:
            return torch.tensor(scalar(node) if val.is_floating_point() else 0, dtype=val.dtype)
        made = random_tensor(sizes, val.dtype, generator)
        scale = sizes[-1] ** -0.5 if len(sizes) > 1 else 1.0
        return made * scale if made.is_contiguous() and made.is_floating_point() else made


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
