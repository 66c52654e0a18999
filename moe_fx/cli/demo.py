"""``moe-fx demo``: transformers models, expert-parallel on ranks of this machine, against eager.

For each model: save it, load it on every rank with transformers' own loader so that each holds only
its experts, compile with ``backend="moe_fx"``, generate from another prompt on each rank, and
compare with the original model in this process, token for token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table
from torch import Tensor

from moe_fx.bases.inductor import require_base
from moe_fx.cli.tiny import require_transformers, tiny_model
from moe_fx.errors import MoeFxError
from moe_fx.ops.exchange import bytes_sent
from moe_fx.options import parse_options
from moe_fx.report import Report
from moe_fx.testing import RankError, RankPool
from moe_fx.weights.shard import expert_parameter_bytes

DEFAULT_MODELS = ("qwen3_moe", "deepseek_v3")
_STAGE_TIMEOUT = 1200.0


@dataclass(frozen=True)
class Outcome:
    """What one rank brings back. tokens ``[1, S]``, logits ``[1, S, vocabulary]``."""

    tokens: Tensor
    logits: Tensor
    regions: int
    declined: list[str]
    expert_bytes: int
    whole_expert_bytes: int
    bytes_exchanged: int


@dataclass(frozen=True)
class Verdict:
    """One model's result over all ranks."""

    model: str
    moe_layers: int
    outcomes: list[Outcome]
    max_difference: float
    tokens_equal: bool
    seconds: float

    @property
    def passed(self) -> bool:
        ranks = len(self.outcomes)
        return self.tokens_equal and all(
            o.regions == self.moe_layers and o.expert_bytes * ranks == o.whole_expert_bytes
            for o in self.outcomes
        )


def run_demo(
    models: Sequence[str], ranks: int, new_tokens: int, base: str, console: Console
) -> bool:
    """Run the demo, print its tables, return whether everything was equal. `MoeFxError`, with one
    message for all ranks, if it cannot be run like this."""
    require_transformers()
    require_base(parse_options({"base": base}).base)
    verdicts: list[Verdict] = []
    with (
        tempfile.TemporaryDirectory(prefix="moe_fx_demo_") as folder,
        RankPool(ranks) as pool,
        console.status("starting") as status,
    ):
        for name in models:
            path = Path(folder) / str(len(verdicts))  # a name may be any text
            verdict = _run_model(name, path, pool, new_tokens, base, partial(_say, status))
            verdicts.append(verdict)
            _print(verdict, console)
    passed = all(verdict.passed for verdict in verdicts)
    console.print("[green]all equal[/]" if passed else "[red]something differs[/]")
    return passed


def _say(status: Status, text: str) -> None:
    status.update(escape(text))


def _run_model(
    name: str,
    path: Path,
    pool: RankPool,
    new_tokens: int,
    base: str,
    progress: Callable[[str], None],
) -> Verdict:
    from transformers.utils import logging

    start = time.perf_counter()
    logging.disable_progress_bar()
    progress(f"{name}: building and saving a small model with seeded weights")
    model = tiny_model(name)
    model.save_pretrained(path)
    prompts = [_prompt(model.config.vocab_size, rank) for rank in range(pool.world_size)]
    progress(f"{name}: generating {new_tokens} tokens with the original, in this process")
    expected = [_generate(model, prompt, new_tokens) for prompt in prompts]
    progress(
        f"{name}: on {pool.world_size} ranks: loading shards, compiling with base {base!r} and "
        f"generating {new_tokens} tokens"
    )
    try:
        outcomes = pool.run(
            _rank_main, str(path), prompts, new_tokens, base, timeout=_STAGE_TIMEOUT
        )
    except RankError as error:
        raise MoeFxError(f"{name} on {pool.world_size} ranks: {error.brief}") from error
    differences = []
    for outcome, tokens in zip(outcomes, expected, strict=True):
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        differences.append(_difference(outcome.logits, logits))
    return Verdict(
        model=name,
        moe_layers=_count_moe_layers(model),
        outcomes=outcomes,
        max_difference=max(differences),
        tokens_equal=all(
            torch.equal(o.tokens, tokens) for o, tokens in zip(outcomes, expected, strict=True)
        ),
        seconds=time.perf_counter() - start,
    )


def _rank_main(rank: int, path: str, prompts: list[Tensor], new_tokens: int, base: str) -> Outcome:
    from torch._inductor import config
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from moe_fx.integrations.transformers import sharded_loading

    logging.disable_progress_bar()
    config.compile_threads = 1  # the ranks keep the cores busy as it is
    group = dist.group.WORLD
    assert group is not None
    with sharded_loading(group):
        model = AutoModelForCausalLM.from_pretrained(path)
    reports: list[Report] = []
    # No lines from a rank between those of the command.
    options: dict[str, Any] = {"base": base, "on_report": reports.append, "progress": False}
    model.forward = torch.compile(
        model.forward, backend="moe_fx", dynamic=True, fullgraph=True, options=options
    )
    sent_before = bytes_sent(group.group_name)
    tokens = _generate(model, prompts[rank], new_tokens)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    held, whole = expert_parameter_bytes(model)
    return Outcome(
        tokens=tokens,
        logits=logits,
        regions=min((len(report.regions) for report in reports), default=0),
        declined=[declined.reason for report in reports for declined in report.declined],
        expert_bytes=held,
        whole_expert_bytes=whole,
        bytes_exchanged=bytes_sent(group.group_name) - sent_before,
    )


def _prompt(vocabulary: int, rank: int) -> Tensor:
    """Another prompt, of another length, on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(3, vocabulary, (1, 5 + 3 * rank), generator=generator)


def _generate(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """Greedy, by transformers' own ``generate``. No early end: ranks run in step."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=False,
        pad_token_id=0,
    )


def _count_moe_layers(model: torch.nn.Module) -> int:
    """Modules that hold one matrix per expert."""
    return sum(
        any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        for module in model.modules()
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise MoeFxError(f"logits {list(found.shape)} cannot equal {list(expected.shape)}")
    return float((found - expected).abs().max() / expected.abs().max())


def _print(verdict: Verdict, console: Console) -> None:
    title = f"{verdict.model} on {len(verdict.outcomes)} ranks, {verdict.seconds:.0f} s"
    table = Table(title=escape(title))
    for heading in ("rank", "MoE layers", "expert parameters", "rows sent", "tokens"):
        table.add_column(heading)
    for rank, outcome in enumerate(verdict.outcomes):
        share = outcome.expert_bytes / outcome.whole_expert_bytes
        table.add_row(
            str(rank),
            f"{outcome.regions} of {verdict.moe_layers}",
            f"{outcome.expert_bytes / 1024:.0f} KiB of {outcome.whole_expert_bytes / 1024:.0f} KiB "
            f"({share:.0%})",
            f"{outcome.bytes_exchanged / 1024:.0f} KiB",
            str(outcome.tokens.shape[1]),
        )
    console.print(table)
    for reason in dict.fromkeys(r for o in verdict.outcomes for r in o.declined):
        console.print(f"  declined: {reason}", markup=False)
    equal = "[green]equal[/]" if verdict.tokens_equal else "[red]DIFFERENT[/]"
    console.print(
        f"  tokens against the original: {equal}; largest difference of logits, relative: "
        f"{verdict.max_difference:.1e}"
    )
