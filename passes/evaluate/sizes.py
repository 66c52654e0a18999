"""Give an extracted graph concrete inputs, at other token counts than it was captured with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import VIEWS, same, value
from moe_fx.passes.evaluate.typical import drawn

aten = torch.ops.aten

_SIZE_LIST_AT = dict.fromkeys((*VIEWS, aten.expand.default), 1) | {
    aten.new_zeros.default: 1,
    aten.new_empty.default: 1,
    aten.new_full.default: 1,
    aten.new_ones.default: 1,
    aten.zeros.default: 0,
    aten.ones.default: 0,
    aten.empty.memory_format: 0,
    aten.full.default: 0,
}
_ARANGE = (aten.arange.default, aten.arange.start, aten.arange.start_step)


@dataclass(frozen=True)
class TokenCount:
    """``captured`` tokens (a constant or symbol of the graph) are to be ``wanted`` ones, and
    ``captured * top_k`` rows ``wanted * top_k``."""

    captured: Any
    top_k: int
    wanted: int

    def size(self, dim: Any) -> int:
        """The size to use where the graph says ``dim`` along a leading dim."""
        if same(dim, self.captured):
            return self.wanted
        if same(dim, self.captured * self.top_k):
            return self.wanted * self.top_k
        return concrete(dim)

    def resize(self, node: Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Constants of a graph captured with a fixed token count: leading sizes and ranges."""
        if not isinstance(self.captured, int):
            return args
        at = _SIZE_LIST_AT.get(node.target)
        if at is not None and args[at] and self._counts_rows(args[at][0]):
            leading = -1 if node.target in VIEWS and -1 not in args[at] else self.size(args[at][0])
            return (*args[:at], [leading, *args[at][1:]], *args[at + 1 :])
        if node.target in _ARANGE and all(isinstance(a, int) for a in args):
            end = 0 if node.target is aten.arange.default else 1
            size = self.wanted * self.top_k if self.captured == 0 else self.size(args[end])
            return (*args[:end], size, *args[end + 1 :])
        return args

    def _counts_rows(self, size: Any) -> bool:
        return isinstance(size, int) and size in (self.captured, self.captured * self.top_k)


def choose_token_count(captured: Any, top_k: int, num_experts: int, wanted: int) -> TokenCount:
    """``wanted`` tokens, unless a constant token count can't be told from another constant."""
    ambiguous = isinstance(captured, int) and (
        captured in (1, num_experts) or captured * top_k == num_experts
    )
    return TokenCount(captured, top_k, captured if ambiguous else wanted)


def concrete(size: Any) -> int:
    """A number for a size: itself, or the value a symbol had when the graph was captured."""
    return int(size) if isinstance(size, int) else int(size.node.hint)


def example(
    node: Node,
    tokens: TokenCount,
    seed: int,
    *,
    per_token: bool = False,
    again: int = 0,
    own: bool = False,
) -> Any:
    """A value that is typical of what ``node`` stands for (`typical.py`). ``per_token``: its first
    dim counts tokens or rows."""
    val = value(node)
    if isinstance(val, torch.SymInt):
        return tokens.size(val)
    sizes: list[int] = []
    if isinstance(val, Tensor):
        leading = [tokens.size(val.shape[0])] if per_token else []
        sizes = leading + [concrete(size) for size in val.shape[len(leading) :]]
    return drawn(node, sizes, seed, again=again, own=own)
