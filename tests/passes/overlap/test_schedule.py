"""Schedule: exact orders under toy costs, and what holds under any."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, Node
from torch.library import _scoped_library

from moe_fx.passes.overlap.schedule import Timeline, may_communicate, peak_bytes, schedule, simulate

aten, ops = torch.ops.aten, torch.ops.moe_fx


@dataclass
class Toy:
    """Seconds by node name; 1 for any compute, 10 for any exchange that is not named."""

    named: dict[str, float]

    def compute(self, node: Node) -> float:
        quick = node.target in (ops.all_to_all.default, ops.wait.default)
        return self.named.get(node.name, 0.0 if quick else 1.0)

    def exchange(self, node: Node) -> float:
        return self.named.get(f"{node.name} exchange", 10.0)


class Program:
    """A graph of exchanges and computing, node by node, in the order written."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.sizes = self.graph.placeholder("sizes")
        self.inputs = {self.sizes}

    def tokens(self) -> Node:
        node = self.graph.placeholder("tokens")
        self.inputs.add(node)
        return node

    def start(self, name: str, rows: Node) -> Node:
        args = (rows, self.sizes, self.sizes, "g")
        return self.graph.create_node("call_function", ops.all_to_all.default, args, name=name)

    def wait(self, name: str, start: Node) -> Node:
        args = (start, start.args[0], self.sizes, self.sizes, "g")
        return self.graph.create_node("call_function", ops.wait.default, args, name=name)

    def work(self, name: str, *inputs: Node) -> Node:
        target = aten.neg.default if len(inputs) == 1 else aten.add.Tensor
        return self.graph.create_node("call_function", target, inputs, name=name)

    @property
    def nodes(self) -> list[Node]:
        return [node for node in self.graph.nodes if node not in self.inputs]


def two_chunks(filler: bool = False) -> Program:
    """As the rewrite leaves it, but every exchange waited for at once."""
    program = Program()
    tokens = program.tokens()
    rows = [program.work(f"rows{at}", tokens) for at in range(2)]
    backs = []
    for at in range(2):
        arrived = program.wait(f"arrived{at}", program.start(f"there{at}", rows[at]))
        done = program.work(f"experts{at}", arrived)
        backs.append(program.wait(f"back{at}", program.start(f"return{at}", done)))
    program.work("sum", *backs)
    if filler:
        program.work("shared", tokens)
    return program


def names(nodes: list[Node]) -> list[str]:
    return [node.name for node in nodes]


def test_an_exchange_waits_for_no_other_where_nothing_needs_it() -> None:
    program = Program()
    tokens = program.tokens()
    rows = [program.work(f"rows{at}", tokens) for at in range(2)]
    starts = [program.start(f"start{at}", rows[at]) for at in range(2)]
    waits = [program.wait(f"wait{at}", starts[at]) for at in range(2)]
    program.work("total", *waits)
    order = names(schedule(program.nodes, Toy({})))
    assert order == ["rows0", "start0", "rows1", "start1", "wait0", "wait1", "total"]


def test_what_needs_no_exchange_fills_the_waiting() -> None:
    order = names(schedule(two_chunks(filler=True).nodes, Toy({})))
    assert order.index("there0") < order.index("shared") < order.index("arrived0")


def test_work_that_leads_to_an_exchange_goes_before_filler_once_its_rows_are_there() -> None:
    program = Program()
    tokens = program.tokens()
    arrived = program.wait("arrived", program.start("there", program.work("rows", tokens)))
    back = program.wait("back", program.start("send", program.work("experts", arrived)))
    shared = program.work("up", tokens)
    program.work("total", back, program.work("down", shared))
    costs = Toy({"there exchange": 1.0, "up": 2.0})
    order = names(schedule(program.nodes, costs))
    assert order == ["rows", "there", "up", "arrived", "experts", "send", "down", "back", "total"]
    assert simulate(schedule(program.nodes, costs), costs) == Timeline(15.0, 9.0)


def test_collectives_keep_their_order_whatever_they_cost() -> None:
    nodes = two_chunks().nodes
    for costs in (Toy({}), Toy({"there0 exchange": 100.0}), Toy({"experts0": 500.0})):
        starts = [node.name for node in schedule(nodes, costs) if may_communicate(node)]
        assert starts == ["there0", "return0", "there1", "return1"]


def test_an_op_of_which_nothing_is_known_may_communicate_and_keeps_its_place() -> None:
    program = Program()
    tokens = program.tokens()
    program.wait("wait", program.start("start", program.work("rows", tokens)))
    with _scoped_library("someone", "FRAGMENT") as library:
        library.define("all_reduce(Tensor x) -> Tensor")
        op = torch.ops.someone.all_reduce.default
        reduced = program.graph.create_node("call_function", op, (tokens,), name="reduced")
        program.start("later", reduced)
        order = names(schedule(program.nodes, Toy({"wait": 0.0})))
    assert order.index("start") < order.index("reduced") < order.index("later")


def test_random_ops_keep_their_order() -> None:
    program = Program()
    tokens = program.tokens()
    wait = program.wait("wait", program.start("start", tokens))
    for name, source in (("first", wait), ("second", tokens)):
        program.graph.create_node("call_function", aten.bernoulli.p, (source, 0.5), name=name)
    order = names(schedule(program.nodes, Toy({})))
    assert order.index("first") < order.index("second")


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, Toy]:
    program = Program()
    values = [program.tokens()]
    costs: dict[str, float] = {}
    for at in range(draw(st.integers(1, 14))):
        source = values[draw(st.integers(0, len(values) - 1))]
        if draw(st.booleans()):
            start = program.start(f"start{at}", source)
            costs[f"start{at} exchange"] = float(draw(st.integers(0, 9)))
            values.append(program.wait(f"wait{at}", start))
        else:
            other = values[draw(st.integers(0, len(values) - 1))]
            values.append(program.work(f"work{at}", source, other))
            costs[f"work{at}"] = float(draw(st.integers(0, 9)))
    return program, Toy(costs)


@given(programs())
@settings(max_examples=100, deadline=None)
def test_any_order_is_legal_complete_and_within_the_bounds(case: tuple[Program, Toy]) -> None:
    program, costs = case
    order = schedule(program.nodes, costs)
    assert sorted(names(order)) == sorted(names(program.nodes))
    seen = set(program.inputs)
    for node in order:
        assert seen.issuperset(node.all_input_nodes)
        seen.add(node)
    found = simulate(order, costs)
    compute = sum(map(costs.compute, order))
    exchange = sum(costs.exchange(n) for n in order if n.target is ops.all_to_all.default)
    assert compute <= found.seconds <= compute + exchange
    assert found.seconds == compute + found.exposed


def test_peak_counts_what_is_alive_at_once_and_views_once() -> None:
    program = Program()
    tokens = program.tokens()
    first = program.work("first", tokens)
    view = program.graph.call_function(aten.view.default, (first, [2]))
    second = program.work("second", view)
    third = program.work("third", second)
    program.graph.output(third)

    def base(node: Node) -> Node:
        return first if node is view else node

    sizes = {first: 8, second: 4, third: 2, view: 8}
    assert peak_bytes([first, view, second, third], lambda n: sizes.get(n, 0), base) == 12
