"""Exchanges on a stream of their own.

Contract. In: a graph of the order wanted, each exchange started by ``all_to_all`` and ended by
``wait``. Out: where an exchange was started it runs, on the stream `LABEL`, as one op that returns
the received rows; where it was waited for, the main stream waits for its end.

Pseudo-code, of one exchange::

    start: record(ready);  on `LABEL`: wait(ready); received = exchange(sent); record(arrived)
    wait:  wait(arrived);  keep(sent)

Under npugraph_ex every edge between the streams has an event: what it adds by itself forks at the
graph's begin and joins at its end, so that what reads in between would be unordered (torch_npu
2.13). GE orders streams by the edges of its graph: there only the label is set.
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

from moe_fx.compat import FakeValues
from moe_fx.devices.ascend import npu
from moe_fx.devices.ascend.agreement import agree
from moe_fx.devices.ascend.emit import Emit, value_of
from moe_fx.region import Lowered, source_of

aten = torch.ops.aten
ops = torch.ops.moe_fx

LABEL = "moe_fx_exchange"
_WAITS = (ops.wait.default, ops.wait_after.default)
_UNCHECKED = (
    "an NPU has no assertion that the host need not wait for: that all ranks have the same number "
    "of tokens is not checked"
)
_tags = itertools.count()


@dataclass(frozen=True)
class StreamOps:
    """How a compiler spells streams. events: what makes the event of a tag, and the ops that record
    it and wait for it; None where the compiler orders streams by the edges of the graph. cores:
    (AI cores, vector cores) for the exchanges."""

    enter: Callable[..., Any]
    exit: Callable[..., Any]
    events: tuple[Callable[[str], None], Callable[..., Any], Callable[..., Any]] | None
    cores: tuple[int, int] | None = None

    def scope(self) -> tuple[list[str], list[str]]:
        """(keys, values) of an exchange's scope."""
        keys, settings = ["_user_stream_label"], [LABEL]
        if self.cores is not None:
            keys += ["_op_aicore_num", "_op_vectorcore_num"]
            settings += [str(each) for each in self.cores]
        return keys, settings


def use_streams(graph: Graph, stream: StreamOps) -> list[Lowered]:
    """Put every exchange of ``graph`` on the stream, in place; what was done."""
    values = FakeValues(graph)
    done = []
    for wait in [node for node in graph.nodes if node.target in _WAITS]:
        start = wait.args[0]
        assert isinstance(start, Node)
        emit = Emit(graph, values, like=start)
        tag = f"moe_fx_{next(_tags)}"
        received = _start(start, stream, emit, tag)
        collectives = _collectives(emit)
        done.append(Lowered("moe_fx.all_to_all", collectives, received.name, source_of(start)))
        _finish(wait, start, received, stream, tag)
    for node in graph.find_nodes(op="call_function", target=ops.even_sizes.default):
        agree(graph, node, list(node.args[0]), *node.args[1:])
        done.append(Lowered("moe_fx.even_sizes", (), node.name, source_of(node), _UNCHECKED))
    graph.eliminate_dead_code()
    graph.lint()
    return done


def _start(start: Node, stream: StreamOps, emit: Emit, tag: str) -> Node:
    graph = start.graph
    with graph.inserting_before(start):
        if stream.events is not None:
            create, record, wait = stream.events
            create(f"{tag}_ready")
            create(f"{tag}_arrived")
            graph.call_function(record, (f"{tag}_ready", True))
        graph.call_function(stream.enter, stream.scope())
        if stream.events is not None:
            graph.call_function(wait, (f"{tag}_ready", True))
        received = _exchanged(emit, start)
        if stream.events is not None:
            graph.call_function(record, (f"{tag}_arrived", True))
        graph.call_function(stream.exit, ())
    return received


def _finish(wait: Node, start: Node, received: Node, stream: StreamOps, tag: str) -> None:
    graph, (sent, send_counts, recv_counts) = wait.graph, wait.args[1:4]
    buffers = [sent] if is_even(send_counts) else [sent, send_counts, recv_counts]
    if stream.events is not None:
        with graph.inserting_before(wait):
            graph.call_function(stream.events[2], (f"{tag}_arrived", True))
            graph.call_function(ops.keep.default, (buffers,))
    wait.replace_all_uses_with(received, propagate_meta=False)
    graph.erase_node(wait)
    if not start.users:
        graph.erase_node(start)


def _collectives(emit: Emit) -> tuple[str, ...]:
    names = (str(node.target).removesuffix(".default") for node in emit.added)
    return tuple(name for name in names if name.startswith(("npu_define", "moe_fx")))


def _exchanged(emit: Emit, start: Node) -> Node:
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
    tag, ranks = npu.tag_and_ranks(group)
    world = len(ranks)
    sizes = value_of(rows).shape
    numbers = emit(aten.reshape.default, rows, [-1])
    total = emit.size(numbers, 0)
    part = emit.number(operator.floordiv, total, world)
    starts: list[Any] = [0]
    for _ in range(world - 1):
        starts.append(emit.number(operator.add, starts[-1], part))
    parts = [part] * world
    exchange = npu.all_to_all_op()
    arrived = emit(exchange, numbers, parts, starts, parts, starts, tag, ranks, world)
    return emit(aten.reshape.default, arrived, [emit.size(rows, 0), *sizes[1:]])
