"""Each token once to every rank of its experts: as dense experts would, whatever the routing and
however many tokens a rank has; gradients; what travels; opcheck."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from moe_fx.ops import direct
from moe_fx.ops.exchange import bytes_sent
from moe_fx.testing import RankPool

ops = torch.ops.moe_fx
H = 3


@dataclass
class Case:
    """ids ``[T, K]`` of every rank; -1 is no expert's."""

    ids: list[Tensor]
    experts: int

    @property
    def world(self) -> int:
        return len(self.ids)

    @property
    def local(self) -> int:
        return self.experts // self.world

    def tokens(self, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(rank)
        return torch.randn(len(self.ids[rank]), H, generator=generator, dtype=torch.float64)

    def weights(self, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 + rank)
        return torch.rand(self.ids[rank].shape, generator=generator, dtype=torch.float64)


@st.composite
def cases(draw: st.DrawFn, fewest: int = 1, most: int = 4) -> Case:
    world = draw(st.integers(fewest, most))
    experts, top_k = world * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ids = []
    for _ in range(world):
        num_tokens = draw(st.integers(0, 5))
        size = num_tokens * top_k
        flat = draw(st.lists(st.integers(-1, experts - 1), min_size=size, max_size=size))
        ids.append(torch.tensor(flat, dtype=torch.int64).view(num_tokens, top_k))
    return Case(ids, experts)


def expected(tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Expert ``e`` adds ``e`` and multiplies by ``e + 1``."""
    each = (tokens.unsqueeze(1) + ids.unsqueeze(-1)) * (ids + 1).unsqueeze(-1)
    return torch.where(ids >= 0, weights, 0).unsqueeze(1).mul(each.mT).sum(-1)


def shares(rows: Tensor, here: Tensor, factors: Tensor, first: int) -> Tensor:
    """What a rank's experts make of its rows; of rows that are nobody's, not a number."""
    found = expected(rows, torch.where(here >= 0, here + first, -1), factors)
    return found.masked_fill((here < 0).all(-1, keepdim=True), float("nan"))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_there_and_back_is_the_weighted_sum(case: Case) -> None:
    """Ranks in one process."""
    ranks = range(case.world)
    tokens, weights = ([f(rank) for rank in ranks] for f in (case.tokens, case.weights))
    sent = [direct.dispatched(tokens, case.ids, weights, rank, case.experts) for rank in ranks]
    back = [shares(*each, rank * case.local) for rank, each in enumerate(sent)]
    here = [each for _, each, _ in sent]
    for rank in ranks:
        found = direct.combined(back, here, len(tokens[rank]), rank)
        torch.testing.assert_close(found, expected(tokens[rank], case.ids[rank], weights[rank]))


def there_and_back(rank: int, case: Case, weighs: bool) -> list[Tensor]:
    """Over the real group: the result beside what is expected, and gradients likewise."""
    group = dist.group.WORLD
    assert group is not None
    ids = case.ids[rank].to(torch.int32 if rank else torch.int64)
    found: list[list[Tensor]] = []
    for real in (True, False):
        tokens = case.tokens(rank).requires_grad_()
        weights = case.weights(rank).requires_grad_()
        used = weights if weighs else torch.ones_like(weights)
        if real:
            given_ = used if weighs else None
            place = case.experts, group.group_name
            rows, here, factors = ops.direct_dispatch(tokens, ids, given_, *place)
            its = factors if weighs else torch.ones(here.shape)
            made = shares(rows, here, its, rank * case.local)
            result, _ = ops.direct_combine(made, None, here, ids, *place)
        else:
            result = expected(tokens, case.ids[rank], used)
        cotangent = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
        (result * cotangent).sum().backward()
        of_weights = weights.grad if weighs else torch.zeros(0)
        assert tokens.grad is not None and of_weights is not None
        found.append([result.detach(), tokens.grad, of_weights])
    return [each for pair in zip(*found, strict=True) for each in pair]


SKEWED = Case(
    [
        torch.tensor([[0, 1], [2, 3], [7, 7], [-1, 4], [-1, -1]]),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.tensor([[5, 0]]),
        torch.full((3, 2), 6),
    ],
    8,
)


@pytest.mark.parametrize("weighs", [True, False])
def test_four_ranks_of_other_numbers_of_tokens(ranks4: RankPool, weighs: bool) -> None:
    for found in ranks4.run(there_and_back, SKEWED, weighs):
        for mine, right in zip(found[::2], found[1::2], strict=True):
            torch.testing.assert_close(mine, right)
            assert mine.isfinite().all()


@settings(max_examples=15, deadline=None)
@given(cases(2, 2))
def test_two_ranks_with_gradients(ranks2: RankPool, case: Case) -> None:
    for found in ranks2.run(there_and_back, case, True):
        for mine, right in zip(found[::2], found[1::2], strict=True):
            torch.testing.assert_close(mine, right)


def sent_of(rank: int, ids: Tensor) -> int:
    group = dist.new_group()
    name = group.group_name
    rows, here, _ = ops.direct_dispatch(torch.randn(len(ids), H), ids, None, 4, name)
    ops.direct_combine(rows, None, here, ids, 4, name)
    return bytes_sent(name)


def test_a_token_travels_once_to_a_rank_and_back(ranks2: RankPool) -> None:
    """Of four tokens, three have an expert on rank 1 and two on rank 0, some both experts."""
    ids = torch.tensor([[0, 1], [2, 3], [3, 2], [1, 2]])
    row = H * 4
    assert ranks2.run(sent_of, ids) == [3 * row + 2 * row, 2 * row + 3 * row]


def checked(rank: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    tokens, ids = torch.randn(4, H, requires_grad=True), torch.tensor([[0, 1], [1, 3], [2, -1]])
    ids = torch.cat([ids, ids[:1]])
    weights = torch.rand(4, 2, requires_grad=True)
    place = 4, group.group_name
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.direct_dispatch.default, (tokens, ids, weights, *place), test_utils=utils)
    opcheck(ops.direct_dispatch.default, (tokens, ids, None, *place), test_utils=utils)
    rows, here, factors = ops.direct_dispatch(tokens, ids, weights, *place)
    given_ = rows.detach().requires_grad_(), None, here, ids, *place
    opcheck(ops.direct_combine.default, given_, test_utils=utils)
    given_ = rows.detach(), factors.detach(), here, ids, *place
    opcheck(ops.direct_combine.default, given_, test_utils=("test_schema", "test_faketensor"))
    tables = torch.randn(2, H, 8), None, torch.randn(2, 4, H), None, None, None
    body = "halves", "silu", 1.0, None, 0.0, torch.float32
    given_ = tokens.detach(), ids, weights.detach(), *tables, *body, *place
    opcheck(ops.direct_experts.default, given_, test_utils=("test_schema", "test_faketensor"))


def test_opcheck(ranks2: RankPool) -> None:
    ranks2.run(checked)
