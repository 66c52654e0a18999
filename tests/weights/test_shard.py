"""`shard_experts` and `sharded_loading` on two real processes (gloo)."""

from __future__ import annotations

import copy
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import moe_fx.weights.unshard
from moe_fx.capture.local_tensors import localise
from moe_fx.compat import all_gather_rows
from moe_fx.errors import ConfigurationError, MoeFxError
from moe_fx.ranks.groups import check_device
from moe_fx.weights.expert_parameters import slots
from moe_fx.weights.shard import expert_parameter_bytes, shard_experts

WORLD = 2
EXPERTS = 4


# ---- Two processes that run this file's functions


class Ranks:
    """``ranks(function, *args)`` runs it on every rank and returns their results, in rank order."""

    def __init__(self, directory: Path) -> None:
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, str(directory / "store")), daemon=True
            )
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        hang = (f"hangs in {function.__name__}", None)
        answers = [pipe.recv() if pipe.poll(timeout) else hang for pipe in self.pipes]
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        if errors:
            pytest.fail("\n".join(errors), pytrace=False)
        return [result for _, result in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def _serve(pipe: Any, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    while True:
        function, args = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((None, function(*args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()


# ---- Models


class LoopExperts(nn.Module):
    """Reads its weights once for each expert that was hit."""

    def __init__(self, experts: int = EXPERTS, hidden: int = 8) -> None:
        super().__init__()
        self.num_experts = experts
        self.weight = nn.Parameter(torch.randn(experts, hidden, hidden))
        self.bias = nn.Parameter(torch.randn(experts, hidden))

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        for expert in ids.unique().tolist():
            rows = ids == expert
            out[rows] = tokens[rows] @ self.weight[expert] + self.bias[expert]
        return out


class Layer(nn.Module):
    """Experts between two dense weights, as ``layer.mlp``; ``w1`` and ``w2`` as some name them."""

    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.mlp = mlp or LoopExperts()
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        return self.mlp(self.inner(tokens) * self.scale, ids)


def qwen(implementation: str = "grouped_mm", **options: Any) -> Any:
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM._from_config(
        qwen_config(**options), experts_implementation=implementation
    ).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param.normal_(std=0.2)
    return model


def qwen_config(*, layers: int = 2, **options: Any) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        **options,
    )


def own_tokens() -> Tensor:
    """Token ids, fewer and others on rank 1: not every expert is hit there."""
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    return torch.randint(0, 64, (1, 9 if dist.get_rank() == 0 else 1), generator=generator)


def my_rows(whole: Tensor) -> Tensor:
    here = whole.shape[0] // WORLD
    return whole[dist.get_rank() * here :][:here]


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(module: Any, name: str) -> Tensor:
    """This rank's rows of a sharded parameter."""
    return local(module._parameters[name].detach())


def sharded_names(model: nn.Module) -> set[str]:
    return {slot.full_name for slot in slots(model) if slot.unshard is not None}


# ---- What it computes


def forward(implementation: str) -> tuple[float, float, int]:
    model = qwen(implementation)
    assert model.config._experts_implementation == implementation
    tokens = own_tokens()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        before = model(tokens, use_cache=False).logits
        assert shard_experts(model) is model
        gathers = count_gathers(patch)
        after = model(tokens, use_cache=False).logits
        once = gathers["calls"]
        for slot in slots(model):
            if slot.unshard is not None and dist.get_rank() == 0:
                local(slot.tensor).zero_()
        changed = model(tokens, use_cache=False).logits
    return distance(before, after), distance(before, changed), once


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def count_gathers(patch: pytest.MonkeyPatch) -> Counter[str]:
    gathers: Counter[str] = Counter()

    def counted(*args: Any) -> Tensor:
        gathers["calls"] += 1
        return all_gather_rows(*args)

    patch.setattr(moe_fx.weights.unshard, "all_gather_rows", counted)
    return gathers


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_the_model_means_the_same(ranks: Ranks, implementation: str) -> None:
    for difference, without_rank_0, gathers in ranks(forward, implementation):
        assert difference == 0
        assert without_rank_0 > 1e-3
        assert gathers == 4  # two layers of two weights, however often they are read


def outside() -> None:
    model = Layer()
    whole = model.mlp.weight.detach().clone()
    shard_experts(model)
    assert torch.equal(model.mlp.weight, whole)
    copied = copy.deepcopy(model)
    rows_of(copied.mlp, "weight").zero_()
    assert not copied.mlp.weight.any()
    assert torch.equal(model.mlp.weight, whole)


def test_weights_may_be_read_anywhere_and_the_model_copied(ranks: Ranks) -> None:
    ranks(outside)


FAMILIES = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v2": {"first_k_dense_replace": 0, "num_key_value_heads": 4},
    "deepseek_v3": {"first_k_dense_replace": 0, "num_key_value_heads": 4},
    "glm4_moe": {"first_k_dense_replace": 0},
    "gpt_oss": {},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "granitemoe": {},
    "jamba": {
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
    },
    "minimax": {},
}
LATENT = dict.fromkeys(
    (
        "head_dim",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
    ),
    8,
)


def family(name: str, options: dict[str, Any]) -> tuple[float, set[str], set[str], float]:
    from transformers import AutoConfig, AutoModelForCausalLM

    if name.startswith("deepseek"):
        options = {**options, **LATENT}
    config = AutoConfig.for_model(name)
    tiny = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_local_experts": 8,
        "num_experts": 8,
        "n_routed_experts": 8,
        "moe_num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_k": 2,
        "n_group": 2,
        "topk_group": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    known = {**config.to_dict(), **config.attribute_map}
    config = type(config)(**{k: v for k, v in {**tiny, **options}.items() if k in known})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param.normal_(std=0.2)
    tokens = own_tokens()
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        expected = {n for n, _ in model.named_parameters() if ".experts." in n}
        shard_experts(model)
        after = model(tokens, use_cache=False).logits
    held, whole = expert_parameter_bytes(model)
    return distance(before, after), sharded_names(model), expected, whole / held


@pytest.mark.parametrize("name", FAMILIES)
def test_the_experts_of_transformers_families_are_found(ranks: Ranks, name: str) -> None:
    for difference, sharded, expected, saved in ranks(family, name, FAMILIES[name]):
        assert difference == 0
        assert sharded == expected
        assert len(sharded) == (4 if name == "gpt_oss" else 2)
        assert saved == WORLD


# ---- Gradients


def gradients(implementation: str) -> float:
    model, tokens = qwen(implementation), own_tokens()
    sharded = shard_experts(copy.deepcopy(model))
    for one in (model, sharded):
        one(tokens, use_cache=False).logits.square().mean().backward()
    grads = {slot.full_name: slot for slot in slots(sharded)}
    worst = 0.0
    for name, param in model.named_parameters():
        expected, slot = param.grad, grads[name]
        if slot.unshard is not None:
            dist.all_reduce(expected)
            expected = my_rows(expected)
        worst = max(worst, (local(slot.tensor.grad) - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_a_shard_gets_the_sum_of_all_ranks_gradients(ranks: Ranks, implementation: str) -> None:
    assert max(ranks(gradients, implementation)) < 1e-6


def no_tokens_on_rank_1() -> tuple[bool, bool]:
    whole = LoopExperts()
    experts = shard_experts(copy.deepcopy(whole))
    count = 0 if dist.get_rank() == 1 else 5
    tokens, ids = torch.randn(count, 8, requires_grad=True), torch.arange(count) % EXPERTS
    for one in (whole, experts):
        out = one(tokens, ids)
        (out.sum() + tokens.sum()).backward()
    full = torch.zeros_like(whole.weight) if whole.weight.grad is None else whole.weight.grad
    dist.all_reduce(full)
    mine = experts._parameters["weight"].grad.to_local()
    return torch.allclose(mine, my_rows(full)), bool(mine.any())


def test_a_rank_without_tokens_joins_the_backward(ranks: Ranks) -> None:
    assert ranks(no_tokens_on_rank_1) == [(True, True), (True, True)]


def checkpointed() -> float:
    model, tokens = qwen("eager"), own_tokens()
    sharded = shard_experts(copy.deepcopy(model))
    sharded.train()
    sharded.gradient_checkpointing_enable({"use_reentrant": False})
    for one in (model, sharded):
        one(tokens, use_cache=False).logits.square().mean().backward()
    (shard,) = (p for n, p in sharded.named_parameters() if "layers.1" in n and "down_proj" in n)
    full = model.model.layers[1].mlp.experts.down_proj.grad
    dist.all_reduce(full)
    return (local(shard.grad) - my_rows(full)).abs().max().item()


def test_gradient_checkpointing_gathers_again(ranks: Ranks) -> None:
    assert max(ranks(checkpointed)) < 1e-6


# ---- Compiled


def compiled(implementation: str, training: bool) -> tuple[float, list[int]]:
    model, tokens = qwen(implementation, layers=1), torch.randint(0, 64, (1, 6))
    sharded = shard_experts(copy.deepcopy(model))
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        gathers = [n for n in module.graph.nodes if "all_gather_into_tensor" in str(n.target)]
        graphs.append(len(gathers))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    torch._dynamo.reset()
    run = torch.compile(sharded, backend=backend, fullgraph=implementation != "eager")
    with torch.set_grad_enabled(training):
        after = run(tokens, use_cache=False).logits
        before = model(tokens, use_cache=False).logits
    worst = distance(after, before)
    if training:
        before.square().mean().backward()
        after.square().mean().backward()
        for slot in slots(sharded):
            if isinstance(slot.tensor, nn.Parameter):
                expected = model.get_parameter(slot.full_name).grad
                if slot.unshard is not None:
                    expected = my_rows(expected) * WORLD  # the ranks have the same tokens
                worst = max(worst, (local(slot.tensor.grad) - expected).abs().max().item())
    assert all(slot.unshard.gathered is None for slot in slots(sharded) if slot.unshard)
    return worst, graphs


@pytest.mark.parametrize(
    ("implementation", "training"), [("grouped_mm", True), ("batched_mm", False)]
)
def test_one_graph_with_one_gather_a_weight(
    ranks: Ranks, implementation: str, training: bool
) -> None:
    for worst, graphs in ranks(compiled, implementation, training):
        assert worst < 1e-5
        assert graphs == [2]


def compiled_by_layer() -> int:
    model = shard_experts(qwen("batched_mm"))
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(module.graph.nodes))
        return module.forward

    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        model(torch.randint(0, 64, (1, 6)), use_cache=False)
    return len(graphs)


def test_equal_layers_share_one_compiled_graph(ranks: Ranks) -> None:
    assert ranks(compiled_by_layer) == [1, 1]


def compiled_loop() -> tuple[float, int]:
    model, tokens = qwen("eager", layers=1), own_tokens()
    sharded = shard_experts(copy.deepcopy(model))
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(sum("all_gather_into" in str(n.target) for n in module.graph.nodes))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        after = torch.compile(sharded, backend=backend)(tokens, use_cache=False).logits
        before = model(tokens, use_cache=False).logits
    return distance(after, before), sum(graphs)


def test_graph_breaks_in_a_loop_over_experts_do_not_hang(ranks: Ranks) -> None:
    (first, gathers), (second, _) = ranks(compiled_loop)
    assert first < 1e-6
    assert second < 1e-6
    assert gathers == 2


def traced(training: bool) -> list[tuple[str, list[str]]]:
    """(op, args) of the gathers, waits and what reads them, of the first layer."""
    from torch._functorch.aot_autograd import aot_export_module

    model = shard_experts(qwen("batched_mm", layers=1))
    found: list[tuple[str, list[str]]] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        local = localise(module, inputs)
        graph, _ = aot_export_module(
            local.module, local.inputs, trace_joint=False, pre_dispatch=True, decompositions={}
        )
        for node in graph.graph.nodes:
            near = [node, *node.all_input_nodes]
            if any("c10d" in str(other.target) for other in near):
                args = [a.op if isinstance(a, torch.fx.Node) else repr(a) for a in node.args]
                found.append((str(node.target), args))
        return module.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        torch.compile(model, backend=backend, fullgraph=True)(
            torch.randint(0, 64, (1, 6)), use_cache=False
        )
    return found


@pytest.mark.parametrize("training", [False, True])
def test_the_gathered_program_as_passes_see_it(ranks: Ranks, training: bool) -> None:
    (nodes, _) = ranks(traced, training)
    name = repr("0")
    gather = ("_c10d_functional.all_gather_into_tensor.default", ["placeholder", "2", name])
    wait = ("_c10d_functional.wait_tensor.default", ["call_function"])
    collectives = [node for node in nodes if "c10d" in node[0]]
    assert collectives == [gather, wait] * 2
    assert [n[0] for n in nodes if "c10d" not in n[0]] == ["aten.index.Tensor"] * 2


# ---- What it keeps


def kept() -> None:
    model = qwen().to(torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    param, whole = experts.down_proj, experts.down_proj.detach().clone()
    param._is_hf_initialized = True
    param.requires_grad_(False)
    shard_experts(model)
    sharded = experts._parameters["down_proj"]
    assert sharded._is_hf_initialized
    assert not sharded.requires_grad
    assert sharded.dtype == torch.bfloat16
    assert sharded.shape == whole.shape
    assert param.untyped_storage().nbytes() == 0
    shard = rows_of(experts, "down_proj")
    assert torch.equal(shard, my_rows(whole))
    assert shard.untyped_storage().nbytes() == whole.nbytes // WORLD
    assert "model.layers.0.mlp.experts.down_proj" in dict(model.named_parameters())


def test_a_parameter_keeps_its_attributes_and_only_the_shard(ranks: Ranks) -> None:
    ranks(kept)


def tied() -> None:
    model = nn.ModuleList([Layer(), Layer()])
    model[1].mlp.weight = model[0].mlp.weight
    whole = model[0].mlp.weight.detach().clone()
    assert expert_parameter_bytes(model) == (EXPERTS * 8 * 10 * 4,) * 2
    shard_experts(model)
    first, second = (layer.mlp._parameters["weight"] for layer in model)
    assert first is second
    assert torch.equal(rows_of(model[0].mlp, "weight"), my_rows(whole))
    assert torch.equal(model[1].mlp.weight, whole)
    assert expert_parameter_bytes(model) == (EXPERTS * 8 * 10 * 2, EXPERTS * 8 * 10 * 4)


def test_tied_experts_stay_tied(ranks: Ranks) -> None:
    ranks(tied)


def on_meta() -> None:
    with torch.device("meta"):
        model = qwen("batched_mm")
    assert expert_parameter_bytes(model)[0] == expert_parameter_bytes(model)[1]
    shard_experts(model)
    held, whole = expert_parameter_bytes(model)
    assert held * WORLD == whole
    experts = model.model.layers[0].mlp.experts
    assert rows_of(experts, "down_proj").is_meta
    assert rows_of(experts, "down_proj").shape == (EXPERTS // WORLD, 32, 16)
    assert model(torch.zeros(1, 3, dtype=torch.long, device="meta")).logits.shape == (1, 3, 64)


def test_a_model_on_meta(ranks: Ranks) -> None:
    ranks(on_meta)


def again() -> None:
    model = shard_experts(qwen())
    before = dict(model.named_parameters())
    assert shard_experts(model) is model
    assert shard_experts(model, dist.group.WORLD, params=["*.experts.*"]) is model
    assert all(before[name] is param for name, param in model.named_parameters())


def test_sharding_twice_changes_nothing(ranks: Ranks) -> None:
    ranks(again)


class Fails(LoopExperts):
    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        raise ArithmeticError


def failing() -> None:
    experts = shard_experts(Fails())
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            experts(torch.randn(2, 8), torch.zeros(2))
        assert all(slot.unshard.gathered is None for slot in slots(experts) if slot.unshard)


def test_a_forward_that_raises_drops_the_gathered_weights(ranks: Ranks) -> None:
    ranks(failing)


def tied_elsewhere() -> None:
    model = nn.ModuleDict({"block": Layer(), "tied": nn.ParameterDict()})
    model["tied"]["again"] = model["block"].mlp.weight
    whole = model["block"].mlp.weight.detach().clone()
    shard_experts(model)
    assert sharded_names(model) == {"block.mlp.weight", "block.mlp.bias", "tied.again"}
    assert torch.equal(model["tied"].again, whole)


def test_every_name_of_a_tied_expert_reads_the_whole(ranks: Ranks) -> None:
    ranks(tied_elsewhere)


def step_by_step() -> None:
    one, other = Layer(), Layer()
    tokens, ids = torch.randn(3, 8), torch.tensor([0, 3, 3])
    expected = one(tokens, ids)
    shard_experts(other, params=["mlp.weight"])
    shard_experts(one, params=["mlp.weight"])
    shard_experts(one, params=["mlp.bias"])
    assert sharded_names(one) == {"mlp.weight", "mlp.bias"}
    assert sharded_names(shard_experts(other)) == {"mlp.weight"}
    assert torch.equal(one(tokens, ids), expected)
    assert isinstance(other.mlp.bias, nn.Parameter)


def test_params_may_be_sharded_one_after_the_other(ranks: Ranks) -> None:
    ranks(step_by_step)


def chosen() -> None:
    model = nn.ModuleDict({"dense": nn.Linear(8, 4), "block": Layer()})
    whole = model["block"].mlp.bias.detach().clone()
    shard_experts(model, params=["*.mlp.bias", "dense.weight"])
    assert sharded_names(model) == {"block.mlp.bias", "dense.weight"}
    assert torch.equal(model["block"].mlp.bias, whole)
    assert model["dense"](torch.ones(2, 8)).shape == (2, 4)


def test_params_chooses_any_parameter(ranks: Ranks) -> None:
    ranks(chosen)


# ---- Loading


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE checkpoint, expert by expert as transformers stores it, in several files."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("qwen")
    qwen(tie_word_embeddings=True).save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def one_file(tmp_path: Path, stored: Path) -> Path:
    from safetensors.torch import load_file, save_file

    weights = {k: v for path in stored.glob("*.safetensors") for k, v in load_file(path).items()}
    save_file(weights, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    return tmp_path / "weights.safetensors"


class Watched:
    """An open safetensors file that counts the expert bytes read from it."""

    def __init__(self, file: Any, read: Counter[str]) -> None:
        self.file, self.read = file, read

    def __enter__(self) -> Watched:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def metadata(self) -> Any:
        return self.file.metadata()

    def get_slice(self, name: str) -> WatchedSlice:
        return WatchedSlice(name, self.file.get_slice(name), self.read)


class WatchedSlice:
    def __init__(self, name: str, stored: Any, read: Counter[str]) -> None:
        self.name, self.stored, self.read = name, stored, read

    def __getitem__(self, rows: Any) -> Tensor:
        value = self.stored[rows]
        kind = "experts" if "experts" in self.name or "mlp." in self.name else "other"
        self.read[kind] += value.nbytes
        return value

    def get_shape(self) -> list[int]:
        return self.stored.get_shape()

    def get_dtype(self) -> str:
        return self.stored.get_dtype()


def watch(patch: pytest.MonkeyPatch) -> Counter[str]:
    import safetensors
    import transformers.modeling_utils

    read: Counter[str] = Counter()
    real = safetensors.safe_open

    def watched(*args: Any, **kwargs: Any) -> Watched:
        return Watched(real(*args, **kwargs), read)

    patch.setattr(safetensors, "safe_open", watched)
    patch.setattr(transformers.modeling_utils, "safe_open", watched)
    return read


def check_loaded(model: nn.Module, stored: Path) -> None:
    """The model is sharded, holds its shard and no more, and computes what the whole one does, up
    to rounding (where a memory-mapped tensor starts decides which kernel multiplies it)."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(stored)
    tokens = own_tokens()
    with torch.no_grad():
        difference = model(tokens).logits - whole(tokens).logits
    assert difference.abs().max() < 1e-5
    assert sharded_names(model) == {n for n, _ in whole.named_parameters() if ".experts." in n}
    for slot in slots(model):
        if slot.unshard is not None:
            rows = local(slot.tensor)
            assert rows.untyped_storage().nbytes() == rows.nbytes
            assert torch.equal(rows, my_rows(whole.get_parameter(slot.full_name)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def expert_bytes() -> int:
    return 2 * EXPERTS * (32 * 32 + 32 * 16) * 4  # two layers


def load_within(stored: Path) -> int:
    from transformers import AutoModelForCausalLM, PreTrainedModel

    from moe_fx.integrations.transformers import sharded_loading

    loader = PreTrainedModel._load_pretrained_model
    with pytest.MonkeyPatch.context() as patch:
        read = watch(patch)
        with sharded_loading(dist.group.WORLD):
            model = AutoModelForCausalLM.from_pretrained(stored)
        assert PreTrainedModel._load_pretrained_model is loader
    assert shard_experts(model) is model
    assert all(p.requires_grad for p in model.parameters())
    check_loaded(model, stored)
    return read["experts"] - router_bytes()


def router_bytes() -> int:
    return 2 * EXPERTS * 32 * 4


def test_sharded_loading_reads_only_the_shard(ranks: Ranks, stored: Path) -> None:
    assert ranks(load_within, stored) == [expert_bytes() // WORLD] * WORLD


def load_checkpoint(path: Path, stored: Path, meta: bool) -> int:
    with torch.device("meta" if meta else "cpu"):
        model = qwen(tie_word_embeddings=True)
    model.lm_head.weight.requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        read = watch(patch)
        assert shard_experts(model, checkpoint=path) is model
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "model.embed_tokens.weight"
    ]
    check_loaded(model, stored)
    return read["experts"] - router_bytes()


@pytest.mark.parametrize("meta", [True, False])
def test_a_checkpoint_is_read_by_shards(ranks: Ranks, stored: Path, meta: bool) -> None:
    assert ranks(load_checkpoint, stored, stored, meta) == [expert_bytes() // WORLD] * WORLD


def test_a_checkpoint_may_be_one_file(ranks: Ranks, stored: Path, one_file: Path) -> None:
    assert ranks(load_checkpoint, one_file, stored, True) == [expert_bytes() // WORLD] * WORLD


def load_incomplete(path: Path) -> str:
    from transformers import Qwen3MoeForCausalLM

    from moe_fx.integrations.transformers import sharded_loading

    with sharded_loading():
        model = Qwen3MoeForCausalLM.from_pretrained(path)
    assert len(sharded_names(model)) == 4
    assert model(own_tokens()).logits.isfinite().all()
    with pytest.raises(ConfigurationError) as error:
        shard_experts(model, checkpoint=path)
    return str(error.value)


def test_missing_experts_are_initialised_by_transformers_and_refused_by_us(
    ranks: Ranks, one_file: Path
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(one_file)
    kept = {k: v for k, v in weights.items() if "layers.1.mlp.experts" not in k}
    one_file.unlink()
    save_file(kept, one_file.with_name("model.safetensors"), metadata={"format": "pt"})
    qwen_config(tie_word_embeddings=True).save_pretrained(one_file.parent)
    for message in ranks(load_incomplete, one_file.parent):
        assert "layers.1.mlp.experts.down_proj" in message


def load_plain(path: Path, meta: bool) -> int:
    whole = Layer()
    torch.manual_seed(1)
    with torch.device("meta" if meta else "cpu"):
        model = Layer()
    with pytest.MonkeyPatch.context() as patch:
        read = watch(patch)
        shard_experts(model, checkpoint=path)
    assert sharded_names(model) == {"mlp.weight", "mlp.bias"}
    tokens = torch.randn(5, 8)
    ids = torch.arange(5) % EXPERTS
    assert torch.equal(model(tokens, ids), whole(tokens, ids))
    assert all(p.requires_grad for p in model.parameters())
    held = [local(slot.tensor) for slot in slots(model)]
    assert all(rows.untyped_storage().nbytes() == rows.nbytes for rows in held)
    shard_experts(model, checkpoint=path)  # into a sharded model
    assert torch.equal(model(tokens, ids), whole(tokens, ids))
    return read["experts"]


@pytest.mark.parametrize("meta", [True, False])
def test_a_plain_modules_checkpoint(ranks: Ranks, tmp_path: Path, meta: bool) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(Layer().state_dict(), tmp_path / "weights.safetensors")
    assert ranks(load_plain, tmp_path, meta) == [EXPERTS * (8 * 8 + 8) * 4 // WORLD] * WORLD


# ---- What it rejects


def refused(make: Callable[[], nn.Module], options: dict[str, Any]) -> str:
    """The message; the model is unchanged."""
    model = make()
    before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    with pytest.raises(ConfigurationError) as error:
        shard_experts(model, **options)
    assert {name: (id(p), p.shape) for name, p in model.named_parameters()} == before
    return str(error.value)


def scalar() -> nn.Module:
    model = Layer()
    model.mlp.scalar = nn.Parameter(torch.tensor(1.0))
    return model


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 2))


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (dense, {}, ["no expert parameters in Sequential", "params="]),
        (Layer, {"params": ["*.w1"]}, ["'*.w1'", "mlp.bias"]),
        (scalar, {"params": ["mlp.*"]}, ["mlp.scalar has the shape []"]),
        (Layer, {"checkpoint": "/nowhere"}, ["no checkpoint at /nowhere"]),
    ],
)
def test_rejects(
    ranks: Ranks, make: Callable[[], nn.Module], options: dict[str, Any], says: list[str]
) -> None:
    for message in ranks(refused, make, options):
        assert all(part in message for part in says)
        assert "\n" not in message


def test_rejects_a_checkpoint_of_another_model(ranks: Ranks, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = Layer().state_dict()
    weights["other"] = weights.pop("mlp.bias")
    save_file(weights, tmp_path / "renamed.safetensors")
    save_file(Layer(LoopExperts(8)).state_dict(), tmp_path / "larger.safetensors")
    (tmp_path / "none").mkdir()
    for message in ranks(refused, Layer, {"checkpoint": tmp_path / "renamed.safetensors"}):
        assert "missing mlp.bias; unexpected other" in message
    for message in ranks(refused, Layer, {"checkpoint": tmp_path / "larger.safetensors"}):
        assert "mlp.bias is [8, 8]" in message
        assert "[4, 8] in the model" in message
    for message in ranks(refused, Layer, {"checkpoint": tmp_path / "none"}):
        assert "holds no safetensors files" in message


def another_group() -> None:
    model = shard_experts(Layer())
    alone = [dist.new_group([rank]) for rank in range(WORLD)]
    with pytest.raises(ConfigurationError, match=r"mlp.weight is sharded already"):
        shard_experts(model, alone[dist.get_rank()])
    with pytest.raises(ConfigurationError, match="not in the process group"):
        shard_experts(Layer(), alone[1 - dist.get_rank()])


def test_rejects_another_group(ranks: Ranks) -> None:
    ranks(another_group)


def other_tensors() -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = Layer()
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    model.mlp.weight = nn.Parameter(distribute_tensor(model.mlp.weight.data, mesh, [Shard(0)]))
    with pytest.raises(ConfigurationError, match=r"mlp.weight is a DTensor"):
        shard_experts(model)


def test_rejects_parameters_that_are_sharded_otherwise(ranks: Ranks) -> None:
    ranks(other_tensors)


def devices() -> None:
    gloo = dist.group.WORLD
    check_device(torch.device("meta"), "w", gloo)
    with pytest.raises(ConfigurationError, match=r"w is on cuda.* on cpu only"):
        check_device(torch.device("cuda"), "w", gloo)
    no_cpu = dist.new_group(backend="cuda:gloo")
    with pytest.raises(ConfigurationError, match=r"mlp.weight is on cpu"):
        shard_experts(Layer(), no_cpu)


def test_rejects_a_device_the_backend_does_not_serve(ranks: Ranks) -> None:
    ranks(devices)


def test_rejects_without_a_process_group() -> None:
    from moe_fx.integrations.transformers import sharded_loading

    assert not dist.is_initialized()
    with pytest.raises(MoeFxError, match=r"init_process_group\(\) first"):
        shard_experts(Layer())
    with pytest.raises(ValueError, match="not initialised"), sharded_loading():
        pass


def test_transformers_is_not_imported_for_other_models() -> None:
    import subprocess
    import sys

    code = "import sys, moe_fx.weights.shard; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
