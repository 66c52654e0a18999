"""What is found, as data: a `Region` for a match, a `Declined` for a refusal, a `Break` for what
Dynamo does not capture."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def source_of(node: Node) -> str:
    """``file:line`` in the user's model that produced ``node`` ("" if the graph does not say)."""
    own = [frame for frame in frames_of(node) if "/torch/" not in frame[0]]
    if not own:
        return ""
    file, line = own[-1]
    return f"{file}:{line}"


def frames_of(node: Node) -> list[tuple[str, str]]:
    """(file, line) of each call that led to ``node``, the outermost of the graph first."""
    return _FRAME.findall(node.meta.get("stack_trace") or "")


@dataclass(frozen=True)
class Router:
    """How tokens are scored and experts selected.

    score: what weighs an expert: "softmax", "sigmoid", "softplus_sqrt", "softplus", "logits",
        "sparsemixer" (Phi-3.5-MoE) or "custom" (``note`` says why; the router is kept as captured
        either way).
    selection: "topk", or "lookup" (expert ids come from a table of token ids or from outside).
    select_bias: a per-expert bias moves the selection but not the weights (DeepSeek-V3).
    select_on_logits: that bias is added to the logits, and only the selected are scored.
    num_groups, topk_group: experts are selected from the ``topk_group`` best of ``num_groups``.
    renormalise: the K weights of a token add up to one (before ``scale``); together with those of
        ``shared_columns`` shared experts, if there are any among the logits (Inkling).
    scale: factor on the weights (``routed_scaling_factor``); learned_scale: times a parameter;
        expert_scale: times a parameter of the expert's (Gemma 4).
    logit_scale: factor on the logits.
    softmax_after_topk: the softmax runs over the K selected logits (GPT-OSS, Granite).
    zero_experts: columns of the scores that stand for no expert; selecting one adds nothing.
    verified: the fields reproduced the captured weights and ids on random logits.
    note: why the score is "custom".
    """

    score: str = "custom"
    select_bias: bool = False
    num_groups: int = 1
    topk_group: int = 1
    renormalise: bool = False
    scale: float = 1.0
    softmax_after_topk: bool = False
    verified: bool = False
    selection: str = "topk"
    select_on_logits: bool = False
    learned_scale: bool = False
    expert_scale: bool = False
    logit_scale: float = 1.0
    shared_columns: int = 0
    zero_experts: int = 0
    note: str = ""


@dataclass(frozen=True)
class Gather:
    """An all-gather of expert shards: ``full [E, ...] = all_gather(shard [E/W, ...])``."""

    full: Node
    shard: Node
    group_name: str
    world_size: int


@dataclass(frozen=True)
class Gate:
    """What a router computes weights and ids from: logits ``[T, E]``, and the ``[E]`` bias that
    moves the selection. group_score: how a group of experts is scored, "top2" or "max"."""

    logits: Node
    bias: Node | None
    group_score: str


