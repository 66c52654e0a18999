"""The exchange on real ranks: the right rows, their gradients, and the two memory invariants.

A sent row is ``[source rank, destination rank, number]``, so every received row says where it
comes from and whether it is in the right place. Functions that take a ``rank`` run on the ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.library import Library, opcheck, register_fake

from moe_fx.ops.exchange import _pending, bytes_sent, pending_exchanges
from moe_fx.testing import RankPool

ops = torch.ops.moe_fx

Table = list[list[int]]
"""``table[source][destination]``: rows that travel."""


def uneven(world: int) -> Table:
    return [[(3 * source + 2 * to + 1) % 5 for to in range(world)] for source in range(world)]


def even(world: int) -> Table:
    return [[2] * world for _ in range(world)]


def none_from_rank_1(world: int) -> Table:
    return [[0] * world if source == 1 else [2] * world for source in range(world)]


def all_to_rank_1(world: int) -> Table:
    return [[source + 1 if to == 1 else 0 for to in range(world)] for source in range(world)]


def none_at_all(world: int) -> Table:
    return [[0] * world for _ in range(world)]


TABLES = [uneven, even, none_from_rank_1, all_to_rank_1, none_at_all]


@pytest.fixture(params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest) -> RankPool:
    pool: RankPool = request.getfixturevalue(f"ranks{request.param}")
    return pool


def world_group() -> str:
    group = dist.group.WORLD
    assert group is not None
    return group.group_name


def departing(rank: int, table: Table, dtype: torch.dtype = torch.float64) -> Tensor:
    labels = [[rank, to, n] for to, count in enumerate(table[rank]) for n in range(count)]
    return torch.tensor(labels, dtype=dtype).view(-1, 3)


def arriving(rank: int, table: Table, dtype: torch.dtype = torch.float64) -> Tensor:
    labels = [[source, rank, n] for source, row in enumerate(table) for n in range(row[rank])]
    return torch.tensor(labels, dtype=dtype).view(-1, 3)


def split_lists(rank: int, table: Table) -> tuple[Tensor, Tensor]:
    """(rows sent to each rank, rows received from each rank)."""
    return torch.tensor(table[rank]), torch.tensor([row[rank] for row in table])


def exchange(rows: Tensor, send: Tensor, recv: Tensor) -> Tensor:
    handle = ops.all_to_all(rows, send, recv, world_group())
    return ops.wait(handle, rows, send, recv, world_group())


def received_rows(handle: int) -> Tensor:
    """What ``wait`` does, without any of its checks."""
    pending = _pending.pop(handle)
    pending.work.wait()
    return pending.received


# -- which rows arrive -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    received: Tensor
    bytes_sent: int
    pending: int


def exchange_table(rank: int, table: Table, dtype: torch.dtype) -> Outcome:
    before = bytes_sent(world_group())
    received = exchange(departing(rank, table, dtype), *split_lists(rank, table))
    return Outcome(received, bytes_sent(world_group()) - before, pending_exchanges())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make_table", TABLES)
def test_each_row_arrives_where_it_was_sent_in_order_of_source(
    ranks: RankPool, make_table: Callable[[int], Table], dtype: torch.dtype
) -> None:
    table = make_table(ranks.world_size)
    for rank, outcome in enumerate(ranks.run(exchange_table, table, dtype)):
        assert outcome.received.dtype == dtype
        assert torch.equal(outcome.received, arriving(rank, table, dtype))
        assert outcome.pending == 0


@pytest.mark.parametrize("make_table", TABLES)
def test_bytes_sent_counts_only_rows_for_other_ranks(
    ranks: RankPool, make_table: Callable[[int], Table]
) -> None:
    table = make_table(ranks.world_size)
    for rank, outcome in enumerate(ranks.run(exchange_table, table, torch.bfloat16)):
        travelling = sum(table[rank]) - table[rank][rank]
        assert outcome.bytes_sent == travelling * 3 * 2


def exchange_columns(rank: int, table: Table) -> Tensor:
    columns = departing(rank, table).t().contiguous()
    return exchange(columns.t(), *split_lists(rank, table))


def test_rows_need_not_be_contiguous(ranks2: RankPool) -> None:
    for rank, received in enumerate(ranks2.run(exchange_columns, uneven(2))):
        assert torch.equal(received, arriving(rank, uneven(2)))


def exchange_two_at_once(rank: int, first: Table, second: Table) -> tuple[Tensor, Tensor, int]:
    """Both under way together, and waited for in the other order."""
    group = world_group()
    started = []
    for table in (first, second):
        rows, splits = departing(rank, table), split_lists(rank, table)
        started.append((ops.all_to_all(rows, *splits, group), rows, *splits, group))
    under_way = pending_exchanges()
    late, early = ops.wait(*started[1]), ops.wait(*started[0])
    return early, late, under_way


def test_exchanges_under_way_together_do_not_mix(ranks2: RankPool) -> None:
    results = ranks2.run(exchange_two_at_once, uneven(2), even(2))
    for rank, (first, second, under_way) in enumerate(results):
        assert under_way == 2
        assert torch.equal(first, arriving(rank, uneven(2)))
        assert torch.equal(second, arriving(rank, even(2)))


def exchange_counts(rank: int, local_experts: int) -> tuple[Tensor, Tensor]:
    num_experts = local_experts * dist.get_world_size()
    counts = 100 * (rank + 1) + torch.arange(num_experts)
    received = ops.exchange_counts(counts, world_group())
    return received, ops.split_sizes(counts, received)[0]


def test_counts_reach_the_owners_of_their_experts(ranks: RankPool) -> None:
    world, local = ranks.world_size, 3
    sent = [100 * (rank + 1) + torch.arange(local * world) for rank in range(world)]
    for rank, (received, sizes) in enumerate(ranks.run(exchange_counts, local)):
        mine = slice(rank * local, (rank + 1) * local)
        assert torch.equal(received, torch.stack([counts[mine] for counts in sent]))
        assert sizes.tolist() == [
            sent[rank].view(world, local).sum(1).tolist(),
            received.sum(1).tolist(),
        ]


# -- contracts -------------------------------------------------------------------------------------


def check_ops(rank: int) -> int:
    """opcheck on every rank alike, so that its collectives meet."""
    counts = torch.arange(6) + rank
    opcheck(ops.exchange_counts, (counts, world_group()))
    opcheck(ops.split_sizes, (counts, ops.exchange_counts(counts, world_group())))
    table = uneven(dist.get_world_size())
    rows, splits = departing(rank, table), split_lists(rank, table)
    # no test_aot_dispatch: it compares results, and each start has another handle
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.all_to_all, (rows, *splits, world_group()), test_utils=utils)
    started = list(_pending)
    for handle in started:
        received_rows(handle)
    return len(started)


def test_exchange_ops_pass_opcheck(ranks2: RankPool) -> None:
    first, second = ranks2.run(check_ops)
    assert first == second > 0


def raised(call: Callable[..., Any], *args: Any) -> str:
    try:
        call(*args)
    except RuntimeError as error:
        return str(error)
    return ""


def wait_twice(rank: int) -> tuple[int, str]:
    rows, splits = departing(rank, even(2)), split_lists(rank, even(2))
    handle = ops.all_to_all(rows, *splits, world_group())
    ops.wait(handle, rows, *splits, world_group())
    return int(handle), raised(ops.wait, handle, rows, *splits, world_group())


def test_waiting_twice_for_one_exchange_is_an_error_that_says_so(ranks2: RankPool) -> None:
    for handle, message in ranks2.run(wait_twice):
        assert f"exchange {handle}" in message
        assert "waited for already" in message


def wait_with_other_rows(rank: int) -> str:
    rows, splits = departing(rank, even(2)), split_lists(rank, even(2))
    handle = ops.all_to_all(rows, *splits, world_group())
    return raised(ops.wait, handle, rows.clone(), *splits, world_group())


def test_waiting_with_other_rows_than_are_being_sent_is_an_error(ranks2: RankPool) -> None:
    for message in ranks2.run(wait_with_other_rows):
        assert "not given the rows that all_to_all sends" in message


def send_too_few(rank: int) -> tuple[str, int]:
    rows, (send, recv) = departing(rank, even(2)), split_lists(rank, even(2))
    return raised(ops.all_to_all, rows, send - 1, recv, world_group()), pending_exchanges()


def test_send_counts_that_do_not_cover_the_rows_are_an_error_before_anything_is_sent(
    ranks2: RankPool,
) -> None:
    for message, pending in ranks2.run(send_too_few):
        assert "send counts [1, 1] add up to 2 rows, but 4 rows are given" in message
        assert pending == 0


# -- gradients -------------------------------------------------------------------------------------


def gradient(rank: int, table: Table, compiled: bool) -> tuple[Tensor, int]:
    """Of the sent rows, where the gradient of a received row is that row's own label."""
    rows = torch.zeros_like(departing(rank, table), requires_grad=True)
    step = torch.compile(exchange, fullgraph=True) if compiled else exchange
    received = step(rows, *split_lists(rank, table))
    (grad,) = torch.autograd.grad(received, rows, arriving(rank, table))
    return grad, pending_exchanges()


