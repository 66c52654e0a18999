"""``moe-fx bench``: on a slow link between two hosts, or with ``--device`` on one GPU or, under
torchrun, on several."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from moe_fx_cli.refusing import fail, failing, writable

__all__ = ["bench_command"]

_LINK = "On a slow link (without --device)"
_GPU = "On a GPU (--device cuda)"
_WIDTH = 150
"""Of a table that goes to a file."""


def bench_command(
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Block of transformers; may be repeated. qwen3: many small experts; mixtral: few "
            "big ones; deepseek: with a shared expert (without, on a GPU); gpt-oss: on a GPU only. "
            "Default: all."
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(callback=writable, help="Also write every figure, and the machine, as JSON."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cuda[:N]",
            help="Measure on this GPU, in place of a slow link.",
            rich_help_panel=_GPU,
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="In one call of a layer; may be repeated. Default: 16, 256, 2048, 16384; with "
            "--training 4096.",
            rich_help_panel=_GPU,
        ),
    ] = None,
    training: Annotated[
        bool,
        typer.Option(
            "--training", help="Forward and backward, not forward alone.", rich_help_panel=_GPU
        ),
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Two-layer model of that name: prefill of 2048 tokens, decode of 1, 16 and 64 "
            "(several GPUs: decode of --tokens, 1 and 16); may be repeated. Layers only if asked "
            "for too.",
            rich_help_panel=_GPU,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A layer of the model that this config.json of transformers describes.",
            rich_help_panel=_GPU,
        ),
    ] = None,
    dynamic: Annotated[
        bool,
        typer.Option(
            "--dynamic",
            help="Compile each layer once for all numbers of tokens (dynamic=True).",
            rich_help_panel=_GPU,
        ),
    ] = False,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts", help="Also the time of each kernel of moe_fx's.", rich_help_panel=_GPU
        ),
    ] = False,
    seconds_per_point: Annotated[
        float | None,
        typer.Option(min=0.01, help="Timing of a point. Default: 4.", rich_help_panel=_GPU),
    ] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(
            help="Time of exchange over time of compute, set by the width of the experts; may be "
            "repeated. Default: 0.25, 0.5, 1, 2.",
            rich_help_panel=_LINK,
        ),
    ] = None,
    routing: Annotated[
        list[str] | None,
        typer.Option(
            help="How evenly tokens use experts; may be repeated. zipf: the share of an expert "
            "falls with its rank. Default: both.",
            rich_help_panel=_LINK,
        ),
    ] = None,
    backward: Annotated[
        bool | None,
        typer.Option(
            "--backward/--forward",
            help="Only forward + backward, or only forward. Default: both.",
            rich_help_panel=_LINK,
        ),
    ] = None,
    program: Annotated[
        list[str] | None,
        typer.Option(
            help="Program to measure, beside compute, exchange and unoverlapped, which the figures "
            "are made of; may be repeated: hf_eager, hf_compiled, inductor, inductor_cost, auto, "
            "auto_even, chunks1, 2, 4, 8, allgather1, 2, 4, 8. Default: all.",
            rich_help_panel=_LINK,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps of each program, in turn; medians count. Default: 7; 3 if --quick.",
            rich_help_panel=_LINK,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="One point (qwen3, ratio 1, uniform, forward), unless said otherwise.",
            rich_help_panel=_LINK,
        ),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            callback=writable,
            help="Also write a trace of the first point for ui.perfetto.dev, and beside it a "
            "picture (.svg): compute, exchange and wait of each rank, without overlap and with. "
            "On several GPUs: one call of each program, as the first rank's host and GPU run it.",
            rich_help_panel=_LINK,
        ),
    ] = None,
) -> None:
    """Measure how much of the exchange hides behind compute, on a slow link;
    or (--device cuda) how fast layers are on one GPU, or on several.

    A slow link: the two hosts are network namespaces of this machine; their
    link is limited to 150 Mbit/s (300 at ratio 0.25). Needs root and iproute2
    (without, says so; exit status 0), and no accelerator. Each of these is
    compared with the original block, then all run in turn: compute only,
    exchange only, moe_fx without overlap, transformers' AllToAllEP eager and
    compiled, Inductor's own overlap scheduler, moe_fx in 1, 2, 4 and 8 chunks
    and as it chooses itself; the same by all-gather, and as it chooses if
    promised even numbers of tokens.

    How to read it. bound: the longer of compute and exchange, which no
    program can beat; / bound: 1.00 is perfect; hidden: the share of the time
    lost without overlap that is won back. A program that cannot run here is
    listed with the reason. --quick takes minutes, the whole grid hours: it
    says how long before it starts. Keep the machine otherwise idle.

    One GPU: layers of real widths in bf16, transformers' block under
    torch.compile (HF) and the same with moe_fx, each also as a CUDA graph;
    checked against float64 on fresh tokens, then timed in turn. floor: no
    program can be faster than the matrix products or the bytes that it must
    do, at this card's measured rates; / HF: under 1.00 moe_fx is faster;
    / floor: of its graph, 1.00 is perfect. docs/performance.md has more.

    Several GPUs of one host, each a rank, under torchrun: the block on one
    GPU compiled, the exchange of its rows alone, transformers' AllToAllEP
    eager and compiled, and moe_fx: one all-to-all, in 2 and 4 chunks,
    "direct" (also as a CUDA graph) and as it chooses. Times are the slower
    rank's; each result is compared with one GPU's. --layer, --config,
    --model, --tokens (of each rank), --training, --routing, --program,
    --rounds and --trace say what; default: qwen3 and mixtral, 64, 1024 and
    8192 tokens, uniform.

    Examples:
      moe-fx bench --quick                        one point: minutes
      moe-fx bench --quick --program auto         the fewest programs
      moe-fx bench --layer mixtral --forward --json figures.json
      moe-fx bench --device cuda                  four layers on this GPU
      moe-fx bench --device cuda --layer qwen3 --tokens 16 --parts
      moe-fx bench --device cuda --model gpt-oss  prefill and decode
      moe-fx bench --device cuda --config path/to/config.json
      torchrun --nproc-per-node 2 --no-python moe-fx bench --device cuda

    Exit status: 0; 1 if a program of moe_fx failed or differs from the
    original; 2 if an option cannot be used, there is no such GPU, or, for the
    slow link, there is no checkout.
    """
    gpu: dict[str, Any] = {
        "models": model,
        "config": config,
        "tokens": tokens,
        "training": training,
        "dynamic": dynamic,
        "parts": parts,
        "seconds_per_point": seconds_per_point,
    }
    link = {
        "ratio": ratio,
        "routing": routing,
        "backward": backward,
        "program": program,
        "rounds": rounds,
        "quick": quick,
        "trace": trace,
    }
    with failing():
        if device is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            failed = _on_gpus(device, layer, gpu, link, json)
        elif device is not None:
            _refuse(link, "is about the slow link; leave it out with --device")
            failed = _on_gpu(device, layer, gpu, json)
        else:
            _refuse(gpu, "is for one GPU; give --device cuda too")
            failed = _on_link(layer, link, json)
    raise typer.Exit(1 if failed else 0)


def _refuse(options: Mapping[str, Any], why: str) -> None:
    """An option of the other benchmark must not be passed over in silence."""
    for name, value in options.items():
        if value is not None and (value is not False or name == "backward"):
            option = {"models": "model", "backward": "backward/--forward"}.get(name, name)
            fail(f"--{option.replace('_', '-')} {why}.")


def _on_gpu(
    device: str, layers: list[str] | None, options: dict[str, Any], json: Path | None
) -> list[str]:
    if device.partition(":")[0] != "cuda" or not (device[5:] or "0").isdecimal():
        fail(f"--device {device}: give cuda, or cuda:1 for the second GPU.")
    from moe_fx.bench import run, selection

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    return run.failures(run.on_gpu(device, selection.select(layers, **options), console, json))


def _on_gpus(
    device: str,
    layers: list[str] | None,
    gpu: dict[str, Any],
    link: dict[str, Any],
    json: Path | None,
) -> list[str]:
    if device != "cuda":
        fail(f"--device {device}: under torchrun give cuda; each rank takes a GPU of its own.")
    taken = ("routing", "program", "rounds", "trace")
    others = {name: value for name, value in link.items() if name not in taken}
    _refuse(others, "is about the slow link; leave it out with --device")
    for name in ("dynamic", "parts", "seconds_per_point"):
        _refuse({name: gpu[name]}, "is for one GPU; leave it out under torchrun")
    if gpu["models"] and not layers and gpu["config"] is None:
        others = {"training": gpu["training"], "routing": link["routing"]}
        _refuse(others, "is for layers; a model's step of decode has neither")
    from moe_fx.bench.ranks import run

    console = Console() if Console().is_terminal else Console(width=_WIDTH)
    points = run.on_gpus(
        console,
        json,
        layers=layers,
        models=gpu["models"],
        config=gpu["config"],
        tokens=gpu["tokens"],
        routing=link["routing"],
        programs=link["program"],
        rounds=link["rounds"],
        training=gpu["training"],
        trace=link["trace"],
    )
    return run.failures(points)


def _on_link(layers: list[str] | None, options: dict[str, Any], json: Path | None) -> list[str]:
    bench = _from_checkout("tests.bench.overlap")
    selection = bench.select(
        layers,
        *(options[name] for name in ("ratio", "routing", "backward", "rounds", "quick", "trace")),
        options["program"],
    )
    found: list[str] = bench.failures(bench.run(selection, Console(), json) or [])
    return found


def _from_checkout(name: str) -> ModuleType:
    """The module ``name`` of the checkout that moe_fx itself was imported from."""
    from moe_fx.errors import MoeFxError

    root = Path(__file__).resolve().parents[2]
    if not (root / f"{name.replace('.', '/')}.py").exists():
        raise MoeFxError(
            f"The benchmark is not part of the installed package, and there is no checkout around "
            f"{Path(__file__).parent}. Clone the project, `pip install -e '.[hf]'` in it, and run "
            "moe-fx bench again."
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MoeFxError(
            f"The benchmark cannot be imported: {error}. It needs transformers: "
            "pip install -e '.[hf]' in the checkout."
        ) from None
