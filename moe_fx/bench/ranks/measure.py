"""A layer at numbers of tokens, or a step of a model, on all ranks: checked against one GPU, then
timed.

Every rank has the same weights and other tokens. Programs run in turn, forwards and backwards; all
ranks begin each call together, and a call has taken what the slower rank took.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import profile, record_function

from moe_fx.bench.layers import Block, Layer, build_block
from moe_fx.bench.machine import Machine
from moe_fx.bench.ranks.decoding import Decoding
from moe_fx.bench.ranks.points import RankPoint
from moe_fx.bench.ranks.programs import CAPTURED, EXCHANGE, CannotRun, Function, make
from moe_fx.bench.reference import first, relative_error, steady
from moe_fx.errors import ConfigurationError

__all__ = ["measure"]

_ZIPF = 1.0
"""An expert's share of the tokens falls with its rank to this power."""
Call = Callable[[], Any]


def measure(
    layer: Layer,
    point: RankPoint,
    programs: Sequence[str],
    machine: Machine,
    rounds: int,
    base: str,
    say: Callable[[str], None],
    trace: Path | None = None,
) -> None:
    """Fills ``point``. Every rank calls it alike. trace: a file for what the first rank does."""
    torch._dynamo.reset()
    kind = Decoding if point.decodes else _Inputs
    inputs = kind.of(layer, point, machine)
    calls: dict[str, Call] = {}
    for name in programs:
        say(f"{point.title}: {name}")
        call = _prepared(name, layer, point, inputs, machine, base)
        if call is not None:
            calls[name] = call
            if name in CAPTURED and not point.training:
                calls |= _captured(name, call, point, inputs, machine)
    point.judge()
    say(f"{point.title}: timing")
    point.samples = _timed(calls, machine, rounds)
    if trace is not None:
        _write_trace(calls, machine, trace)


@dataclass
class _Inputs:
    """Of this rank. steady ``[T]``: tokens whose experts do not hang on rounding. output: the
    gradient of the result. expected: what the block makes of them on one GPU."""

    tokens: Tensor
    top_k: int
    steady: Tensor
    output: Tensor
    expected: list[Tensor]

    @classmethod
    def of(cls, layer: Layer, point: RankPoint, machine: Machine) -> _Inputs:
        whole = _block(layer, machine, point.training)
        tokens = _tokens(whole, point.tokens, point.routing, machine)
        same, top_k = steady(whole, tokens), whole.selected(tokens).shape[1]
        inputs = cls(tokens, top_k, same, torch.randn_like(tokens), [])
        tokens.requires_grad_(point.training)
        inputs.expected = inputs.results(whole.module, whole.module)
        return inputs

    def module(self, layer: Layer, machine: Machine) -> nn.Module:
        return _block(layer, machine, self.tokens.requires_grad).module

    @contextmanager
    def others(self) -> Iterator[None]:
        """Within, the tokens are others."""
        kept = self.tokens.clone()
        self.tokens.normal_()
        try:
            yield
        finally:
            self.tokens.copy_(kept)

    def restore(self) -> None:
        """Before a result that is compared: a block keeps no state."""

    def results(self, run: Function, trained: nn.Module | None) -> list[Tensor]:
        """The result and, where ``trained`` has gradients, that of the tokens."""
        trains = trained is not None and self.tokens.requires_grad
        with torch.set_grad_enabled(trains):
            out = first(run(self.tokens))
            if trained is None or not trains:
                return [out]
            for each in (self.tokens, *trained.parameters()):
                each.grad = None
            out.backward(self.output)
            assert self.tokens.grad is not None
            return [out.detach(), self.tokens.grad]

    def error(self, found: Sequence[Tensor]) -> float:
        return max(
            relative_error(one[:, self.steady], other[:, self.steady])
            for one, other in zip(found, self.expected, strict=True)
        )


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
    inputs: _Inputs | Decoding,
    machine: Machine,
    base: str,
) -> Call | None:
    """A call that has been seen to be right; None, with the reason in the point, if any rank has
    none."""
    problem, error, call = "", 0.0, None
    try:
        module = inputs.module(layer, machine)
        program = make(name, module, inputs.top_k, base)
        trained = None if name == EXCHANGE else module

        def call() -> list[Tensor]:
            return inputs.results(program.call, trained)

        inputs.restore()
        found = call()
        machine.samples(call, 2)
        point.plans[name] = program.check()
        if name != EXCHANGE:
            error = inputs.error(found)
    except CannotRun as reason:
        problem = str(reason)
    except Exception as failure:
        said = str(failure).strip().splitlines()
        problem = type(failure).__name__ + (f": {said[0]}" if said else "")
    return call if _agreed(name, point, problem, error) else None


def _captured(
    name: str, call: Call, point: RankPoint, inputs: _Inputs | Decoding, machine: Machine
) -> dict[str, Call]:
    """A graph of it, seen to be right on these tokens when it has run on others before."""
    graph, problem, error, replay = f"{name}_graph", "", 0.0, call
    try:
        with torch.no_grad():
            replay, result = machine.captured(call)
            with inputs.others():
                replay()
            inputs.restore()
            replay()
            error = inputs.error(result)
    except Exception as failure:
        problem = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return {graph: replay} if _agreed(graph, point, problem, error) else {}


def _agreed(name: str, point: RankPoint, problem: str, error: float) -> bool:
    """Whether no rank has anything against the program. The point gets the largest error of any
    rank, or what the first has against it."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (problem, error))
    against = next((said for said, _ in every if said), "")
    if against:
        point.failed[name] = against
    elif name != EXCHANGE:
        point.errors[name] = max(each for _, each in every)
    return not against


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
    raise ConfigurationError(
        "--routing zipf: the block has no router of one row an expert. Leave it out."
    )


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


def _write_trace(calls: dict[str, Call], machine: Machine, path: Path) -> None:
    """One call of each program, under its name, as torch's profiler sees this host and device."""
    with profile() as profiler:
        for name, call in calls.items():
            dist.barrier()
            with record_function(name):
                machine.samples(call, 1)
    if dist.get_rank() == 0:
        profiler.export_chrome_trace(str(path))