@pytest.mark.parametrize("make_table", TABLES)
def test_gradients_travel_back_the_way_the_rows_came(
    ranks: RankPool, make_table: Callable[[int], Table]
) -> None:
    table = make_table(ranks.world_size)
    for rank, (grad, pending) in enumerate(ranks.run(gradient, table, False)):
        assert torch.equal(grad, departing(rank, table))
        assert pending == 0


def test_compiled_gradients_travel_back_the_way_the_rows_came(ranks2: RankPool) -> None:
    for rank, (grad, pending) in enumerate(ranks2.run(gradient, uneven(2), True)):
        assert torch.equal(grad, departing(rank, uneven(2)))
        assert pending == 0


# -- compiled --------------------------------------------------------------------------------------


def dispatch(rows: Tensor, counts: Tensor) -> Tensor:
    received = ops.exchange_counts(counts, world_group())
    send, recv = ops.split_sizes(counts, received)[0].unbind()
    return exchange(rows * 2, send, recv) + 1


def compile_dispatch(rank: int, tables: list[Table]) -> tuple[list[Tensor], list[Tensor], int]:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(dispatch, backend=counter, fullgraph=True)
    eager, got = [], []
    for table in tables:
        rows, counts = departing(rank, table), torch.tensor(table[rank])
        eager.append(dispatch(rows, counts))
        torch._dynamo.decorators.mark_unbacked(rows, 0)
        got.append(compiled(rows, counts))
    return got, eager, counter.frame_count


