"""What runs on a rank: a layer's variants are built, checked against the original block, and timed.

The functions take the rank first, as `tests.bench.hosts.Hosts.run` calls them.
"""

from __future__ import annotations

import functools
import gc
import itertools
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moe_fx
from tests.bench import layers, variants
from tests.bench.exchanges import Recording, Watched, there_and_back, watch


@dataclass
class _Subject:
    """The layer under measurement, and what its original block gives for this rank's tokens."""

    layer: layers.Layer
    width: int
    backward: bool
    whole: nn.Module
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    expected: list[Tensor] = field(default_factory=list)
    send: list[int] = field(default_factory=list)
    recv: list[int] = field(default_factory=list)
    programs: dict[str, variants.Program] = field(default_factory=dict)
    recording: Recording = field(default_factory=Recording)
    shards: nn.Module | None = None

    def sharded(self) -> nn.Module:
        if self.shards is None:
            self.shards = layers.build(self.layer, self.width, "uniform").eval()
            moe_fx.shard_experts(self.shards, dist.group.WORLD)
            self._copy_gate(self.shards)
        return self.shards

    def block(self) -> nn.Module:
        block = layers.build(self.layer, self.width, "uniform").eval()
        self._copy_gate(block)
        return block

    def route(self, rank: int, routing: str) -> None:
        source = layers.gate(self.layer, routing)
        with torch.no_grad():
            self.whole.get_parameter("gate.weight").copy_(source)
        for program in self.programs.values():
            self._copy_gate(program.module)
        self.x = layers.tokens(self.layer, rank, routing).requires_grad_(self.backward)
        ids = layers.selection(self.whole, self.x)
        counts = torch.bincount(ids.reshape(-1), minlength=self.layer.num_experts)
        sent = counts.view(dist.get_world_size(), -1).sum(1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        self.send, self.recv = sent.tolist(), received.tolist()
        self.expected = self.outcome(self.whole, self.whole)

    def _copy_gate(self, module: nn.Module) -> None:
        with torch.no_grad():
            module.get_parameter("gate.weight").copy_(self.whole.get_parameter("gate.weight"))

    def outcome(self, module: nn.Module, call: Any) -> list[Tensor]:
        """The output, and with backward the gradients of this rank's tokens."""
        self.reset(module)
        output = self.step(call)
        if not self.backward:
            return [output]
        assert self.x.grad is not None
        return [output.detach(), self.x.grad.clone()]

    def reset(self, module: nn.Module) -> None:
        self.x.grad = None
        module.zero_grad(set_to_none=True)

    def step(self, call: Any) -> Tensor:
        if not self.backward:
            with torch.no_grad():
                return call(self.x)
        output = call(self.x)
        output.backward(_cotangent(tuple(output.shape)))
        return output


@functools.lru_cache(maxsize=1)
def _cotangent(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


_subject: _Subject | None = None


def _current() -> _Subject:
    assert _subject is not None, "load() comes first"
    return _subject


def eager_seconds(rank: int, layer: str, width: int) -> float:
    """Seconds of the original block's forward on as many rows as a rank of experts gets: the
    best of five, as other work on the machine only adds."""
    block = layers.build(layers.LAYERS[layer], width, "uniform")
    x = layers.tokens(layers.LAYERS[layer], rank, "uniform")
    times = []
    with torch.no_grad():
        block(x)
        for _ in range(5):
            dist.barrier()
            start = time.perf_counter()
            block(x)
            times.append(time.perf_counter() - start)
    return min(times)


def load(rank: int, layer: str, width: int, backward: bool) -> None:
    """Make this the layer under measurement; forget the one before."""
    global _subject
    from torch._inductor import config

    config.compile_threads = 1  # the ranks keep the cores busy as it is
    torch._dynamo.config.recompile_limit = 64  # variants compile the same code
    _subject = None
    torch.compiler.reset()
    gc.collect()
    found = layers.LAYERS[layer]
    _subject = _Subject(found, width, backward, layers.build(found, width, "uniform"))


def route(rank: int, routing: str) -> list[float]:
    """Set the routing; the shares of pairs that experts get from this rank's tokens."""
    subject = _current()
    subject.route(rank, routing)
    ids = layers.selection(subject.whole, subject.x)
    return layers.shares(ids, subject.layer.num_experts)


@dataclass(frozen=True)
class Prepared:
    """error: largest difference from the original block, relative. seconds: of the first call.
    refused: why the variant cannot run here, or "". predicted: what its plan expects of it and of
    the others that were weighed up. chosen: `variants.chosen`."""

    error: float = 0.0
    seconds: float = 0.0
    refused: str = ""
    predicted: dict[str, float] = field(default_factory=dict)
    chosen: str = ""


def prepare(rank: int, name: str) -> Prepared:
    """Build and compile the variant if that is still to do, and compare its outcome."""
    subject = _current()
    start = time.perf_counter()
    try:
        if name not in subject.programs:
            subject.programs[name] = variants.make(name, subject.block, subject.sharded)
        program = subject.programs[name]
        with program.compiling():
            found = subject.outcome(program.module, program.call)
        program.require_rewritten()
    except variants.CannotRun as reason:
        subject.programs.pop(name, None)
        return Prepared(refused=str(reason))
    seconds = time.perf_counter() - start
    if name == variants.COMPUTE:
        with subject.recording.record():
            subject.outcome(program.module, program.call)
        if not subject.recording.delivered:
            return Prepared(refused="no exchange was seen in the program, so none can be left out")
    with _exchanges_of(subject, name):
        found = subject.outcome(program.module, program.call)
    error = max(map(_relative_error, found, subject.expected))
    predicted, chosen = variants.predictions(name, program), variants.chosen(name, program)
    return Prepared(error, seconds, predicted=predicted, chosen=chosen)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _exchanges_of(subject: _Subject, name: str) -> AbstractContextManager[None]:
    return subject.recording.replay() if name == variants.COMPUTE else nullcontext()


def step_seconds(rank: int, name: str) -> float:
    """Seconds of one step on this rank, which starts when every rank is ready."""
    subject = _current()
    program = subject.programs[name]
    subject.reset(program.module)
    gc.collect()
    with _exchanges_of(subject, name):
        dist.barrier()
        start = time.perf_counter()
        subject.step(program.call)
        return time.perf_counter() - start


def exchange_seconds(rank: int, pieces: int) -> float:
    """Seconds to carry a step's rows and nothing else, in so many pieces at once: all dispatched,
    and each sent back as it arrives. With backward the same again."""
    subject = _current()
    hidden = subject.layer.hidden
    outgoing = _cut(subject.send, pieces)
    incoming = _cut(subject.recv, pieces)
    sent = [torch.zeros(sum(counts), hidden) for counts in outgoing]
    arriving = [torch.zeros(sum(counts), hidden) for counts in incoming]
    returned = [torch.zeros(sum(counts), hidden) for counts in outgoing]
    dist.barrier()
    start = time.perf_counter()
    for _ in range(2 if subject.backward else 1):
        there_and_back(sent, arriving, returned, outgoing, incoming)
    return time.perf_counter() - start


def _cut(counts: list[int], pieces: int) -> list[list[int]]:
    """Each piece's share of each count; they add up."""
    bounds = [[count * piece // pieces for count in counts] for piece in range(pieces + 1)]
    return [
        [after - before for before, after in zip(*pair, strict=True)]
        for pair in itertools.pairwise(bounds)
    ]


def watched_step(rank: int, name: str) -> Watched:
    """One step, with the times of its exchanges and waits."""
    subject = _current()
    program = subject.programs[name]
    subject.reset(program.module)
    gc.collect()
    dist.barrier()
    return watch(lambda: subject.step(program.call))
