"""Exchanges on a stream of their own, for npugraph_ex.

Contract. In: a graph of the order wanted, each exchange started by ``all_to_all`` and ended by
``wait``. Out: where an exchange was started it runs, on the stream `LABEL`, as one op that returns
the received rows; where it was waited for, the main stream waits for its end.

Pseudo-code, of one exchange::

    start: record(ready);  on `LABEL`: wait(ready); received = exchange(sent); record(arrived)
    wait:  wait(arrived);  keep(sent)

Every edge between the streams has an event: what npugraph_ex adds by itself forks at the graph's
begin and joins at its end, so that what reads in between would be unordered (torch_npu 2.13).
``keep`` takes the sent rows when they have been sent: until then nobody else is given their buffer.
(The received rows need none: what takes their place on the exchange's stream waits for all that the
main stream had done.) `happens_before.py` checks the result.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_fx.ascend.emit import Emit, value_of
from moe_fx.compat import FakeValues

aten = torch.ops.aten
ops = torch.ops.moe_fx

LABEL = "moe_fx_exchange"
_WAITS = (ops.wait.default, ops.wait_after.default)
_tags = itertools.count()


@dataclass(frozen=True)
class StreamOps:
    """How a compiler spells streams. scope: further (key, value) of the exchange's scope; create:
    makes the event of a tag."""

    enter: Callable[..., Any]
    exit: Callable[..., Any]
    record: Callable[..., Any]
    wait: Callable[..., Any]
    create: Callable[[str], None]
    scope: tuple[tuple[str, str], ...] = ()


def use_streams(graph: Graph, stream: StreamOps, exchange: Callable[[Emit, Node], Node]) -> int:
    """Put every exchange of ``graph`` on the stream, in place; how many there are. exchange: emits
    the op that runs one, from its start."""
    values = FakeValues(graph)
    waits = [node for node in graph.nodes if node.target in _WAITS]
    for wait in waits:
        start = wait.args[0]
        assert isinstance(start, Node)
        number = next(_tags)
        received = _start(start, stream, exchange, values, number)
        _finish(wait, start, received, stream, number)
    return len(waits)


def _start(
    start: Node,
    stream: StreamOps,
    exchange: Callable[[Emit, Node], Node],
    values: FakeValues,
    number: int,
) -> Node:
    ready, arrived = _tag(number, "ready"), _tag(number, "arrived")
    stream.create(ready)
    stream.create(arrived)
    keys = ["_user_stream_label", *(key for key, _ in stream.scope)]
    settings = [LABEL, *(value for _, value in stream.scope)]
    graph = start.graph
    emit = Emit(graph, values, like=start)
    with graph.inserting_before(start):
        graph.call_function(stream.record, (ready, True))
        graph.call_function(stream.enter, (keys, settings))
        graph.call_function(stream.wait, (ready, True))
        received = exchange(emit, start)
        graph.call_function(stream.record, (arrived, True))
        graph.call_function(stream.exit, ())
    return received


def _finish(wait: Node, start: Node, received: Node, stream: StreamOps, number: int) -> None:
    graph, sent = wait.graph, wait.args[1]
    with graph.inserting_before(wait):
        graph.call_function(stream.wait, (_tag(number, "arrived"), True))
        graph.call_function(ops.keep.default, (sent,))
    wait.replace_all_uses_with(received, propagate_meta=False)
    graph.erase_node(wait)
    if not start.users:
        graph.erase_node(start)


def _tag(number: int, moment: str) -> str:
    return f"moe_fx_{number}_{moment}"


def exchanged(emit: Emit, start: Node) -> Node:
    """The exchange that ``start`` starts, as one op."""
    rows, send_counts, recv_counts, group = start.args
    if is_even(send_counts):
        return even_exchange(emit, rows, group)
    return emit(ops.exchange.default, rows, send_counts, recv_counts, group)


def is_even(counts: Any) -> bool:
    """Whether these sizes are those of equal parts."""
    while isinstance(counts, Node):
        if counts.target is ops.even_sizes.default:
            return True
        counts = counts.args[0] if counts.target in _PARTS_OF_SIZES else None
    return False


_PARTS_OF_SIZES = (aten.sum.dim_IntList, aten.select.int)


def even_exchange(emit: Emit, rows: Any, group: Any) -> Node:
    """As torch_npu's compilers spell an all-to-all; of numbers in one row, as its runtime and its
    meta kernel disagree about others."""
    from moe_fx.ascend import npu

    tag, ranks = npu.tag_and_ranks(group)
    world = len(ranks)
    sizes = value_of(rows).shape
    numbers = emit(aten.reshape.default, rows, [-1])
    total = emit.size(numbers, 0)
    part = total // world if isinstance(total, int) else emit(operator.floordiv, total, world)
    starts: list[Any] = [0]
    for _ in range(world - 1):
        last = starts[-1]
        both = all(isinstance(n, int) for n in (last, part))
        starts.append(last + part if both else emit(operator.add, last, part))
    parts = [part] * world
    exchange = npu.all_to_all_op()
    arrived = emit(exchange, numbers, parts, starts, parts, starts, tag, ranks, world)
    return emit(aten.reshape.default, arrived, [emit.size(rows, 0), *sizes[1:]])