def test_one_compiled_graph_serves_all_counts_and_equals_eager(ranks2: RankPool) -> None:
    tables = [make_table(2) for make_table in TABLES]
    for rank, (got, eager, compilations) in enumerate(ranks2.run(compile_dispatch, tables)):
        assert compilations == 1
        for result, expected, table in zip(got, eager, tables, strict=True):
            assert torch.equal(result, expected)
            assert torch.equal(expected, arriving(rank, table) * 2 + 1)


# -- the two memory invariants ---------------------------------------------------------------------
#
# A link slower than all compute: the exchange happens only when it is waited for, from the buffer
# that was given to it at its start, and the received buffer holds NaN until then. The graph puts
# work between start and wait that would like the sent rows' memory.

_TEST_OPS = Library("moe_fx_test_exchange", "DEF")
_TEST_OPS.define("after(Tensor handle, Tensor other) -> Tensor")
_TEST_OPS.impl("after", lambda handle, other: handle.clone(), "CPU")
_TEST_OPS.define("forgetful_wait(Tensor handle, Tensor recv_counts, str group) -> Tensor")
HIDDEN = 16


_TEST_OPS.impl("forgetful_wait", lambda handle, recv, group: received_rows(int(handle)), "CPU")


@register_fake("moe_fx_test_exchange::after", lib=_TEST_OPS)
def _after_fake(handle: Tensor, other: Tensor) -> Tensor:
    return torch.empty_like(handle)


@register_fake("moe_fx_test_exchange::forgetful_wait", lib=_TEST_OPS)
def _forgetful_wait_fake(handle: Tensor, recv_counts: Tensor, group: str) -> Tensor:
    return torch.empty((torch.library.get_ctx().new_dynamic_size(min=0), HIDDEN))


def wait(handle: Tensor, sent: Tensor, send: Tensor, recv: Tensor, group: str) -> Tensor:
    return ops.wait(handle, sent, send, recv, group)


def forgetful_wait(handle: Tensor, sent: Tensor, send: Tensor, recv: Tensor, group: str) -> Tensor:
    """The wait one would write first: it says nothing of the sent rows."""
    return torch.ops.moe_fx_test_exchange.forgetful_wait(handle, recv, group)


