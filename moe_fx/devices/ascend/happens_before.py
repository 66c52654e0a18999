"""Is what one stream makes ready before another reads it? Checked on the graph that will run.

The graph is the order in which the host issues. Each stream runs its own ops in that order; an op
of another stream is behind it only through an event: *record* on the one, then *wait* on the other.
So every node has a clock, of how far each stream has come when it runs (a vector clock), and a node
must be behind every value that it reads, and behind every reader of a buffer that it writes to.

A buffer is free for the stream that allocated it when the host has issued the last node that takes
it: the next op there must be behind all uses elsewhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Graph, Node

MAIN = ""

_ENTER, _EXIT = "scope_enter", "scope_exit"
_RECORD, _WAIT = "tagged_event_record", "tagged_event_wait"

Clock = dict[str, int]


@dataclass(frozen=True)
class Race:
    """``reader``, on one stream, may run before ``writer`` on another has. what: it "reads" or
    "overwrites" what ``writer`` is; or "frees": its buffer is given to others while that uses
    it."""

    writer: str
    writer_stream: str
    reader: str
    reader_stream: str
    what: str = "reads"

    def __str__(self) -> str:
        here, there = self.reader_stream or "main", self.writer_stream or "main"
        if self.what == "frees":
            return (
                f"{self.reader} (stream {here}) may be given away while {self.writer} (stream "
                f"{there}) uses it"
            )
        return (
            f"{self.reader} (stream {here}) {self.what} {self.writer} (stream {there}) without an "
            "event between them"
        )


def races(graph: Graph) -> list[Race]:
    """Every pair of nodes on two streams whose order nothing keeps."""
    return _Walk().run(graph.nodes)


class _Walk:
    """made: each value's stream and time there. used: of each buffer, when each stream last took
    it, and which node. issued: when the host last did. ops: (when issued, clock) of each stream's
    own."""

    def __init__(self) -> None:
        self.streams = [MAIN]
        self.labels: list[bool] = []
        self.now: dict[str, Clock] = {MAIN: {MAIN: 0}}
        self.made: dict[Node, tuple[str, int]] = {}
        self.recorded: dict[str, Clock] = {}
        self.used: dict[Node, dict[str, tuple[int, Node]]] = {}
        self.issued: dict[Node, int] = {}
        self.ops: dict[str, list[tuple[int, Clock]]] = {}
        self.found: list[Race] = []

    def run(self, nodes: Iterable[Node]) -> list[Race]:
        for at, node in enumerate(nodes):
            if node.op == "call_function":
                self._step(node, at)
            elif node.op == "output":
                self._read(node, MAIN, at)
            else:
                self.made[node] = (MAIN, 0)
        for buffer in self.used:
            if buffer.op == "call_function":
                self._free(buffer)
        return self.found

    def _step(self, node: Node, at: int) -> None:
        kind = _kind(node)
        stream = self.streams[-1]
        clock = self._clock(stream)
        if kind == _ENTER:
            self._enter(node)
        elif kind == _EXIT:
            if self.labels.pop():
                self.streams.pop()
        elif kind == _RECORD:
            self.recorded[str(node.args[0])] = dict(clock)
        elif kind == _WAIT:
            for other, time in self.recorded.get(str(node.args[0]), {}).items():
                clock[other] = max(clock.get(other, 0), time)
        else:
            clock[stream] += 1
            self.made[node] = (stream, clock[stream])
            self.ops.setdefault(stream, []).append((at, dict(clock)))
            self._read(node, stream, at)

    def _enter(self, node: Node) -> None:
        keys, values = node.args[:2]
        assert isinstance(keys, (list, tuple)) and isinstance(values, (list, tuple))
        has_label = "_user_stream_label" in keys
        self.labels.append(has_label)
        if has_label:
            self.streams.append(str(values[list(keys).index("_user_stream_label")]))

    def _clock(self, stream: str) -> Clock:
        return self.now.setdefault(stream, {stream: 0})

    def _read(self, node: Node, stream: str, at: int) -> None:
        clock = self._clock(stream)
        writes = _written(node)
        for source in node.all_input_nodes:
            if source not in self.made or not _has_storage(source):
                continue
            other, time = self.made[source]
            if other != stream and clock.get(other, 0) < time:
                self.found.append(Race(source.name, other, node.name, stream))
            buffer = _root(source)
            users = self.used.setdefault(buffer, {})
            if source in writes:
                self._overwrite(users, node, stream)
            users[stream] = (clock.get(stream, 0), node)
            self.issued[buffer] = at

    def _overwrite(self, users: dict[str, tuple[int, Node]], node: Node, stream: str) -> None:
        for other, (when, reader) in users.items():
            if other != stream and self._clock(stream).get(other, 0) < when:
                self.found.append(Race(reader.name, other, node.name, stream, "overwrites"))

    def _free(self, buffer: Node) -> None:
        owner, _ = self.made[buffer]
        own = self.ops.get(owner, [])
        behind = bisect_right(own, self.issued[buffer], key=lambda op: op[0])
        later = own[behind][1] if behind < len(own) else None
        for stream, (when, user) in self.used[buffer].items():
            if stream != owner and later is not None and later.get(stream, 0) < when:
                self.found.append(Race(user.name, stream, buffer.name, owner, "frees"))


def _kind(node: Node) -> str:
    return str(getattr(node.target, "__name__", "")).split(".")[0]


def _root(node: Node) -> Node:
    """The node whose buffer ``node`` is a view of."""
    while True:
        schema = getattr(node.target, "_schema", None)
        aliased = schema is not None and any(
            argument.alias_info is not None and not argument.alias_info.is_write
            for argument in schema.arguments
        )
        source = node.args[0] if node.args else None
        if not (aliased or _kind(node) in ("reshape", "getitem")) or not isinstance(source, Node):
            return node
        node = source


def _written(node: Node) -> set[Node]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return set()
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    return {value for name in names if isinstance(value := given.get(name), Node)}


def _has_storage(node: Node) -> bool:
    """Sizes and counts on the host are there when the host has issued what makes them."""
    value = node.meta.get("val")
    return not isinstance(value, (int, float, bool)) and not type(value).__name__.startswith("Sym")
