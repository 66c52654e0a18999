"""A layer at numbers of tokens, on all ranks: checked against the block on one GPU, then timed.

Every rank has the same weights and other tokens. Programs run in turn, forwards and backwards; all
ranks begin each call together, and a call has taken what the slower rank took.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fx.bench.layers import Block, Layer, build_block
from moe_fx.bench.machine import Machine
from moe_fx.bench.ranks.points import RankPoint
from moe_fx.bench.ranks.programs import CAPTURED, EXCHANGE, CannotRun, make
from moe_fx.bench.reference import first, relative_error

__all__ = ["measure"]

_ZIPF = 1.0
"""An expert's share of the tokens falls with its rank to this power."""
Call = Callable[[], Any]


def measure(
    layer: Layer,
    tokens: int,
    routing: str,
    programs: list[str],
    machine: Machine,
    rounds: int,
    training: bool,
    base: str,
    say: Callable[[str], None],
) -> RankPoint:
    """Every rank calls it alike."""
    point = RankPoint(layer.name, tokens, routing, training, dist.get_world_size())
    torch._dynamo.reset()
    given, top_k, expected = _given(layer, point, machine)
    calls: dict[str, Call] = {}
    for name in programs:
        say(f"{point.title}: {name}")
        call = _prepared(name, layer, point, given, top_k, expected, machine, base)
        if call is not None:
            calls[name] = call
            if name in CAPTURED and not training:
                _capture(name, call, point, calls, given, expected, machine)
    point.judge()
    say(f"{point.title}: timing")
    point.samples = _timed(calls, machine, rounds)
    return point


def _given(layer: Layer, point: RankPoint, machine: Machine) -> tuple[Tensor, int, list[Tensor]]:
    """Tokens, the experts of each, and what the block makes of them on one GPU."""
    training = point.training
    whole = _block(layer, machine, training)
    given = _tokens(whole, point.tokens, point.routing, machine).requires_grad_(training)
    top_k = whole.selected(given.detach()).shape[1]
    return given, top_k, _results(lambda: first(whole.module(given)), given, training)


def _block(layer: Layer, machine: Machine, training: bool) -> Block:
    gc.collect()
    machine.clear()
    torch.manual_seed(0)
    block = build_block(layer, machine.device)
    block.module.requires_grad_(training)
    return block


def _prepared(
    name: str,
    layer: Layer,
    point: RankPoint,
    given: Tensor,
    top_k: int,
    expected: list[Tensor],
    machine: Machine,
    base: str,
) -> Call | None:
    """A call that has been seen to be right; None, with the reason in the point, if any rank has
    none."""
    training, problem, call = point.training, "", None
    try:
        program = make(name, _block(layer, machine, training).module, top_k, base)

        def call() -> list[Tensor]:
            return _results(lambda: program.call(given), given, training and name != EXCHANGE)

        found = call()
        machine.samples(call, 2)
        point.plans[name] = program.check()
        if name != EXCHANGE:
            point.errors[name] = _largest(
                max(relative_error(a, b) for a, b in zip(found, expected, strict=True)), machine
            )
    except CannotRun as reason:
        problem = str(reason)
    except Exception as error:
        said = str(error).strip().splitlines()
        problem = type(error).__name__ + (f": {said[0]}" if said else "")
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    found_wrong = next(filter(None, problems), "")
    if found_wrong:
        point.failed[name] = found_wrong
        return None
    return call


def _capture(
    name: str,
    call: Call,
    point: RankPoint,
    calls: dict[str, Call],
    given: Tensor,
    expected: list[Tensor],
    machine: Machine,
) -> None:
    """A graph of it, seen to be right on these tokens once they were others."""
    graph = f"{name}_graph"
    with torch.no_grad():
        replay, (result,) = machine.captured(call)
        kept = given.clone()
        given.normal_()
        replay()
        given.copy_(kept)
        replay()
        point.errors[graph] = _largest(relative_error(result, expected[0]), machine)
    calls[graph] = replay


def _results(run: Callable[[], Tensor], given: Tensor, training: bool) -> list[Tensor]:
    """The result and, in training, the gradient of the tokens."""
    with torch.set_grad_enabled(training):
        out = run()
        if not training:
            return [out]
        given.grad = None
        out.backward(torch.ones_like(out))
        assert given.grad is not None
        return [out.detach(), given.grad]


def _tokens(block: Block, tokens: int, routing: str, machine: Machine) -> Tensor:
    """Other tokens on each rank. zipf: each has a part along which the router prefers experts."""
    generator = torch.Generator(machine.device).manual_seed(1 + dist.get_rank())
    parameter = next(block.experts.parameters())
    shape = (1, tokens, block.hidden)
    given = torch.randn(shape, device=machine.device, generator=generator)
    if routing == "zipf":
        router = _router(block)
        experts = torch.arange(len(router), device=machine.device)
        wanted = -_ZIPF * (1.0 + experts).log() * (given[0] @ router.float().T).std()
        given += torch.linalg.lstsq(router.float(), wanted.unsqueeze(1)).solution.T
    return given.to(parameter.dtype)


def _router(block: Block) -> Tensor:
    """``[E, H]``: the parameter of the block that is one row an expert."""
    own = {id(each) for each in block.experts.parameters()}
    experts = next(block.experts.parameters()).shape[0]
    for parameter in block.module.parameters():
        if id(parameter) not in own and parameter.shape == (experts, block.hidden):
            return parameter.detach()
    raise CannotRun("the block has no router of one row an expert: only uniform routing")


def _largest(error: float, machine: Machine) -> float:
    """Of all ranks."""
    found = torch.tensor(error, device=machine.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _timed(calls: dict[str, Call], machine: Machine, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, of the slower rank."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for at in range(rounds):
        for name in list(calls)[:: -1 if at % 2 else 1]:
            dist.barrier()
            (took,) = machine.samples(calls[name], 1)
            slowest = torch.tensor(took, device=machine.device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            found[name].append(float(slowest))
    return found