WAITS = {"wait": wait, "forgetful wait": forgetful_wait}


def permuted(tokens: Tensor, wide: Tensor) -> Tensor:
    return ops.permute(tokens, torch.arange(len(tokens)).flip(0))[0]


def multiplied(tokens: Tensor, wide: Tensor) -> Tensor:
    return tokens @ wide[:, :HIDDEN]


def pointwise(tokens: Tensor, wide: Tensor) -> Tensor:
    return tokens.sin() * 2


def sliced(tokens: Tensor, wide: Tensor) -> Tensor:
    return torch.cat([tokens, tokens]).sin()[: len(tokens)]


SENT = {"permuted": permuted, "multiplied": multiplied, "pointwise": pointwise, "sliced": sliced}
"""How the sent rows come to be."""


def another_layer(sent: Tensor, other: Tensor, wide: Tensor) -> Tensor:
    """Like a shared expert: its first buffer has the size and dtype of the sent rows."""
    return torch.cos(other.sin() @ wide) @ wide.t()


def over_the_sent_rows(sent: Tensor, other: Tensor, wide: Tensor) -> Tensor:
    """The last that reads the sent rows; it could write over them."""
    return sent * 2 + other


FILLERS = {"another layer": another_layer, "over the sent rows": over_the_sent_rows}


Names = tuple[str, str, str]
"""Of ``SENT``, ``FILLERS`` and ``WAITS``."""


def overlapped(
    names: Names, tokens: Tensor, other: Tensor, wide: Tensor, send: Tensor, recv: Tensor
) -> tuple[Tensor, Tensor]:
    rows, filler, wait_name = names
    sent = SENT[rows](tokens, wide)
    handle = ops.all_to_all(sent, send, recv, world_group())
    between = FILLERS[filler](sent, other, wide)
    handle = torch.ops.moe_fx_test_exchange.after(handle, between)  # whatever Inductor prefers
    return WAITS[wait_name](handle, sent, send, recv, world_group()) * 1.5, between


class _Late:
    def __init__(self, finish: Callable[[], Any]) -> None:
        self.finish = finish

    def wait(self, timeout: timedelta | None = None) -> Any:
        return self.finish()


@contextlib.contextmanager
def late_exchange(arrives: bool = True) -> Iterator[None]:
    """Exchange rows at the wait, not before (or never), into a buffer that holds NaN until then."""
    real = dist.all_to_all_single

    def late(output: Tensor, source: Tensor, *args: Any, async_op: bool = False, **kw: Any) -> Any:
        if not async_op:
            return real(output, source, *args, **kw)
        output.fill_(float("nan"))
        return _Late(lambda: real(output, source, *args, **kw) if arrives else None)

    with mock.patch.object(dist, "all_to_all_single", late):
        yield


