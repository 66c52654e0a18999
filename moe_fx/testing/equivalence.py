"""`assert_equivalent`: what ranks compute together is what each would compute alone."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from moe_fx.errors import ConfigurationError
from moe_fx.report import Report
from moe_fx.testing.ranks import RankPool, pack
from moe_fx.weights.shard import shard_experts

Program = Literal["replicated", "gathered"]
_TIMEOUT = 600.0

_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}
"""Relative, and absolute as a share of the largest expected value."""


@dataclass(frozen=True)
class _Job:
    """What every rank does with its own arguments."""

    fn: Callable[..., Any]
    program: Program
    base: str
    dynamic: bool | None
    gradients: bool
    options: dict[str, Any]


@dataclass(frozen=True)
class _Outcome:
    """outputs: the tensors of the result, in order. of_inputs: gradient of each floating argument,
    of_parameters: of each parameter, of a shard its block. report: `Report.to_text`."""

    outputs: list[Tensor]
    of_inputs: list[Tensor]
    of_parameters: dict[str, Tensor]
    regions: int
    report: str


def assert_equivalent(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ranks: int | RankPool = 2,
    program: Program = "replicated",
    args_per_rank: Sequence[Sequence[Any]] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    gradients: bool = False,
    base: str = "eager",
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """``fn`` compiled with ``backend="moe_fx"`` on real ranks computes what it does in eager.

    fn: an nn.Module, or a function, that can be pickled: its class or itself at module level.
    ranks: how many (processes of this machine, over Gloo), or a pool of them, as the pytest fixture
        ``moe_fx_ranks`` gives, which saves their start.
    program: "replicated", or "gathered" (`moe_fx.shard_experts`, for a module).
    args_per_rank: the arguments of each rank; how many tokens there are may differ. Default:
        ``args`` with the tokens of the first tensor in another order on each rank (integers: ids
        ``[..., T]``; floats: ``[..., T, H]``); whatever goes by token with them must then be left
        to ``fn``, or be given per rank. ``kwargs`` are the same for all.
    gradients: also compare those of a loss in which every output has another weight, summed over
        the ranks, for each parameter, and each rank's for its floating arguments.
    rtol, atol: as in `torch.testing.assert_close`; default by dtype: float64 1e-10, float32 1e-4,
        float16 2e-2, bfloat16 6e-2, relative and as a share of the largest expected value. In low
        precision a router that nearly ties may select otherwise: that is a difference too.
    base: the compiler after moe_fx. dynamic: as in torch.compile. options: of `moe_fx.Options`.

    Raises AssertionError if a value differs, naming rank and output, or if a rank's report has no
    rewritten layer, with that report; `RankError` if a rank fails; `ConfigurationError` if ``fn``
    or its arguments cannot be sent to the ranks.
    """
    if program == "gathered" and not isinstance(fn, nn.Module):
        raise ConfigurationError(f"a gathered program is made of an nn.Module, not of {fn!r}")
    world = ranks.world_size if isinstance(ranks, RankPool) else ranks
    given = _arguments(args, args_per_rank, world)
    named = dict(kwargs or {})
    job = _Job(fn, program, base, dynamic, gradients, dict(options or {}))
    _check_sendable(job, given, named)
    expected = []
    for values in given:
        alone = copy.deepcopy(fn)
        expected.append(_run(alone, alone, values, named, gradients))
    with contextlib.nullcontext(ranks) if isinstance(ranks, RankPool) else RankPool(world) as pool:
        found = pool.run(_on_rank, job, given, named, timeout=_TIMEOUT)
    for rank, (want, got) in enumerate(zip(expected, found, strict=True)):
        if not got.regions:
            raise AssertionError(f"rank {rank} rewrote nothing\n\n{got.report}")
        if len(want.outputs) != len(got.outputs):
            raise AssertionError(
                f"rank {rank}: expected {len(want.outputs)} outputs, got {len(got.outputs)}"
            )
        for number, pair in enumerate(zip(want.outputs, got.outputs, strict=True)):
            _close(f"rank {rank}, output {number}", *pair, rtol, atol)
    _compare_arguments(given, expected, found, rtol, atol)
    _compare_parameters(expected, found, rtol, atol)


def _arguments(
    args: Sequence[Any], per_rank: Sequence[Sequence[Any]] | None, world: int
) -> list[tuple[Any, ...]]:
    if per_rank is not None:
        if args or len(per_rank) != world:
            raise ConfigurationError(
                f"args_per_rank replaces args and has one entry per rank: expected {world} entries "
                f"and no args, got {len(per_rank)} and {len(args)} args"
            )
        return [tuple(values) for values in per_rank]
    first = next((at for at, value in enumerate(args) if isinstance(value, Tensor)), None)
    if first is None:
        raise ConfigurationError(
            "args has no tensor whose tokens could be reordered: give args_per_rank"
        )
    return [
        (*args[:first], _reordered(args[first], rank), *args[first + 1 :]) for rank in range(world)
    ]


def _reordered(tokens: Tensor, rank: int) -> Tensor:
    """The tokens as given on rank 0, in another order on each other rank."""
    if rank == 0 or tokens.dim() < 1 + tokens.is_floating_point():
        return tokens
    flat = tokens.flatten(0, -2) if tokens.is_floating_point() else tokens.flatten()
    order = torch.randperm(flat.shape[0], generator=torch.Generator().manual_seed(rank))
    result = flat.detach()[order].view(tokens.shape)
    return result.requires_grad_(tokens.requires_grad)


def _check_sendable(job: _Job, given: Any, named: Any) -> None:
    try:
        pack(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"{job.fn!r} cannot be sent to the ranks, which are other processes: {error}. Use a "
            "module-level function, or an nn.Module whose class is defined at module level."
        ) from error
    try:
        pack((given, named))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"the arguments cannot be sent to the ranks, which are other processes: {error}"
        ) from error


def _on_rank(rank: int, job: _Job, given: list[tuple[Any, ...]], named: dict[str, Any]) -> _Outcome:
    group = dist.group.WORLD
    assert group is not None
    report = Report()
    options = job.options | {"base": job.base, "on_report": report.extend}
    if job.program == "replicated":
        options["ep_group"] = group
    else:
        assert isinstance(job.fn, nn.Module)
        shard_experts(job.fn, group)
    compiled = torch.compile(job.fn, backend="moe_fx", dynamic=job.dynamic, options=options)
    outcome = _run(job.fn, compiled, given[rank], named, job.gradients)
    return _Outcome(
        outcome.outputs,
        outcome.of_inputs,
        outcome.of_parameters,
        len(report.regions),
        report.to_text(),
    )


def _run(
    model: Callable[..., Any],
    call: Callable[..., Any],
    values: tuple[Any, ...],
    named: dict[str, Any],
    gradients: bool,
) -> _Outcome:
    """``call`` is ``model``, perhaps compiled. The report stays empty."""
    if gradients:
        values = tuple(_leaf(value) for value in values)
    with torch.set_grad_enabled(gradients):
        result = call(*values, **named)
    outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    parameters: dict[str, Tensor] = {}
    if gradients:
        if isinstance(model, nn.Module):
            model.zero_grad(set_to_none=True)
            parameters = dict(model.named_parameters())
        _loss(outputs).backward()
    inputs = [v for v in values if isinstance(v, Tensor) and v.requires_grad and gradients]
    return _Outcome(
        [output.detach() for output in outputs],
        [_gradient(value) for value in inputs],
        {name: _gradient(parameter) for name, parameter in parameters.items()},
        regions=0,
        report="",
    )


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if _is_floating(value) else value


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    terms = [
        (o.double() * torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view_as(o)).sum()
        for o in outputs
        if o.is_floating_point() and o.requires_grad
    ]
    if not terms:
        raise ConfigurationError("gradients=True, but no output depends on anything that has one")
    return torch.stack(terms).sum()


def _gradient(tensor: Tensor) -> Tensor:
    """Of a shard, that of this rank's rows."""
    gradient: Any = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _compare_arguments(
    given: Sequence[tuple[Any, ...]],
    expected: Sequence[_Outcome],
    found: Sequence[_Outcome],
    rtol: float | None,
    atol: float | None,
) -> None:
    """What all ranks share, as weights given as arguments, has one gradient: the sum."""
    floating = [
        [(at, value) for at, value in enumerate(values) if _is_floating(value)] for values in given
    ]
    for number in range(len(expected[0].of_inputs)):
        at, first = floating[0][number]
        want = [outcome.of_inputs[number] for outcome in expected]
        got = [outcome.of_inputs[number] for outcome in found]
        if all(torch.equal(values[number][1], first) for values in floating):
            total = f"gradient of argument {at}, summed over the ranks"
            _close(total, _sum(want), _sum(got), rtol, atol)
        else:
            for rank, pair in enumerate(zip(want, got, strict=True)):
                _close(f"rank {rank}, gradient of argument {at}", *pair, rtol, atol)


def _compare_parameters(
    expected: Sequence[_Outcome],
    found: Sequence[_Outcome],
    rtol: float | None,
    atol: float | None,
) -> None:
    """A shard's gradient is already that of all ranks' tokens; of others the ranks have terms."""
    for name in expected[0].of_parameters:
        want = _sum([outcome.of_parameters[name] for outcome in expected])
        got = [outcome.of_parameters[name] for outcome in found]
        whole = _sum(got) if got[0].shape == want.shape else torch.cat(got)
        _close(f"gradient of {name}, all ranks together", want, whole, rtol, atol)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _close(what: str, want: Tensor, got: Tensor, rtol: float | None, atol: float | None) -> None:
    default = _TOLERANCE.get(want.dtype, 0.0)
    largest = float(want.double().abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(
        got,
        want,
        rtol=default if rtol is None else rtol,
        atol=default * largest if atol is None else atol,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )
