"""Which inputs of an op are cut with an expert's block of its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.graph.lineage import trace
from moe_fx.graph.per_expert import cut_call
from moe_fx.graph.refusal import Refusal
from tests.passes.graphs import captured

EXPERTS, KEPT = 4, 2
_GENERATOR = torch.Generator().manual_seed(0)


def _drawn(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=_GENERATOR)


W, V = _drawn(EXPERTS, 6, 8), _drawn(EXPERTS, 6, 8)
A, B = _drawn(EXPERTS, 6, 3), _drawn(EXPERTS, 3, 8)
CODES = torch.randint(0, 255, (EXPERTS, 6, 4), dtype=torch.uint8, generator=_GENERATOR)
COLUMN, ENTRY = _drawn(8), _drawn(EXPERTS)
ORDER = torch.randperm(8, generator=_GENERATOR)
SHARED = _drawn(8, 5)

KEEPS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "product of tables": (lambda w, v: w * v, (W, V)),
    "scale per expert": (lambda w, s: w * s[:, None, None], (W, ENTRY)),
    "scale per column": (lambda w, s: w * s, (W, COLUMN)),
    "adapters": (lambda w, a, b: w + a @ b, (W, A, B)),
    "adapters by bmm": (lambda w, a, b: torch.baddbmm(w, a, b), (W, A, B)),
    "adapters by einsum": (lambda a, b: torch.einsum("ehr,erf->ehf", a, b), (A, B)),
    "shared matrix": (lambda w, m: w @ m, (W, SHARED)),
    "shared linear": (lambda w, m: torch.nn.functional.linear(w, m.t()), (W, SHARED)),
    "side by side": (lambda w, v: torch.cat([w, v], 1), (W, V)),
    "stacked within": (lambda w, v: torch.stack([w, v], 2).view(EXPERTS, 12, 8), (W, V)),
    "unpacked": (lambda q: torch.stack([q & 15, q >> 4], -1).view(EXPERTS, 6, 8), (CODES,)),
    "columns reordered": (lambda w, p: w[:, :, p], (W, ORDER)),
    "columns selected": (lambda w, p: w.index_select(2, p), (W, ORDER)),
    "norm of columns": (lambda w: w / w.norm(dim=1, keepdim=True), (W,)),
    "softmax of columns": (lambda w: w.softmax(1), (W,)),
    "flat and back": (lambda w: w.view(-1).mul(2).view(EXPERTS, 6, 8), (W,)),
    "rows of all experts": (lambda w, m: (w.view(-1, 8) @ m).view(EXPERTS, 6, 5), (W, SHARED)),
    "halves": (lambda w: w.chunk(2, 2)[1] * w.chunk(2, 2)[0], (W,)),
    "repeated": (lambda w: w.repeat_interleave(2, 1).repeat(1, 1, 2), (W,)),
    "expanded": (lambda w, c: w * c.expand(EXPERTS, 6, 8), (W, COLUMN)),
    "largest": (lambda w: w / w.amax(dim=(1, 2), keepdim=True), (W,)),
    "triangle": (lambda w: w.tril(), (W,)),
}
MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of experts": lambda w: w - w.mean(0, keepdim=True),
    "norm of all": lambda w: w / w.norm(),
    "softmax over experts": lambda w: w.softmax(0),
    "experts reversed": lambda w: w.flip(0),
    "experts shifted": lambda w: w.roll(1, 0),
    "experts added up": lambda w: w.cumsum(0),
    "experts reordered": lambda w: w[[1, 0, 3, 2]],
    "experts exchanged with rows": lambda w: w.transpose(0, 1).reshape(EXPERTS, 6, 8),
}


def _made(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> tuple[GraphModule, Node]:
    module = captured(function, *given).module
    table: Any = module.graph.output_node().args[0][0]  # type: ignore[index]
    return module, table


def _blocks(function: Callable[..., Tensor], given: tuple[Tensor, ...], first: int) -> Tensor:
    """``KEPT`` experts from ``first`` on, computed from nothing but their blocks."""
    case = captured(function, *given)
    table: Any = case.module.graph.output_node().args[0][0]  # type: ignore[index]
    found = trace([table], EXPERTS)
    values: dict[Node, Any] = {}
    whole = dict(zip(case.module.graph.find_nodes(op="placeholder"), case.inputs, strict=True))
    assert not set(found.sliced) & set(found.whole)
    for node in case.module.graph.nodes:
        if node in found.sliced:
            block = whole[node].shape[0] // EXPERTS
            values[node] = whole[node][first * block : (first + KEPT) * block]
        elif node in whole:
            values[node] = whole[node]
        elif node in found.steps:
            op, args, kwargs = map_arg(cut_call(node, EXPERTS, KEPT), values.__getitem__)
            values[node] = op(*args, **kwargs)
        elif node.op == "call_function":
            values[node] = node.target(*map_arg(node.args, values.__getitem__))
    return values[table]


@pytest.mark.parametrize("name", KEEPS)
def test_an_owner_needs_its_own_blocks_only(name: str) -> None:
    function, given = KEEPS[name]
    for first in (0, 2):
        expected = function(*given)[first : first + KEPT]
        torch.testing.assert_close(_blocks(function, given, first), expected)


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_experts_is_computed_whole(name: str) -> None:
    """Without a gather: the owner takes its slice behind the op that mixes."""
    _, table = _made(MIXES[name], (W,))
    found = trace([table], EXPERTS)
    placeholder = table.graph.find_nodes(op="placeholder")[0]
    mixed_whole = any(placeholder in _above(node) for node in found.whole)
    mixed_sliced = any(node is not placeholder for node in found.sliced)
    assert mixed_whole or mixed_sliced


def _above(node: Node) -> set[Node]:
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_gathered_experts_is_refused(name: str) -> None:
    module, table = _made(MIXES[name], (W,))
    shard = module.graph.find_nodes(op="placeholder")[0]
    collectives = torch.ops._c10d_functional
    with module.graph.inserting_after(shard):
        start = module.graph.call_function(collectives.all_gather_into_tensor.default)
    with module.graph.inserting_after(start):
        full = module.graph.call_function(collectives.wait_tensor.default, (start,))
    full.meta["val"] = start.meta["val"] = shard.meta["val"]
    shard.replace_all_uses_with(full)
    start.args = (shard, 2, "0")
    with pytest.raises(Refusal, match=r"mixes experts|not known to keep experts apart"):
        trace([table], EXPERTS)