def overlap_inputs(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    table = [[10, 14], [8, 16]]
    torch.manual_seed(rank)
    tokens, other = torch.randn(2, 24, HIDDEN)
    return tokens, other, torch.randn(HIDDEN, 8 * HIDDEN), *split_lists(rank, table)


@dataclass(frozen=True)
class Overlapped:
    """Compiled and over a late link (``got``), eager over the real one (``expected``); what stood
    between start and wait in both, and the emitted calls."""

    got: Tensor
    expected: Tensor
    got_between: Tensor
    expected_between: Tensor
    code: str


def run_late(rank: int, names: Names, arrives: bool = True) -> Overlapped:
    inputs = overlap_inputs(rank)
    expected, expected_between = overlapped(names, *inputs)
    compiled = torch.compile(overlapped, fullgraph=True)
    with late_exchange(arrives), torch._inductor.config.patch(fx_graph_cache=False):
        (got, between), (code,) = run_and_get_code(compiled, names, *inputs)
    return Overlapped(got, expected, between, expected_between, call_body(code))


def call_body(code: str) -> str:
    """The emitted calls, in order, without comments."""
    body = code[code.index("def call(") : code.index("runner = Runner")]
    return "\n".join(line for line in body.splitlines() if not line.strip().startswith("#"))


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("rows", ["permuted", "multiplied"])
def test_the_sent_rows_are_intact_until_the_wait(ranks2: RankPool, rows: str, filler: str) -> None:
    for result in ranks2.run(run_late, (rows, filler, "wait")):
        torch.testing.assert_close(result.got_between, result.expected_between)
        assert torch.allclose(result.got, result.expected), result.code


@pytest.mark.parametrize("rows", ["pointwise", "sliced"])
def test_sent_rows_that_inductor_computes_itself_are_intact_until_the_wait(
    ranks2: RankPool, rows: str
) -> None:
    for result in ranks2.run(run_late, (rows, "another layer", "wait")):
        torch.testing.assert_close(result.got_between, result.expected_between)
        assert torch.allclose(result.got, result.expected, atol=1e-6), result.code


@pytest.mark.parametrize(
    ("rows", "filler"),
    [("permuted", "over the sent rows"), ("multiplied", "another layer")],
)
def test_a_wait_that_does_not_take_the_sent_rows_lets_inductor_write_over_them(
    ranks2: RankPool, rows: str, filler: str
) -> None:
    """The tests above have teeth: this is what they would see."""
    for result in ranks2.run(run_late, (rows, filler, "forgetful wait")):
        torch.testing.assert_close(result.got_between, result.expected_between)
        assert not torch.allclose(result.got, result.expected), result.code


@pytest.mark.parametrize("filler", FILLERS)
def test_the_received_rows_are_not_read_before_the_wait(ranks2: RankPool, filler: str) -> None:
    for result in ranks2.run(run_late, ("permuted", filler, "wait")):
        assert result.got.isfinite().all(), result.code
        assert result.got_between.isfinite().all(), result.code


def test_received_rows_that_are_read_too_early_show(ranks2: RankPool) -> None:
    """The test above has teeth: rows that never arrive are NaN."""
    for result in ranks2.run(run_late, ("permuted", "another layer", "wait"), False):
        assert result.got.isnan().all()
        assert result.got_between.isfinite().all()


def late_gradients(rank: int, compiled: bool) -> tuple[Tensor, ...]:
    tokens, other, wide, send, recv = overlap_inputs(rank)
    tokens.requires_grad_()
    wide.requires_grad_()
    step = torch.compile(overlapped, fullgraph=True) if compiled else overlapped
    with late_exchange() if compiled else contextlib.nullcontext():
        names = ("multiplied", "another layer", "wait")
        received, between = step(names, tokens, other, wide, send, recv)
        loss = received.square().sum() + between.sum()
        return torch.autograd.grad(loss, (tokens, wide))


def test_compiled_training_over_a_late_link_has_the_gradients_of_eager(ranks2: RankPool) -> None:
    compiled, eager = ranks2.run(late_gradients, True), ranks2.run(late_gradients, False)
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# -- order -----------------------------------------------------------------------------------------

IN_ORDER = {"reorder_for_locality": False, "reorder_for_peak_memory": False}
"""The two things in Inductor (torch 2.13) that undo an order."""


def loosely_overlapped(
    tokens: Tensor, other: Tensor, wide: Tensor, send: Tensor, recv: Tensor
) -> tuple[Tensor, Tensor]:
    """As a pass orders it, with nothing but the order of nodes to keep the filler in between."""
    sent = permuted(tokens, wide)
    handle = ops.all_to_all(sent, send, recv, world_group())
    between = another_layer(sent, other, wide)
    return wait(handle, sent, send, recv, world_group()) * 1.5, between


def emitted_order(rank: int, options: dict[str, Any]) -> list[str]:
    with torch._inductor.config.patch(fx_graph_cache=False):
        compiled = torch.compile(loosely_overlapped, fullgraph=True, options=options)
        _, (code,) = run_and_get_code(compiled, *overlap_inputs(rank))
    landmarks = {
        "moe_fx.all_to_all.default(": "start",
        "extern_kernels.mm(": "filler",
        "moe_fx.wait.default(": "wait",
    }
    return [
        name
        for line in call_body(code).splitlines()
        for text, name in landmarks.items()
        if text in line and "assert" not in line
    ]


def test_inductor_emits_start_filler_wait_where_its_reorderings_are_off(ranks2: RankPool) -> None:
    for order in ranks2.run(emitted_order, IN_ORDER):
        assert order == ["start", "filler", "filler", "wait"]