@dataclass(frozen=True)
class Parts:
    """The nodes of a region, for the passes that rewrite it.

    Inputs: tokens ``[T, H]``, ids ``[T, K]`` and weights ``[T, K]`` (None: the rows are summed
    unweighted, or weighted after they were grouped by token). Output: combined ``[T, ...]``.
    nodes: everything between, in graph order, with its role in ``roles``. Of these, ``dispatched``
    hold the token rows of the pairs, ``body`` is what happens to rows up to and with ``cut``, the
    experts' result, and ``post`` what happens from there on, where routing weights take part.
    tables: the per-expert tensors ``[E, ...]``; gathers: those of them that are all-gathered.
    distinct: no token meets an expert twice.
    gate: where the router's description was read off.
    weighs_tokens: the weights multiply tokens before the experts, not the experts' rows.
    replaces: (captured result, node that takes its place) where the nodes above are not captured
    ones but stand beside them (`passes/recognise/by_value/canonical.py`); captured: those then,
    each with its part ("router", "dispatch", "experts" or "combine").
    """

    select: Node
    tokens: Node
    ids: Node
    weights: Node | None
    nodes: tuple[Node, ...]
    dispatched: tuple[Node, ...]
    body: tuple[Node, ...]
    cut: Node
    post: tuple[Node, ...]
    combined: Node
    tables: tuple[Node, ...]
    gathers: tuple[Gather, ...]
    roles: dict[Node, Any]
    distinct: bool = True
    gate: Gate | None = None
    weighs_tokens: bool = False
    replaces: tuple[Node, Node] | None = None
    captured: dict[Node, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Effect:
    """What was seen of one input that a region reads, when it was changed alone: both the captured
    layer and what takes its place changed, and alike.

    name: of the graph node. kind: "tokens", "ids", "weights", "logits", or "floats", "integers",
    "bools", "scalar". change: the largest change of the result, relative to its largest entry.
    """

    name: str
    kind: str
    change: float


@dataclass(frozen=True)
class Verification:
    """How a region and its replacement were found to agree by value.

    routings: what was tried, each on random tokens and weights. ranks: how many the replacement was
    run for, in lock step. max_difference: largest relative difference seen; tolerance: the largest
    that would have been accepted for the dtype. gradients: the inputs whose gradients were compared
    too ("tokens", "weights", names of graph nodes); none unless the graph was captured for
    training. max_gradient_difference: as max_difference, of these.
    """

    routings: tuple[str, ...]
    ranks: int
    max_difference: float
    tolerance: float
    gradients: tuple[str, ...] = ()
    max_gradient_difference: float | None = None


@dataclass(frozen=True)
class Step:
    """A graph node as text. part: "router", "dispatch", "experts" or "combine" before the rewrite,
    "" after it. inputs: names of other nodes. shape: ``f32[12, 64]``. source: ``file:line``."""

    part: str
    name: str
    op: str
    inputs: tuple[str, ...]
    shape: str
    source: str


@dataclass(frozen=True)
class Listing:
    """A region's nodes before and after the rewrite (on this rank), in graph order."""

    before: tuple[Step, ...]
    after: tuple[Step, ...]


@dataclass(frozen=True)
class Region:
    """One MoE layer found in a graph.

    form: the dispatch spelling ("grouped_mm": rows sorted by expert; "batched_mm": each row meets
        its own copy of the weights; "dense": every expert on every token, or on places for so many;
        "loop": an unrolled body per expert). program: "replicated",
        "gathered", "local", or "exchanged" (the graph holds the exchange already; docs/design.md).
    activation: best name of what happens between the expert matmuls, or "custom".
    source: ``file:line`` of the router's selection in the user's model.
    module: path of the module that holds the layer ("" if that is the model itself, or unknown);
        weights: paths of the parameters and buffers that the experts' tables are made of.
    input, output: names of the graph nodes that hold the tokens and the combined result.
    verified: the replacement agreed with the original by value (False if verification was off).
    effects: what the proofs saw of each input that the layer reads, those of recognition first.
    verification: what was tried, if it was; listing: the nodes as text, for the HTML report.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    router: Router
    form: str
    program: str
    activation: str
    has_shared_expert: bool
    source: str
    input: str
    output: str
    verified: bool
    parts: Parts = field(repr=False, compare=False)
    effects: tuple[Effect, ...] = field(default=(), compare=False)
    verification: Verification | None = field(default=None, compare=False)
    listing: Listing | None = field(default=None, repr=False, compare=False)
    module: str = field(default="", compare=False)
    weights: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Declined:
    """A selection that was not rewritten, and the first condition that failed.

    node: name of the graph node at which the condition failed; source: its ``file:line``;
    nearest_form: the form whose conditions went furthest before one failed.
    reads_experts: False if nothing behind the selection reads a table of as many experts as it
        selects from (attention to selected tokens, sampling): no MoE layer was missed here.
    module: path of the module that the node was made in, as in `Region`.
    bug: the traceback, where moe_fx itself failed and left the whole graph as it came; please
        report it. "" for any other reason.
    """

    reason: str
    node: str
    source: str
    nearest_form: str = ""
    reads_experts: bool = True
    bug: str = field(default="", repr=False)
    module: str = field(default="", compare=False)


@dataclass(frozen=True)
class Break:
    """Where Dynamo ended a graph, or gave up a whole function.

    reason: Dynamo's. source: ``file:line`` in the user's model.
    hides: ``file:line`` of each selection of experts that this parts from its experts: such a layer
        is found only if its experts are recognised without their router.
    skipped: nothing of the function is compiled, only the functions that it calls.
    advice: what to change in the program ("" if only Dynamo knows).
    """

    reason: str
    source: str
    hides: tuple[str, ...] = ()
    skipped: bool = False
    advice: str = ""

    @property
    def said(self) -> str:
        """The reason, and what to do."""
        what = "nothing of this function is compiled: " if self.skipped else ""
        return f"{what}{self.reason} {self.advice}".strip()

    @property
    def text(self) -> str:
        """With the selections that it parts from their experts."""
        if not self.hides:
            return self.said
        return f"{self.said} This hides the experts that are selected at {' and '.join(self.hides)}"


@dataclass(frozen=True)
class Lowered:
    """What became of a dialect op on the device. to: the ops in its place, none if it was kept,
    ``kept`` saying why."""

    op: str
    to: tuple[str, ...]
    node: str
    source: str
    kept: str = ""
