"""The check of streams: what is ordered passes, each kind of disorder is found."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Graph, Node

from moe_fx.devices.ascend import npu
from moe_fx.devices.ascend.happens_before import races

npu.npugraph_ex()
own = torch.ops.npugraph_ex
aten = torch.ops.aten
LABEL = (["_user_stream_label"], ["side"])


class Program:
    """``sent`` is made, goes to a stream of its own, and what comes back is used."""

    def __init__(self, keep: bool = True) -> None:
        self.graph = Graph()
        call = self.graph.call_function
        x = self.graph.placeholder("x")
        self.sent = call(aten.add.Tensor, (x, 1))
        self.record = call(own.tagged_event_record.default, ("ready", True))
        call(own.scope_enter.default, LABEL)
        self.wait = call(own.tagged_event_wait.default, ("ready", True))
        self.received = call(aten.mul.Tensor, (self.sent, 2))
        self.done = call(own.tagged_event_record.default, ("arrived", True))
        call(own.scope_exit.default, ())
        self.filler = call(aten.add.Tensor, (x, 3))
        self.join = call(own.tagged_event_wait.default, ("arrived", True))
        self.keep = call(torch.ops.moe_fx.keep.default, ([self.sent],)) if keep else None
        self.used = call(aten.add.Tensor, (self.received, self.filler))
        self.graph.output(self.used)


def test_an_ordered_program_passes() -> None:
    graph = Program().graph
    assert races(graph) == []


@pytest.mark.parametrize("what", ["record", "wait", "done", "join"])
def test_each_event_is_needed(what: str) -> None:
    program = Program()
    program.graph.erase_node(getattr(program, what))
    assert races(program.graph)


def test_a_reader_before_the_join_is_found() -> None:
    program = Program()
    program.filler.prepend(program.used)
    program.used.args = (program.received, program.sent)
    [race] = races(program.graph)
    assert (race.writer, race.reader) == (program.received.name, program.used.name)
    assert "without an event" in str(race)


def test_a_record_before_the_write_is_found() -> None:
    program = Program()
    program.sent.prepend(program.record)
    assert [(race.writer, race.writer_stream) for race in races(program.graph)] == [
        (program.sent.name, "")
    ]


def test_a_reader_through_a_view_is_found() -> None:
    program = Program()
    with program.graph.inserting_before(program.filler):
        view = program.graph.call_function(aten.view.default, (program.received, [-1]))
        program.graph.call_function(aten.add.Tensor, (view, 1))
    assert races(program.graph)


def test_writing_to_what_another_stream_reads_is_found() -> None:
    program = Program()
    with program.graph.inserting_before(program.filler):
        program.graph.call_function(aten.add_.Tensor, (program.sent, 1))
    assert [race.what for race in races(program.graph)] == ["overwrites"]


def test_a_buffer_that_may_be_given_away_is_found() -> None:
    [race] = races(Program(keep=False).graph)
    assert race.what == "frees" and "may be given away while" in str(race)


def test_sizes_need_no_event() -> None:
    program = Program()
    with program.graph.inserting_before(program.filler):
        size = program.graph.call_function(aten.sym_size.int, (program.sent, 0))
        size.meta["val"] = 4
        end: Node = program.graph.call_function(operator.add, (size, 1))
        end.meta["val"] = 5
    assert races(program.graph) == []
