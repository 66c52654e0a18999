"""Roles: what a node of an MoE region *means*, whatever op spells it.

A role is relative to one selection (a top-k over experts) and speaks of pairs: pair ``i`` is slot
``i % K`` of token ``i // K``; ``T`` tokens, ``S = T * K`` pairs, ``E`` experts. The rules that give
roles are in `passes/recognise/by_rule`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

Order = Literal["pair", "sorted"]
Stage = Literal["token", "expert", "post"]


@dataclass(frozen=True)
class Role:
    """Base of all roles."""


@dataclass(frozen=True)
class PerToken(Role):
    """``[T, ...]`` computed from the selection: still the router's business. If integer and
    ``[T, K]`` it can serve as expert ids, if floating and ``[T, K]`` as routing weights."""


@dataclass(frozen=True)
class PairIds(Role):
    """``[S]`` expert id of each row; ``source`` is the ``[T, K]`` node it was flattened from."""

    order: Order
    source: Node


@dataclass(frozen=True)
class SortResult(Role):
    """(sorted ids, permutation) of a sort of `PairIds` in pair order."""

    source: Node


@dataclass(frozen=True)
class Permutation(Role):
    """``[S]`` permutation: sorted row -> pair, or its inverse: pair -> sorted row."""

    source: Node
    sort: Node
    inverse: bool = False


@dataclass(frozen=True)
class Scratch(Role):
    """``[S]`` that an inverse permutation is written into, or ``0 … S-1`` that is written."""


@dataclass(frozen=True)
class TokenIndex(Role):
    """``[S]`` token of each row."""

    order: Order


@dataclass(frozen=True)
class Counts(Role):
    """``[E]`` rows per expert, or its inclusive running sum (``offsets``)."""

    source: Node
    offsets: bool = False


@dataclass(frozen=True)
class PairWeights(Role):
    """``[S]`` or ``[S, 1]`` routing weight of each row."""

    order: Order
    source: Node


@dataclass(frozen=True)
class Rows(Role):
    """``[S, ...]``: row ``i`` depends only on its own token, its own expert and (stage "post") its
    own routing weight."""

    order: Order
    stage: Stage


@dataclass(frozen=True)
class RowTable(Role):
    """``[S, ...]``: each row's own copy of its expert's entry in a per-expert table."""

    order: Order


@dataclass(frozen=True)
class Grouped(Role):
    """``[T, K, ...]``: rows in pair order, viewed by token."""

    stage: Stage


@dataclass(frozen=True)
class Combined(Role):
    """``[T, ...]``: the K rows of each token summed: the region's output."""


@dataclass(frozen=True)
class Selection:
    """Which experts each token is to meet: the ops that select, and the sizes every rule speaks of.

    node: the last selecting op, for reports; selectors: all of them. lead: the dims that count
    tokens where the scores have more than one (``[B, S, E]``). columns: of the scores; more than
    ``num_experts`` if some select no expert. exact: ids are the selected indices, untouched.
    distinct: no token meets an expert twice. looked_up: ids come from a table or from outside.
    """

    node: Node
    num_tokens: Any
    num_experts: int
    top_k: int
    selectors: tuple[Node, ...] = ()
    lead: tuple[Any, ...] = ()
    columns: int = 0
    exact: bool = True
    distinct: bool = True
    looked_up: bool = False

    @property
    def num_pairs(self) -> Any:
        return self.num_tokens * self.top_k

    @property
    def sizes(self) -> tuple[Any, ...]:
        """All but the nodes: equal for equal layers."""
        return (
            *(self.num_tokens, self.num_experts, self.top_k, self.lead, self.columns),
            *(self.exact, self.distinct, self.looked_up),
        )
