"""``python -m tests.one_layer``: writes docs/one-layer.md, the way of one MoE layer through the
stages, from a run of them. ``tests/test_one_layer.py`` fails if the page is not what a run gives.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from moe_fx import passes
from moe_fx.options import Options
from moe_fx.report import Report
from moe_fx.testing import capture
from tests.house import ROOT

__all__ = ["PAGE", "page"]

PAGE = ROOT / "docs" / "one-layer.md"

_TEXT = """\
# The way of one MoE layer

This page is for readers of the code. It follows one small layer through the stages of moe_fx and
shows what the layer is at each of them. `python -m tests.one_layer` writes it from a run, so it
cannot go stale.

The layer selects 2 of 4 experts for each of 6 tokens. Its author wrote it for one device:

```text
{source}
```

## 1. Capture: one graph of functional ATen

`moe_fx/capture` traces what Dynamo captured. No weight is cut and nothing is exchanged yet.

```text
{before}
```

## 2. Recognise: a region

`passes/recognise` gives each node behind the selection a meaning, until the rows of the experts
have been summed to one row a token. What it found is a `Region`:

```text
{region}
```

The nodes between tokens and result, by what they mean (`passes/roles.py`):

```text
{roles}
```

## 3. Plan: how tokens reach their experts

`passes/plan` decides for two ranks that each own two experts. The plan is data (`moe_fx/plan.py`):

```text
{plan}
```

## 4. Verify

`passes/verify` runs the region and its replacement side by side, for both ranks. It also changes
each input alone: an input is "seen" if both results changed then, and changed alike.

```text
{effects}
```

## 5. Rewrite and overlap: the graph of rank 0

`passes/rewrite` replaces the region by ops of the dialect (`moe_fx/ops`), written by the plan's
strategy (`passes/strategies/alltoall.py`). `passes/overlap` then moves each start of an exchange
up and each wait down. The base compiler gets this graph:

```text
{after}
```
"""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 16, 32) / 4)
        self.down = nn.Parameter(torch.randn(4, 32, 16) / 4)

    def forward(self, tokens: Tensor) -> Tensor:
        weights, ids = torch.softmax(self.gate(tokens), -1).topk(2)
        hidden = torch.relu(torch.einsum("th,tkhf->tkf", tokens, self.up[ids]))
        rows = torch.einsum("tkf,tkfh->tkh", hidden, self.down[ids])
        return (rows * weights[..., None]).sum(1)


def page() -> str:
    torch.manual_seed(0)
    layer = Layer().eval().requires_grad_(False)
    captured = capture(layer, torch.randn(6, 16))
    before = _code(captured)
    report = Report()
    context = passes.Context(options=Options(), report=report)
    after = passes.run(captured, context, passes.for_ranks(2))
    (region,), (plan,) = context.regions, context.plans
    parts = region.parts
    roles = {
        str(node): re.sub(r"source=\w+, |, source=\w+|source=\w+", "", str(parts.roles[node]))
        for node in parts.nodes
        if node in parts.roles
    }
    facts = {
        "experts": region.num_experts,
        "top_k": region.top_k,
        "hidden_size": region.hidden_size,
        "router": region.router.score,
        "form": region.form,
        "tokens, ids, weights": f"{parts.tokens}, {parts.ids}, {parts.weights}",
        "result": parts.combined,
    }
    planned = {k: v for k, v in asdict(plan).items() if v not in (None, "", 1) and k != "predicted"}
    effects = {effect.name: f"{effect.kind}, seen" for effect in region.effects}
    return _TEXT.format(
        source=_source(),
        before=before,
        region=_table(facts),
        roles=_table(roles),
        plan=_table(planned),
        effects=_table(effects),
        after=_code(after),
    )


def _source() -> str:
    body = inspect.getsource(Layer.forward).split("\n", 1)[1]
    return textwrap.dedent(body).rstrip()


def _table(rows: dict[str, object]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _code(module: GraphModule) -> str:
    """The body of ``forward``, without what readers need not see."""
    lines = []
    for line in module.graph.python_code("self").src.splitlines():
        line = re.sub(r";  .*$", "", line.strip())  # names that are no longer needed
        line = re.sub(r"\s*# .*$", "", line)
        line = re.sub(r", layer = '[^']*', exchange_timeout = [\d.]+", "", line)
        line = line.replace("torch.ops.", "")
        if line and not line.startswith(("def ", "import ")):
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
