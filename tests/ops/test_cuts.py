"""Cuts: pieces of as many rows, which ranks agree on, of whatever the routing gives them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import moe_fx.ops  # noqa: F401  (registers the ops)
from moe_fx.ops.cuts import NOBODY, shares

ops = torch.ops.moe_fx
property_test = settings(max_examples=80, deadline=None)


@st.composite
def routings(draw: st.DrawFn) -> tuple[list[Tensor], int, int, int]:
    """(ids [T, 2] of each rank, experts, chunks, least)."""
    world, local = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    experts = world * local
    ids = []
    for _ in range(world):
        size = 2 * draw(st.integers(0, 20))
        favourite = draw(st.integers(0, experts - 1))
        each = st.one_of(st.just(favourite), st.integers(0, experts - 1))
        flat = draw(st.lists(each, min_size=size, max_size=size))
        ids.append(torch.tensor(flat, dtype=torch.int64).view(-1, 2))
    return ids, experts, draw(st.integers(2, 5)), draw(st.integers(1, 6))


def cut(
    ids: list[Tensor], experts: int, chunks: int, least: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``sizes, received, of_experts`` of every rank."""
    counts = torch.stack([torch.bincount(one.flatten(), minlength=experts) for one in ids])
    return [ops.cut_rows(counts, rank, chunks, least) for rank in range(len(ids))]


@given(routings())
@property_test
def test_what_is_received_is_what_was_sent_expert_by_expert(
    routing: tuple[list[Tensor], int, int, int],
) -> None:
    ids, experts, chunks, least = routing
    world, local = len(ids), experts // len(ids)
    cuts = cut(ids, experts, chunks, least)
    sent = []
    for rank, (sizes, received, of_experts) in enumerate(cuts):
        assert torch.equal(of_experts, received.sum(1))
        pair = torch.arange(ids[rank].numel(), dtype=torch.float64)
        expert = ids[rank].flatten()
        column = torch.stack([pair, expert.double()], 1)
        pieces, row_map = ops.permute_cut(column, expert, sizes)
        assert torch.equal(torch.cat(list(pieces))[row_map.long()], column)
        assert torch.equal(received.sum(-1), sizes[:, 1].clamp(min=0))
        kept = sizes[:, 0].clamp(min=0).tolist()
        sent.append([piece.split(kept[at]) for at, piece in enumerate(pieces)])
    for owner, (_, received, _) in enumerate(cuts):
        for source in range(world):
            rows = [sent[source][at][owner] for at in range(len(received))]
            for piece, counts in zip(rows, received[:, source], strict=True):
                wanted = torch.repeat_interleave(torch.arange(local) + owner * local, counts)
                assert torch.equal(piece[:, 1].long(), wanted)
            whole = torch.cat(rows)[:, 0]
            by_expert = torch.cat(rows)[:, 1]
            for expert in range(owner * local, (owner + 1) * local):
                assert (whole[by_expert == expert].diff() > 0).all()  # in the sender's order


@given(routings())
@property_test
def test_pieces_are_even_but_for_small_parts_of_experts(
    routing: tuple[list[Tensor], int, int, int],
) -> None:
    ids, experts, chunks, least = routing
    cuts = cut(ids, experts, chunks, least)
    chunks = max(1, min(chunks, max(int(r.sum()) for _, r, _ in cuts) // (2 * least)))
    for _, _, of_expert in cuts:
        total = int(of_expert.sum())
        slack = max(least, total // (4 * chunks))
        # a cut through an expert leaves parts of about `slack` rows (each source rounds down),
        # two cuts through it what is between them
        torn = (of_expert > 0).sum(0) > 1
        parts = of_expert[:, torn]
        assert (parts[parts > 0] >= min(slack, total // (2 * chunks)) - len(ids)).all()
        ends = of_expert.sum(1).cumsum(0)[: len(shares(chunks))]
        parts_before = torch.tensor(shares(chunks)).cumsum(0)
        wanted = total * parts_before // (2 * chunks)
        assert (ends - wanted).abs().max() <= slack + len(ids)


def test_an_expert_that_most_select_is_spread_and_others_are_whole() -> None:
    counts = torch.tensor([[100, 100, 800, 100, 100]])
    sizes, received, _ = ops.cut_rows(counts, 0, 4, 64)
    assert received[:, 0].tolist() == [
        [100, 0, 0, 0, 0],
        [0, 100, 100, 0, 0],
        [0, 0, 300, 0, 0],
        [0, 0, 300, 0, 0],
        [0, 0, 100, 0, 0],
        [0, 0, 0, 100, 100],
    ]
    assert sizes[:, 0, 0].tolist() == [100, 200, 300, 300, 100, 200]


def test_few_rows_are_not_cut_and_nobody_exchanges_the_other_pieces() -> None:
    few, more = torch.tensor([[0, 3, 0, 9], [5, 0, 7, 0]]), torch.tensor([[99] * 4, [99] * 4])
    for counts, used in ((few, 1), (more, 3)):
        for rank in range(2):
            sizes, received, _ = ops.cut_rows(counts, rank, 8, 64)
            num_pieces = len(shares(used))
            assert (sizes[num_pieces:] == NOBODY).all() and not received[num_pieces:].any()
            assert (sizes[:num_pieces] >= 0).all()
            assert sizes[:num_pieces, 0].sum() == counts[rank].sum()


def test_experts_that_fit_are_not_torn() -> None:
    counts = torch.tensor([[101, 99, 103, 97], [99, 100, 98, 101]])
    counts = torch.cat([counts, counts], 1)
    _, received, _ = ops.cut_rows(counts, 0, 4, 100)
    assert received.count_nonzero(0).tolist() == [[1] * 4] * 2  # each in one piece


@pytest.mark.parametrize("chunks", [1, 2, 3, 8])
def test_the_outer_chunks_are_halves(chunks: int) -> None:
    found = shares(chunks)
    assert sum(found) == 2 * chunks
    assert len(found) == (1 if chunks == 1 else chunks + 2)


@pytest.mark.parametrize("tokens", [6, 0])
def test_opcheck(tokens: int) -> None:
    ids = torch.arange(tokens * 2).view(-1, 2) % 4
    ((sizes, _, _),) = cut([ids], 4, 2, 1)
    counts = torch.bincount(ids.flatten(), minlength=4).unsqueeze(0)
    opcheck(ops.cut_rows, (counts, 0, 2, 1))
    values = torch.randn(tokens, 3, requires_grad=True)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.permute_cut, (values, ids, sizes), test_utils=utils)


@pytest.mark.parametrize(("world", "experts", "chunks"), [(2, 4, 4), (3, 6, 1), (4, 12, 8)])
def test_opcheck_of_several_ranks(world: int, experts: int, chunks: int) -> None:
    """With as few ranks as one, strides say nothing: Inductor's code checks them."""
    counts = torch.arange(world * experts).view(world, experts) * 7
    for rank in range(world):
        opcheck(ops.cut_rows, (counts, rank, chunks, 1))
