"""The pipeline's prediction: exact on toy links and devices, bounded on any, and measured rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_fx.cost.layer import Choice, Layer, choose, predict, timeline
from moe_fx.cost.link import Link
from moe_fx.cost.pipeline import Pipeline, Prediction, simulate
from moe_fx.cost.rates import measured


@dataclass(frozen=True)
class Toy:
    """Seconds per multiply-add, per byte copied, per piece, of cutting by rows, and per byte of a
    new buffer of more than 64."""

    flop: float = 0.0
    byte: float = 0.0
    piece: float = 0.0
    cut: float = 0.0
    fresh: float = 0.0

    def gemm_seconds(self, rows: float, d: int, n: int, groups: float = 1) -> float:
        return self.flop * rows * d * n * groups

    def copy_seconds(self, num_bytes: float) -> float:
        return self.byte * num_bytes

    def piece_seconds(self) -> float:
        return self.piece

    def fresh_seconds(self, num_bytes: float) -> float:
        return self.fresh * num_bytes if num_bytes > 64 else 0.0

    def cut_seconds(self) -> float:
        return self.cut


LAYER = Layer(
    tokens=8,
    top_k=2,
    num_experts=8,
    world_size=2,
    matmuls=((2, 4), (2, 2)),
    dtype=torch.float32,
    dispatch_bytes=1.0,
    combine_bytes=1.0,
    skew=1.0,
)
LINK = Link(latency=1.0, alone=1.0, two=0.5, busy=0.5)
FAST = Link(latency=0.0, alone=0.5, two=0.5, busy=0.5)
GEMMS = Toy(flop=1 / 12)  # 12 multiply-adds a row: 16 rows take 16 s


def test_one_piece_hides_nothing() -> None:
    # 16 rows of 1 byte, half of them travel: counts 1, dispatch 1 + 8, experts 16, combine 1 + 8
    assert predict(LAYER, LINK, GEMMS, Choice()) == Prediction(35, 16, 19, 19)


def test_a_shared_expert_fills_the_waiting() -> None:
    # 8 tokens of 12 multiply-adds: 8 of the 19 s; of 30: 20, of which 1 is left at the end
    shared = replace(LAYER, shared=((2, 6),))
    assert predict(shared, LINK, GEMMS, Choice()) == Prediction(35, 24, 19, 11)
    more = predict(replace(LAYER, shared=((3, 10),)), LINK, GEMMS, Choice())
    assert (more.seconds, more.exposed) == (pytest.approx(36), 0)


def test_two_pieces_hide_the_middle() -> None:
    # 1 counts; 1 + 4 * 0.5 first dispatch, waited for; experts 8 s meanwhile second dispatch 1 + 4;
    # experts 8 s meanwhile first combine 1 + 4; second combine 1 + 4, waited for
    two = predict(LAYER, LINK, GEMMS, Choice(2))
    assert two == Prediction(1 + 3 + 16 + 5, 16, 1 + 3 + 5 + 5 + 5, 9)
    assert predict(LAYER, LINK, GEMMS, Choice(1, 2)) == two


def test_the_timeline_is_what_was_added_up() -> None:
    spans = timeline(LAYER, LINK, GEMMS, Choice(2))
    assert spans[-1].end == 25
    lanes = {lane: [(s.start, s.end) for s in spans if s.lane == lane] for lane in LANES}
    # counts until 1, first rows there at 4, computed until 12; second rows there at 9 ...
    assert lanes["compute"] == [(4, 12), (12, 20)]
    assert lanes["exchange"] == [(0, 1), (1, 4), (4, 9), (12, 17), (20, 25)]
    assert lanes["wait"] == [(0, 1), (1, 4), (20, 25)]


LANES = ("compute", "wait", "exchange")


def test_a_slow_link_is_never_idle_once_dispatched() -> None:
    # 0.75 s of experts a piece: the first combine is queued behind the second dispatch
    two = predict(LAYER, LINK, Toy(flop=1.5 / (16 * 12)), Choice(2))
    # counts 1, dispatch 3; dispatch: 1 latency of which 0.75 s run, then busy: 0.25 + 2;
    # first combine: 0.75 s of latency alone; then busy: 0.25 + 2; second combine 5
    assert two.seconds == 1 + 3 + 0.75 + 2.25 + 0.75 + 2.25 + 5
    assert two.exchange == two.seconds
    assert two.exposed == two.seconds - 1.5


def test_bytes_under_way_change_pace_when_another_exchange_is_queued() -> None:
    # dispatch of piece 2 alone for 3 of its 1 + 4 s, then 2 bytes at the busy rate
    pipeline = Pipeline(before=0, dispatch=[4.0] * 2, work=[3.0] * 2, combine=[4.0] * 2, after=0)
    predicted = simulate(pipeline, LINK)
    # 1 (counts), 3 (dispatch), 3 (work), 1 (rest), 3 (work; combine 1 alone), 1 (2 bytes left), 5
    assert predicted == Prediction(1 + 3 + 3 + 1 + 3 + 1 + 5, 6, 1 + 3 + 4 + 4 + 5, 11)


def test_the_fewer_are_in_flight_the_slower_is_a_link() -> None:
    # each goes at the rate of as many as are still in flight, and at the end it is alone
    eight = Pipeline(before=0, dispatch=[0.0] * 8, work=[0.0] * 8, combine=[1.0] * 8, after=0)
    link = Link(latency=0.0, alone=8.0, two=5.0, busy=1.0)
    rates = [1.0, *(link.rate(n) for n in (7, 6, 5, 4, 3)), 5.0, 8.0]
    assert rates == sorted(rates) and rates[4] == pytest.approx(3.0)
    assert simulate(eight, link).exchange == pytest.approx(sum(rates))


def test_gradients_of_weights_fill_the_waiting() -> None:
    # the backward is the forward and 16 s more of products, 9 of them during the combine
    forward = predict(LAYER, LINK, GEMMS, Choice())
    both = predict(replace(LAYER, training=True), LINK, GEMMS, Choice())
    assert both == forward + Prediction(35 + 7, 32, 19, 10)


def test_summed_gradients_are_those_of_all_chunks_at_the_end() -> None:
    # 1 counts, 3 dispatch, 16 experts; then 5 combine, behind which 5 of the 16 s
    training = replace(LAYER, training=True)
    summed = replace(training, sums_gradients=True)
    each, one = (predict(layer, LINK, GEMMS, Choice(2)) for layer in (training, summed))
    assert each == one == predict(LAYER, LINK, GEMMS, Choice(2)) + Prediction(36, 32, 19, 4)


def test_gradients_of_each_chunk_fill_the_waiting_for_the_next() -> None:
    halves = Pipeline(before=0, dispatch=[4.0] * 2, work=[1.0] * 2, combine=[0.0] * 2, after=0)
    each, one = (
        simulate(replace(halves, piece_fillers=seconds), LINK)
        for seconds in ([2.0, 2.0], [0.0, 4.0])
    )
    assert (each.compute, one.compute) == (6, 6)
    assert each.exposed < one.exposed


def test_copies() -> None:
    # permute 16; regroup in and out 32, activation 16 rows * 4 * 4 bytes = 256; sum 32 (join 16)
    one = predict(LAYER, LINK, Toy(byte=1.0, piece=5.0), Choice())
    two = predict(LAYER, LINK, Toy(byte=1.0, piece=5.0), Choice(2))
    assert one.compute == 16 + 32 + 256 + 32 + 5
    assert two.compute == 16 + 32 + 256 + 32 + 16 + 2 * 5


def test_cutting_by_rows_costs_before_the_first_exchange_of_the_forward() -> None:
    layer = replace(LAYER, training=True, sums_gradients=True)
    whole, by_rows, by_tokens = (
        predict(layer, LINK, Toy(cut=7.0), choice)
        for choice in (Choice(), Choice(row_slices=2), Choice(1, 2))
    )
    assert (whole.compute, by_rows.compute, by_tokens.compute) == (0, 7, 0)


def test_small_pieces_have_buffers_that_are_kept() -> None:
    # of 16 rows the products' 4 and 2 columns, the second's 2 inputs: 256, 128 and 128 bytes
    one, two, four = (
        predict(LAYER, LINK, Toy(fresh=1.0), choice) for choice in (Choice(), Choice(2), Choice(4))
    )
    assert (one.compute, two.compute, four.compute) == (512, 256, 0)


def test_gradients_of_weights_are_stored_and_by_token_slices_added() -> None:
    # 4 experts of 12 elements of 4 bytes
    layer, toy = replace(LAYER, training=True), Toy(byte=1.0)
    one, experts, tokens = (
        predict(layer, LINK, toy, c) for c in (Choice(), Choice(2), Choice(1, 2))
    )
    assert experts.compute - one.compute == 2 * 16  # two joins
    assert tokens.compute - experts.compute == (2 * 2 - 1) * 4 * 12 * 4
    summed = predict(replace(layer, sums_gradients=True), LINK, toy, Choice(1, 2))
    assert summed.compute == experts.compute


def test_skew_lengthens_work_and_exchange() -> None:
    skewed = predict(replace(LAYER, skew=1.5), LINK, GEMMS, Choice())
    assert skewed == Prediction(1 + 13 + 24 + 13, 24, 27, 27)


@pytest.mark.parametrize(
    "choice",
    [
        Choice(3),
        Choice(8),
        Choice(0),
        Choice(1, 9),
        Choice(2, row_slices=2),
        Choice(strategy="allgather", row_slices=2),
        Choice(row_slices=0),
    ],
)
def test_rejects_what_the_layer_cannot_do(choice: Choice) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        predict(LAYER, LINK, GEMMS, choice)


def test_chunks_by_rows_are_trained_where_gradients_are_summed() -> None:
    training = replace(LAYER, training=True)
    with pytest.raises(ValueError, match="does not fit"):
        predict(training, LINK, GEMMS, Choice(row_slices=2))
    assert Choice(row_slices=2).legal(replace(training, sums_gradients=True))


def test_chunks_by_rows_have_outer_ones_in_halves() -> None:
    """Each piece of 4 of the 8 rows sent; its experts 16 / 4 s; counts 1."""
    whole, halved = (
        predict(LAYER, FAST, GEMMS, Choice(n, row_slices=m)) for n, m in ((2, 1), (1, 2))
    )
    assert halved.compute == whole.compute == 16
    assert whole.exposed == 2 * FAST.alone * 4
    assert halved.exposed == 2 * FAST.alone * 2


def test_one_rank_has_no_cost_of_exchange() -> None:
    with pytest.raises(ValueError, match="nothing is exchanged"):
        replace(LAYER, world_size=1)


def test_the_first_ranks_have_most_where_experts_do_not_divide() -> None:
    assert replace(LAYER, num_experts=7, world_size=3).local_experts == 3


def test_chooses_the_fastest_and_returns_all_predictions() -> None:
    candidates = [Choice(n) for n in (1, 2, 4)]
    toy = Toy(flop=1 / 12, piece=3.0)
    best, predictions = choose(LAYER, LINK, toy, candidates)
    assert best == candidates[1]
    assert predictions == [predict(LAYER, LINK, toy, Choice(n)) for n in (1, 2, 4)]
    assert [p.seconds for p in predictions] == [38, 31, 34]


def test_prefers_fewer_pieces_for_a_gain_within_one_percent() -> None:
    fast = Link(latency=0.0, alone=0.01, two=0.01, busy=0.01)  # 16.16 s in one piece, 16.08 in two
    candidates = [Choice(4), Choice(2), Choice(1)]
    assert choose(LAYER, fast, GEMMS, candidates)[0] == Choice(1)
    slower = Link(latency=0.0, alone=0.1, two=0.1, busy=0.1)  # 17.6, 16.8, 16.4
    assert choose(LAYER, slower, GEMMS, candidates)[0] == Choice(4)


def test_of_equals_slices_of_experts_are_chosen() -> None:
    """What slices of tokens cost beyond the model is the least known."""
    candidates = [Choice(1, 2), Choice(2, 1)]
    best, (by_token, by_expert) = choose(LAYER, LINK, GEMMS, candidates)
    assert by_token == by_expert and best == candidates[1]


def test_rejects_an_empty_choice() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        choose(LAYER, LINK, GEMMS, [])


links = st.builds(
    lambda latency, alone, share: Link(latency, alone, alone * share**0.5, alone * share),
    st.floats(0, 2),
    st.floats(0.001, 2),
    st.floats(0.3, 1),
)
toys = st.builds(Toy, st.floats(0, 1), st.floats(0, 1), st.floats(0, 2))
choices = st.builds(Choice, st.sampled_from([1, 2, 4]), st.integers(1, 4))
layers = st.builds(
    lambda tokens, top_k, width, training: replace(
        LAYER,
        tokens=tokens,
        top_k=top_k,
        dispatch_bytes=width,
        combine_bytes=width,
        training=training,
    ),
    st.integers(8, 64),
    st.integers(1, 8),
    st.floats(0.1, 50),
    st.booleans(),
)


def _at_most(a: float, b: float) -> bool:
    return a <= b * (1 + 1e-9) + 1e-9


@settings(deadline=None)
@given(layers, links, toys, choices)
def test_between_the_longer_of_both_and_their_sum(
    layer: Layer, link: Link, toy: Toy, choice: Choice
) -> None:
    p = predict(layer, link, toy, choice)
    assert _at_most(max(p.compute, p.exchange), p.seconds)
    assert _at_most(p.seconds, p.compute + p.exchange)
    assert _at_most(p.exposed, p.exchange)
    assert p.seconds == pytest.approx(p.compute + p.exposed)


@settings(deadline=None)
@given(layers, links, toys, choices, st.floats(1, 4))
def test_more_bytes_never_take_less_time(
    layer: Layer, link: Link, toy: Toy, choice: Choice, factor: float
) -> None:
    wider = replace(
        layer,
        dispatch_bytes=factor * layer.dispatch_bytes,
        combine_bytes=factor * layer.combine_bytes,
    )
    assert _at_most(
        predict(layer, link, toy, choice).seconds, predict(wider, link, toy, choice).seconds
    )


def test_a_weight_too_large_to_make_is_measured_in_part() -> None:
    compute = measured(torch.device("cpu"), torch.float32)
    columns = (128 << 20) // 4 // 65536
    part = compute.gemm_seconds(1, 65536, columns)
    assert compute.gemm_seconds(1, 65536, 1000 * columns) == pytest.approx(1000 * part)


def test_measured_rates() -> None:
    compute = measured(torch.device("cpu"), torch.float32)
    small = compute.gemm_seconds(16, 64, 64)
    large = compute.gemm_seconds(512, 256, 256)
    assert 0 < small < large < 1
    assert compute.gemm_seconds(512, 256, 256) == large  # kept
    assert compute.gemm_seconds(1024, 256, 256) == 2 * large
    assert compute.gemm_seconds(512, 256, 256, groups=3) == pytest.approx(3 * large)
    assert compute.gemm_seconds(0, 64, 64) == 0
    between = compute.gemm_seconds(384, 256, 256)
    ends = sorted([compute.gemm_seconds(256, 256, 256), large])
    assert ends[0] <= between <= ends[1]
    assert compute.copy_seconds(2e6) == 2 * compute.copy_seconds(1e6) > 0
    assert 0 < compute.piece_seconds() < 1
    assert 0 <= compute.cut_seconds() < 1
    assert compute.fresh_seconds(1 << 20) == 0
    assert compute.fresh_seconds(128 << 20) == 2 * compute.fresh_seconds(64 << 20)


@pytest.mark.parametrize("disturbed", range(5))
def test_what_disturbs_one_measurement_does_not_tell_rows_apart(
    monkeypatch: pytest.MonkeyPatch, disturbed: int
) -> None:
    """A device that takes as long for each row, faster from the third round on, and that is held up
    once."""
    calls = 0

    def once(device: torch.device, call: Callable[[], torch.Tensor]) -> float:
        nonlocal calls
        calls += 1
        slower = 3.0 if calls <= 8 else 1.0
        return 1e-9 * call().numel() * (slower if calls != 8 + disturbed else 20 * slower)

    monkeypatch.setattr("moe_fx.cost.rates._once", once)
    compute = measured(torch.device("cpu"), torch.float32)
    each = [compute.gemm_seconds(rows, 24, 40 + disturbed) / rows for rows in (64, 141, 256, 500)]
    assert each == pytest.approx(len(each) * [each[0]])
    compute.gemm_seconds(40, 24, 40 + disturbed)
    measured_so_far = calls
    compute.gemm_seconds(3, 24, 40 + disturbed)
    assert calls == measured_so_far, "those of few rows are measured together"


def test_rates_are_measured_on_real_tensors_while_a_compiler_traces() -> None:
    with FakeTensorMode():
        assert measured(torch.device("cpu"), torch.float64).gemm_seconds(8, 32, 48) > 0


def test_an_allgather_sends_tokens_and_an_alltoall_pairs() -> None:
    wide = replace(LAYER, dispatch_bytes=100.0, combine_bytes=100.0)
    gathered = predict(wide, LINK, GEMMS, Choice(strategy="allgather"))
    # sizes 1; 8 tokens of 100 bytes with two ids and weights of 8 bytes: 1 + 8 * 116; experts 16;
    # shares of 8 tokens back: 1 + 800
    assert gathered == Prediction(1 + 929 + 16 + 801, 16, 1 + 929 + 801, 1 + 929 + 801)
    options = [Choice(), Choice(strategy="allgather")]
    assert choose(wide, LINK, GEMMS, options)[0].strategy == "alltoall"  # of two pairs one travels
    assert choose(replace(wide, top_k=4), LINK, GEMMS, options)[0].strategy == "allgather"


def test_slots_travel_filled_or_not() -> None:
    exact = predict(LAYER, LINK, GEMMS, Choice())
    for factor, slots in ((None, 2.0), (1.5, 1.5), (1.0, 1.0)):
        padded = predict(LAYER, LINK, GEMMS, Choice(1, 1, "padded_alltoall", factor))
        # 8 pairs of one byte travel there and back
        assert padded.exchange == pytest.approx(exact.exchange + 2 * 8 * (slots - 1))
        assert padded.compute == exact.compute


def test_weights_travel_whatever_the_tokens() -> None:
    few, many = (
        predict(replace(LAYER, tokens=n), LINK, GEMMS, Choice(strategy="gather_weights"))
        for n in (8, 800)
    )
    # half of 8 experts of 12 elements of 4 bytes; two more exchanges of nothing
    assert few.exchange == many.exchange == 3 + 8 * 12 * 4 / 2
    assert many.compute == pytest.approx(100 * few.compute)


def test_tokens_are_cut_where_experts_are_not() -> None:
    assert Choice(1, 4, "allgather").legal(LAYER)
    assert not Choice(4, 1, "allgather").legal(LAYER)
