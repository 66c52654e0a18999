"""Is what one stream makes ready before another reads it? Checked on the graph that will run.

The graph is the order in which the host issues. Each stream runs its own ops in that order; an op
of another stream is behind it only through an event: *record* on the one, then *wait* on the other.
So every node has a clock, of how far each stream has come when it runs (a vector clock), and a node
must be behind every value that it reads, and behind every reader of a buffer that it writes to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Graph, Node

MAIN = ""

_ENTER, _EXIT = "scope_enter", "scope_exit"
_RECORD, _WAIT, _KEEP = "tagged_event_record", "tagged_event_wait", "record_tagged_stream"

Clock = dict[str, int]


@dataclass(frozen=True)
class Race:
    """``reader``, on one stream, may run before ``writer`` on another has. what: it "reads" or
    "overwrites" what ``writer`` is, or its buffer is given to others ("frees") while that uses
    it."""

    writer: str
    writer_stream: str
    reader: str
    reader_stream: str
    what: str = "reads"

    def concerns(self, stream: str) -> bool:
        return stream in (self.writer_stream, self.reader_stream)

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
    def __init__(self) -> None:
        self.streams = [MAIN]
        self.labels: list[bool] = []
        self.now: dict[str, Clock] = {MAIN: {MAIN: 0}}
        self.made: dict[Node, tuple[str, int]] = {}
        self.recorded: dict[str, Clock] = {}
        self.used: dict[Node, dict[str, tuple[int, Node]]] = {}
        self.kept: set[tuple[Node, str]] = set()
        self.found: list[Race] = []

    def run(self, nodes: Iterable[Node]) -> list[Race]:
        for node in nodes:
            if node.op == "call_function":
                self._step(node)
            elif node.op == "output":
                self._read(node, MAIN)
            else:
                self.made[node] = (MAIN, 0)
        return self.found

    def _step(self, node: Node) -> None:
        kind = _kind(node)
        stream = self.streams[-1]
        if kind == _ENTER:
            self._enter(node)
        elif kind == _EXIT:
            if self.labels.pop():
                self.streams.pop()
        elif kind == _RECORD:
            self.recorded[str(node.args[0])] = dict(self._clock(stream))
        elif kind == _WAIT:
            clock = self._clock(stream)
            for other, time in self.recorded.get(str(node.args[0]), {}).items():
                clock[other] = max(clock.get(other, 0), time)
        elif kind == _KEEP:
            source, label = node.args[:2]
            assert isinstance(source, Node)
            self.kept.add((_root(source), str(label)))
        else:
            clock = self._clock(stream)
            clock[stream] += 1
            self.made[node] = (stream, clock[stream])
            self._read(node, stream)

    def _enter(self, node: Node) -> None:
        keys, values = node.args[:2]
        assert isinstance(keys, (list, tuple)) and isinstance(values, (list, tuple))
        has_label = "_user_stream_label" in keys
        self.labels.append(has_label)
        if has_label:
            self.streams.append(str(values[list(keys).index("_user_stream_label")]))

    def _clock(self, stream: str) -> Clock:
        return self.now.setdefault(stream, {stream: 0})

    def _read(self, node: Node, stream: str) -> None:
        clock = self._clock(stream)
        writes = _written(node)
        for source in node.all_input_nodes:
            if source not in self.made or not _has_storage(source):
                continue
            other, time = self.made[source]
            if other != stream and clock.get(other, 0) < time:
                self.found.append(Race(source.name, other, node.name, stream))
            users = self.used.setdefault(_root(source), {})
            if source in writes:
                for reader_stream, (when, reader) in users.items():
                    if reader_stream != stream and clock.get(reader_stream, 0) < when:
                        self.found.append(
                            Race(reader.name, reader_stream, node.name, stream, "overwrites")
                        )
            users[stream] = (clock.get(stream, 0), node)


def unkept(graph: Graph) -> list[Race]:
    """Buffers that a stream uses which did not allocate them, and that their own stream may be
    given again while it does.

    A buffer is free for its own stream when the host has issued the last node that takes it. The
    next op there must be behind all uses elsewhere, unless they were recorded with the allocator.
    """
    walk = _Walk()
    last: dict[Node, int] = {}
    nexts: list[tuple[int, str, Clock]] = []
    for at, node in enumerate(graph.nodes):
        walk.run([node])
        for source in node.all_input_nodes:
            last[_root(source)] = at
        stream = walk.streams[-1]
        if node in walk.made and node.op == "call_function":
            nexts.append((at, stream, dict(walk._clock(stream))))
    found = []
    for buffer, users in walk.used.items():
        if buffer.op != "call_function" or buffer not in walk.made:
            continue
        owner, _ = walk.made[buffer]
        after = next((c for at, s, c in nexts if s == owner and at > last[buffer]), None)
        for stream, (when, reader) in users.items():
            safe = stream == owner or after is None or after.get(stream, 0) >= when
            if not safe and (buffer, stream) not in walk.kept:
                found.append(Race(reader.name, stream, buffer.name, owner, "frees"))
    return found


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
