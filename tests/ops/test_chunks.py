"""Chunks: the same rows, in pieces, whatever the routing; gradients; opcheck."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import moe_fx.ops  # noqa: F401  (registers the ops)
from moe_fx.plan import slices

ops = torch.ops.moe_fx
property_test = settings(max_examples=60, deadline=None)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Tensor, int, int, int, int]:
    """(ids [T, K], experts, ranks, expert slices, token slices)."""
    world, per_slice, by_expert = (draw(st.integers(1, 3)) for _ in range(3))
    by_token, num_tokens, top_k = draw(st.integers(1, 3)), draw(st.integers(0, 7)), 2
    experts = world * per_slice * by_expert
    size = num_tokens * top_k
    flat = draw(st.lists(st.integers(0, experts - 1), min_size=size, max_size=size))
    return (
        torch.tensor(flat, dtype=torch.int64).view(-1, top_k),
        experts,
        world,
        by_expert,
        by_token,
    )


def sizes_of(keys: Tensor, num_keys: int, chunks: int, world: int) -> Tensor:
    """As `split_sizes` gives them on a rank that receives what it sends."""
    counts = torch.bincount(keys.flatten(), minlength=num_keys).view(chunks, world, -1).sum(-1)
    return torch.stack([counts, counts], 1)


@given(layouts())
@property_test
def test_a_key_says_chunk_rank_and_expert_in_this_order(
    layout: tuple[Tensor, int, int, int, int],
) -> None:
    ids, experts, world, by_expert, by_token = layout
    keys = ops.chunk_keys(ids, experts, world, by_expert, by_token)
    per_rank = experts // world
    per_slice = per_rank // by_expert
    for token, row in enumerate(ids.tolist()):
        for slot, expert in enumerate(row):
            rank, local = divmod(expert, per_rank)
            part = token * by_token // len(ids)
            chunk = local // per_slice * by_token + part
            expected = (chunk * world + rank) * per_slice + local % per_slice
            assert keys[token, slot] == expected
    assert keys.numel() == 0 or int(keys.max()) < experts * by_token


@given(layouts(), st.booleans())
@property_test
def test_rows_in_pieces_are_the_rows_and_come_back_with_their_gradients(
    layout: tuple[Tensor, int, int, int, int], weighted: bool
) -> None:
    ids, experts, world, by_expert, by_token = layout
    keys = ops.chunk_keys(ids, experts, world, by_expert, by_token)
    sizes = sizes_of(keys, experts * by_token, by_expert * by_token, world)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(len(ids), 5, dtype=torch.float64, generator=generator)
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=generator) if weighted else None
    results = []
    for in_chunks in (True, False):
        leaves = [t.clone().requires_grad_() for t in (tokens, weights) if t is not None]
        given_weights = leaves[1] if weighted else None
        if in_chunks:
            rows, row_map = ops.permute_chunks(leaves[0], keys, sizes)
            scaled = [row * row.detach().sum(-1, keepdim=True) for row in rows]
            out = ops.unpermute_chunks(scaled, row_map, given_weights, list(tokens.shape))
        else:
            rows, row_map = ops.permute(leaves[0], keys)
            scaled = rows * rows.detach().sum(-1, keepdim=True)
            out = ops.unpermute(scaled, row_map, given_weights, list(tokens.shape))
        factor = torch.arange(out.numel(), dtype=out.dtype).view_as(out)
        grads = torch.autograd.grad((out * factor).sum(), leaves)
        results.append((out.detach(), *grads))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [6, 0])
def test_opcheck(tokens: int) -> None:
    ids = torch.arange(tokens * 2).view(-1, 2) % 4
    keys = ops.chunk_keys(ids, 4, 2, 2, 1)
    sizes = sizes_of(keys, 4, 2, 2)
    values = torch.randn(tokens, 3, requires_grad=True)
    rows, row_map = ops.permute_chunks(values, keys, sizes)
    rows = [row.detach().requires_grad_() for row in rows]
    weights = torch.rand(tokens, 2, requires_grad=True)
    opcheck(ops.chunk_keys, (ids, 4, 2, 2, 1))
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.permute_chunks, (values, keys, sizes), test_utils=utils)
    opcheck(ops.unpermute_chunks, (rows, row_map, weights, [tokens, 3]), test_utils=utils)


@pytest.mark.parametrize(
    ("local_experts", "chunks", "expected"),
    [
        (8, 1, (1, 1)),
        (8, 4, (4, 1)),
        (8, 3, (2, 1)),
        (4, 8, (4, 2)),
        (4, 9, (4, 2)),
        (1, 4, (1, 4)),
        (6, 4, (3, 1)),
    ],
)
def test_experts_are_sliced_before_tokens(
    local_experts: int, chunks: int, expected: tuple[int, int]
) -> None:
    assert slices(local_experts, chunks) == expected
