"""Run one graph per rank in a single process, in lock step, exchanging at the collectives.

Every rank's graph runs until it meets a collective; then all of them must stand at the same one
(`RanksDisagree` otherwise, which on real ranks would be a hang), the exchange is done by slicing,
and they go on. Used to verify a rewrite by value for any number of ranks without a process group.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.errors import MoeFxError
from moe_fx.ops import direct, distribute
from moe_fx.ops.fused import NUM_ARGUMENTS

_OPS = torch.ops.moe_fx
_FUNCTIONAL = torch.ops._c10d_functional

_Request = tuple[str, tuple[Any, ...]]
_Override = Callable[[Node, tuple[Any, ...], dict[str, Any]], Any]


class RanksDisagree(MoeFxError):
    """Ranks stand at different collectives."""


def run(
    modules: Sequence[GraphModule],
    inputs: Sequence[Sequence[Any]],
    overrides: dict[Any, _Override] | None = None,
    resize: Sequence[Callable[[Node, tuple[Any, ...]], tuple[Any, ...]]] | None = None,
) -> list[Any]:
    """``modules[r](*inputs[r])`` for every rank ``r``; returns the outputs by rank.

    overrides: op -> function to call in its place. resize: per rank, a function that maps a node's
    positional arguments before the call (how a graph with fixed sizes runs at others).
    """
    keep = [lambda node, args: args] * len(modules)
    ranks = [
        _steps(module, values, overrides or {}, change)
        for module, values, change in zip(modules, inputs, resize or keep, strict=True)
    ]
    replies: list[Any] = [None] * len(ranks)
    while True:
        requests, results = [], []
        for rank, reply in zip(ranks, replies, strict=True):
            try:
                requests.append(rank.send(reply))
            except StopIteration as stop:
                results.append(stop.value)
        if len(results) == len(ranks):
            return results
        names = [request[0] for request in requests] + ["the end"] * len(results)
        if len(set(names)) != 1:
            raise RanksDisagree(f"ranks stand at different collectives: {names}")
        replies = _EXCHANGES[names[0]]([request[1] for request in requests])


def _steps(
    module: GraphModule,
    inputs: Sequence[Any],
    overrides: dict[Any, _Override],
    resize: Callable[[Node, tuple[Any, ...]], tuple[Any, ...]],
) -> Generator[_Request, Any, Any]:
    values: dict[Node, Any] = {}
    supply = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(supply)
            continue
        args = map_arg(node.args, values.__getitem__)
        kwargs = map_arg(node.kwargs, values.__getitem__)
        if node.op == "output":
            return args[0]
        if node.op != "call_function":
            raise MoeFxError(f"cannot simulate {node.op} node {node.name}")
        args = resize(node, args)
        if node.target in _COLLECTIVES:
            values[node] = yield _COLLECTIVES[node.target], _given(node, args, kwargs)
        elif node.target is _OPS.direct_experts.default:
            values[node] = yield from _direct_experts(args)
        elif node.target in (_OPS.wait.default, _FUNCTIONAL.wait_tensor.default):
            values[node] = args[0]
        elif node.target in overrides:
            values[node] = overrides[node.target](node, args, kwargs)
        else:
            values[node] = node.target(*args, **kwargs)
    raise MoeFxError("the graph has no output")


def _direct_experts(args: tuple[Any, ...]) -> Generator[_Request, Any, Any]:
    tokens, ids, weights, *body = args[:NUM_ARGUMENTS]
    sent = tokens, ids, weights, args[NUM_ARGUMENTS]
    rows, here, factors = yield "direct_dispatch", sent
    factor = None if weights is None else factors
    shares = _OPS.fused_experts(rows, here, factor, *body)
    result, _ = yield "direct_combine", (shares, here, ids)
    return result


def _given(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    if node.target is _OPS.exchange_counts.default:
        return args[0], kwargs.get("chunks", 1)
    if node.target is _OPS.even_sizes.default:
        return ([len(piece) for piece in args[0]],)
    if node.target is _OPS.direct_combine.default:
        rows, _, here, ids = args[:4]
        return rows, here, ids
    return args


def _gather(requests: list[tuple[Any, ...]]) -> list[Tensor]:
    full = torch.cat([args[0] for args in requests])
    return [full] * len(requests)


def _gather_counts(requests: list[tuple[Any, ...]]) -> list[Tensor]:
    rows = torch.stack([torch.cat([counts, status]) for counts, status, *_ in requests])
    return [rows] * len(requests)


def _exchange_counts(requests: list[tuple[Any, ...]]) -> list[Tensor]:
    world = len(requests)
    blocks = torch.stack(
        [counts.view(chunks, world, -1).transpose(0, 1) for counts, chunks in requests]
    )
    return [blocks[:, rank].flatten(1) for rank in range(world)]


def _exchange_rows(requests: list[tuple[Any, ...]]) -> list[Tensor]:
    world = len(requests)
    pieces = [rows.split(send.clamp(min=0).tolist()) for rows, send, *_ in requests]
    received = [
        torch.cat([pieces[source][rank] for source in range(world)]) for rank in range(world)
    ]
    for rank, (_, _, recv, *_rest) in enumerate(requests):
        expected = recv.clamp(min=0).tolist()
        if [len(pieces[source][rank]) for source in range(world)] != expected:
            raise RanksDisagree(f"rank {rank} expects {expected} rows, others send otherwise")
    return received


def _even_sizes(requests: list[tuple[Any, ...]]) -> list[Tensor]:
    world = len(requests)
    sizes = [lengths for (lengths,) in requests]
    if any(other != sizes[0] for other in sizes):
        raise RanksDisagree(f"ranks have other numbers of rows: {sizes}")
    rows = torch.tensor(sizes[0]) // world
    return [rows.unsqueeze(1).expand(-1, world)] * world


def _distribute(requests: list[tuple[Any, ...]]) -> list[Any]:
    world, num_experts = len(requests), requests[0][2]
    _even_sizes([([len(tokens)],) for tokens, *_ in requests])
    tokens, ids = (torch.cat([args[at] for args in requests]) for at in range(2))
    return [distribute.share(tokens, ids, rank, world, num_experts) for rank in range(world)]


def _collect(requests: list[tuple[Any, ...]]) -> list[Tensor]:
    world = len(requests)
    sent = [
        distribute.parcels(rows, assist, ends, world) for rows, _, _, assist, ends, *_ in requests
    ]
    pieces = [rows.split(sizes) for rows, sizes in sent]
    return [
        distribute.summed(torch.cat([piece[rank] for piece in pieces]), ids, weights)
        for rank, (_, ids, weights, *_rest) in enumerate(requests)
    ]


def _direct_dispatch(requests: list[tuple[Any, ...]]) -> list[Any]:
    num_experts = requests[0][3]
    tokens, ids, weights = ([args[at] for args in requests] for at in range(3))
    return [
        direct.dispatched(tokens, ids, weights, rank, num_experts) for rank in range(len(requests))
    ]


def _direct_combine(requests: list[tuple[Any, ...]]) -> list[Any]:
    rows, here = ([args[at] for args in requests] for at in range(2))
    return [
        (direct.combined(rows, here, len(ids), rank), rows[rank].new_empty(0))
        for rank, (_, _, ids) in enumerate(requests)
    ]


_COLLECTIVES = {
    _OPS.direct_dispatch.default: "direct_dispatch",
    _OPS.direct_combine.default: "direct_combine",
    _OPS.distribute.default: "distribute",
    _OPS.collect.default: "collect",
    _FUNCTIONAL.all_gather_into_tensor.default: "all_gather",
    _OPS.exchange_counts.default: "exchange_counts",
    _OPS.gather_counts.default: "gather_counts",
    _OPS.even_sizes.default: "even_sizes",
    _OPS.all_to_all.default: "all_to_all",
}
_EXCHANGES: dict[str, Callable[[list[tuple[Any, ...]]], list[Any]]] = {
    "direct_dispatch": _direct_dispatch,
    "direct_combine": _direct_combine,
    "distribute": _distribute,
    "collect": _collect,
    "all_gather": _gather,
    "exchange_counts": _exchange_counts,
    "gather_counts": _gather_counts,
    "even_sizes": _even_sizes,
    "all_to_all": _exchange_rows,
}
