"""On NVIDIA GPUs, over NCCL: a rank that takes part no more is named by the other, in time.

Each rank is a process of its own, since NCCL may end one whose peer is gone. Skipped without GPUs.
``python -m tests.e2e.test_cuda_missing_rank`` prints what the rank that is left says in each
situation; with ``--cpu`` over Gloo, on any machine.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import moe_fx  # noqa: F401  (registers the backend)
from moe_fx.errors import MoeFxError
from tests.cuda_ranks import needs_cuda, take_gpu
from tests.e2e.test_missing_rank import Model

WAIT = 5.0
"""Seconds, for a rank that never comes."""
END = 240.0
"""Seconds after which a rank that has not ended hangs."""
Situation = tuple[str, str, bool, str]
"""strategy, overlap, whether it stops between forward and backward, and how it stops."""
_DIRECT = ("direct", "off")
SITUATIONS: list[Situation] = [
    (strategy, overlap, backward, how)
    for strategy, overlap in (("alltoall", "off"), ("alltoall", "4"), ("allgather", "1"), _DIRECT)
    for backward in (False, True)
    for how in ("stops", "exits", *(("raises", "late") if strategy == "direct" else ()))
]


def rank_main(rank: int, port: int, cpu: bool, base: str, situation: Situation) -> None:
    """Two steps; rank 1 takes no part in the second, or in its backward, or comes late."""
    strategy, overlap, backward, how = situation
    device = torch.device("cpu") if cpu else take_gpu(rank)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60))
    backend = "gloo" if cpu else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=2)
    options = {
        "ep_group": dist.group.WORLD,
        "exchange_timeout": WAIT,
        "strict": True,
        "base": base,
        "strategy": strategy,
        "overlap": int(overlap) if overlap.isdigit() else overlap,
    }
    torch.manual_seed(rank)
    model = Model().to(device)
    compiled = torch.compile(model, backend="moe_fx", options=options)
    x = torch.rand(1, 64, 64, device=device)

    def forward() -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            return compiled(x).square().sum()

    def step(pause: Callable[[], None] = lambda: None) -> float:
        if not backward:
            pause()
        loss = forward()
        if backward:
            float(loss.detach())
            pause()
            loss.backward()
        return float(model.block.gate.weight.grad.sum() if backward else loss)

    def fail() -> None:
        if how == "exits":
            os._exit(3)
        if how == "raises":
            raise ValueError("a fault of this rank alone")
        time.sleep(4 * WAIT if how == "stops" else 2 * WAIT)
        if how == "stops":
            os._exit(0)

    step()
    began = time.monotonic()
    try:
        step(fail if rank == 1 else lambda: None)
        said = "no error: a value came back"
    except MoeFxError as error:
        said = f"{type(error).__name__}: {error}"
    except Exception as error:  # whatever it is, it is what the user would see
        if how == "raises" and rank == 1:
            raise
        said = f"another error, {type(error).__name__}: {error}"
    print(f"[rank {rank}, {time.monotonic() - began:.1f} s] {said}", flush=True)
    if how == "late" and rank == 0:
        time.sleep(4 * WAIT)  # it is there still, and has the store
    os._exit(0)


def run(situation: Situation, cpu: bool, base: str) -> str:
    """What rank 0 printed, and how it ended; of a rank that comes late too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(word) for word in situation]
    command = [sys.executable, "-m", "tests.e2e.test_cuda_missing_rank", "--base", base]
    command += ["--port", str(port), *(["--cpu"] if cpu else [])]
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(rank), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    found = ""
    try:
        for number, rank in enumerate(ranks[: 2 if situation[-1] == "late" else 1]):
            try:
                said, _ = rank.communicate(timeout=END)
                found += f"{said}[rank {number} ended with {rank.returncode}]"
            except subprocess.TimeoutExpired:
                rank.kill()
                said, _ = rank.communicate()
                found += f"{said}[rank {number} hung: it was killed after {END:g} s]"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return found


def named(said: str) -> bool:
    """Whether each rank that ended by itself named the other and the layer, in time."""
    parts = "of block (", "for rank(s) [1]", "synced_gpus=True"
    seconds = [float(each) for each in re.findall(r"^\[rank \d, (\S+) s\]", said, re.MULTILINE)]
    in_time = bool(seconds) and max(seconds) < 3 * WAIT + 10 and seconds[0] < WAIT + 10
    late = "[rank 1, " not in said or "rank(s) [0]" in said
    return all(part in said for part in parts) and in_time and late


@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_cuda
@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_the_other_rank_names_it(situation: Situation) -> None:
    said = run(situation, cpu=False, base="aot_eager")
    assert named(said)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("situation", [each for each in SITUATIONS if each[0] == "direct"], ids=str)
def test_over_gloo_too(situation: Situation) -> None:
    assert named(run(situation, cpu=True, base="aot_eager"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--base", default="aot_eager")
    parser.add_argument("--only", type=int, help="number of the situation")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("situation", nargs="*")
    given = parser.parse_args()
    if given.rank is not None:
        strategy, overlap, backward, how = given.situation
        situation = (strategy, overlap, backward == "True", how)
        rank_main(given.rank, given.port, given.cpu, given.base, situation)
        return
    good = 0
    chosen = SITUATIONS if given.only is None else [SITUATIONS[given.only]]
    for situation in chosen:
        said = run(situation, given.cpu, given.base)
        good += named(said)
        print(f"== {situation}: {'named' if named(said) else 'NOT NAMED'}\n{said}\n", flush=True)
    print(f"{good} of {len(chosen)} named the rank and the layer")


if __name__ == "__main__":
    main()
