"""``python -m tests.bench.recognition``: what finding, verifying and rewriting MoE layers costs.

Models of full depth and tiny width. Two bounds hold: recognise, verify and rewrite take at most 5 %
of the whole torch.compile with base "inductor", and a layer of the deep model costs at most 1.3
times what it costs in one of 12 layers.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx import GraphModule
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moe_fx
from moe_fx import passes
from moe_fx.capture.capture import capture
from moe_fx.options import Options

SHARE_BOUND, GROWTH_BOUND = 0.05, 1.3
_REPEATS = 5
_FEW = 12
_OURS = ("recognise", "plan", "verify", "rewrite")
_TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


def qwen3_moe(layers: int) -> nn.Module:
    kwargs = {**_TINY, "num_experts": 8, "head_dim": 16, "num_hidden_layers": layers}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**kwargs)).eval()


def deepseek_v3(layers: int) -> nn.Module:
    """As DeepSeek-V3, the first three layers are dense."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
    kwargs = {**_TINY, **latent, **experts, "qk_rope_head_dim": 8, "num_hidden_layers": layers}
    return DeepseekV3ForCausalLM(DeepseekV3Config(first_k_dense_replace=3, **kwargs)).eval()


MODELS: dict[str, tuple[Callable[[int], nn.Module], int, int]] = {
    "qwen3_moe": (qwen3_moe, 48, 0),
    "deepseek_v3": (deepseek_v3, 61, 3),
}
"""name -> (builder, number of layers, how many of them have no experts)."""


@dataclass(frozen=True)
class Cost:
    """Seconds, by pass, for ``moe_layers`` layers with experts; capture is the trace before."""

    model: str
    moe_layers: int
    capture: float
    by_pass: dict[str, float]

    @property
    def ours(self) -> float:
        return sum(self.by_pass[name] for name in _OURS)

    @property
    def per_layer(self) -> float:
        return self.ours / self.moe_layers


def passes_alone(name: str, moe_layers: int) -> Cost:
    """The medians of several runs on one capture. The verification is that of a local program."""
    build, _, dense = MODELS[name]
    costs: list[Cost] = []

    def record(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        captured = capture(module, inputs)
        seconds = time.perf_counter() - start
        runs = []
        for _ in range(_REPEATS):
            report = moe_fx.Report()
            passes.run(captured, passes.Context(options=Options(), report=report))
            assert len(report.regions) == moe_layers, report.declined
            runs.append(report.pass_seconds)
        medians = {step: statistics.median(run[step] for run in runs) for step in runs[0]}
        costs.append(Cost(name, moe_layers, seconds, medians))
        return module.forward

    _compile_and_call(build(moe_layers + dense), backend=record)
    return costs[0]


def whole_compile(name: str) -> tuple[float, float]:
    """(seconds of compiling the model with base "inductor", seconds of our passes in it)."""
    build, layers, _ = MODELS[name]
    reports: list[moe_fx.Report] = []
    options = {"base": "inductor", "on_report": reports.append}
    model = build(layers)
    start = time.perf_counter()
    with torch.compiler.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _compile_and_call(model, backend="moe_fx", options=options)
    whole = time.perf_counter() - start
    return whole, sum(report.pass_seconds[step] for report in reports for step in _OURS)


def _compile_and_call(model: nn.Module, **kwargs: Any) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, **kwargs)(input_ids=torch.arange(12)[None], use_cache=False)


def main(
    skip_inductor: Annotated[bool, typer.Option(help="Only our passes.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="qwen3_moe, deepseek_v3.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    figures: list[dict[str, Any]] = []
    table = Table(title="Finding, verifying and rewriting MoE layers")
    for heading in (
        *("model", "MoE layers", "capture s", "normalise s", "recognise s", "verify s"),
        *("rewrite s", "ms per layer", "× at 12 layers", "whole compile s", "share"),
    ):
        table.add_column(heading, justify="right")
    passes_alone("qwen3_moe", 1)
    for name in model or MODELS:
        few, many = passes_alone(name, _FEW), passes_alone(name, MODELS[name][1] - MODELS[name][2])
        growth = many.per_layer / few.per_layer
        whole, ours = (None, None) if skip_inductor else whole_compile(name)
        share = None if whole is None or ours is None else ours / whole
        figures.append(asdict(many) | {"growth": growth, "whole": whole, "share": share})
        steps = [f"{many.by_pass[s]:.2f}" for s in ("normalise", "recognise", "verify", "rewrite")]
        table.add_row(
            *(name, str(many.moe_layers), f"{many.capture:.1f}", *steps),
            *(f"{1e3 * many.per_layer:.1f}", f"{growth:.2f}"),
            *("-" if whole is None else f"{whole:.0f}", "-" if share is None else f"{share:.1%}"),
        )
    Console(width=130).print(table)
    if out is not None:
        out.write_text(json.dumps(figures, indent=2))
    if any(f["growth"] > GROWTH_BOUND or (f["share"] or 0.0) > SHARE_BOUND for f in figures):
        sys.exit(f"bounds: {GROWTH_BOUND} times at {_FEW} layers, {SHARE_BOUND:.0%} of the whole")


if __name__ == "__main__":
    typer.run(main)
