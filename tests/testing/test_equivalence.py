"""assert_equivalent passes on ranks what is right, and shows what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from moe_fx.errors import ConfigurationError
from moe_fx.testing import RankPool, assert_equivalent
from moe_fx.testing.equivalence import Program, _arguments
from tests.testing.layers import (
    Layer,
    LowestScores,
    OtherOnEachCall,
    arguments,
    functional,
    tokens,
)


@pytest.mark.parametrize("program", ["replicated", "gathered"])
def test_a_module_with_gradients(ranks2: RankPool, program: Program) -> None:
    layer = Layer()
    assert_equivalent(layer, [tokens(3, 4, 32)], ranks=ranks2, program=program, gradients=True)
    assert layer.gate.weight.grad is None


def test_a_function_with_its_weights_as_arguments(ranks2: RankPool) -> None:
    assert_equivalent(functional, arguments(12, 32), ranks=ranks2, gradients=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tolerances_follow_the_dtype(ranks2: RankPool, dtype: torch.dtype) -> None:
    assert_equivalent(Layer().to(dtype), [tokens(12, 32).to(dtype)], ranks=ranks2)


def test_arguments_per_rank_may_have_other_numbers_of_tokens(ranks4: RankPool) -> None:
    x = tokens(12, 32)
    pieces = [[x[:5]], [x[5:6]], [x[6:]], [x[:0]]]
    assert_equivalent(Layer(), ranks=ranks4, args_per_rank=pieces)


@pytest.mark.parametrize("given", [tokens(12, 32), tokens(3, 4, 32), torch.arange(12).view(3, 4)])
def test_every_rank_has_the_tokens_in_another_order(given: torch.Tensor) -> None:
    weights = torch.eye(3)
    pieces = _arguments((given, weights), None, 3)
    assert pieces[0][0] is given
    for tokens_of_rank, weights_of_rank in pieces[1:]:
        assert weights_of_rank is weights
        assert tokens_of_rank.shape == given.shape
        assert not torch.equal(tokens_of_rank, given)
        width = given.shape[-1] if given.is_floating_point() else 1
        rows, ordered = tokens_of_rank.reshape(-1, width), given.reshape(-1, width)
        assert sorted(rows.tolist()) == sorted(ordered.tolist())
    assert not torch.equal(pieces[1][0], pieces[2][0])


def test_a_number_of_ranks_starts_its_own() -> None:
    assert_equivalent(Layer(), [tokens(12, 32)], ranks=1)


def test_nothing_rewritten_is_a_failure_with_the_report(ranks2: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"rank 0 rewrote nothing[\s\S]*lowest scores"):
        assert_equivalent(LowestScores(), [tokens(12, 32)], ranks=ranks2)


def test_a_difference_names_rank_and_output(ranks2: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"rank 0, output 0: [\s\S]*Mismatched elements"):
        assert_equivalent(OtherOnEachCall(), [tokens(12, 32)], ranks=ranks2)


def test_tolerances_can_be_given(ranks2: RankPool) -> None:
    assert_equivalent(OtherOnEachCall(), [tokens(12, 32)], ranks=ranks2, atol=1.0)


def test_a_wrong_gradient_is_found(ranks2: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager gradient is doubled here, in this process only."""

    class Doubling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return 2 * gradient

    plain = Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda self, x: plain(self, Doubling.apply(x)))
    with pytest.raises(AssertionError, match="rank 0, gradient of argument 0"):
        assert_equivalent(Layer(), [tokens(12, 32)], ranks=ranks2, gradients=True)


@pytest.mark.parametrize("program", ["replicated", "gathered"])
def test_a_wrong_gradient_of_an_expert_is_found(
    ranks2: RankPool, monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    plain = Layer.forward

    def doubling(self: Layer, x: torch.Tensor) -> torch.Tensor:
        self.experts["up"].register_hook(lambda gradient: 2 * gradient)
        return plain(self, x)

    monkeypatch.setattr(Layer, "forward", doubling)
    with pytest.raises(AssertionError, match=r"gradient of experts\.up, all ranks together"):
        assert_equivalent(Layer(), [tokens(12, 32)], ranks=ranks2, program=program, gradients=True)


class _Local(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = lambda x: x


@pytest.mark.parametrize(
    ("fn", "options", "said"),
    [
        (lambda x: x, {}, "module-level"),
        (_Local(), {}, "module-level"),
        (functional, {"program": "gathered"}, "made of an nn.Module"),
        (Layer(), {"args_per_rank": [[1]]}, "expected 2 entries"),
    ],
    ids=["lambda", "module with a lambda", "gathered function", "arguments of too few ranks"],
)
def test_what_cannot_be_compared_says_why(
    ranks2: RankPool, fn: Callable[..., object], options: dict[str, object], said: str
) -> None:
    given = [] if "args_per_rank" in options else arguments(12, 32)
    with pytest.raises(ConfigurationError, match=said):
        assert_equivalent(fn, given, ranks=ranks2, **options)  # type: ignore[arg-type]


def test_without_a_tensor_there_are_no_tokens_to_reorder(ranks2: RankPool) -> None:
    with pytest.raises(ConfigurationError, match="give args_per_rank"):
        assert_equivalent(Layer(), kwargs={"x": tokens(12, 32)}, ranks=ranks2)
