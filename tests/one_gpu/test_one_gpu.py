"""``moe-fx bench --device cuda``, on the host in place of a GPU: figures, table, command."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from moe_fx.bench import layers, machine, model_runs, programs, reference, results
from moe_fx.bench.floor import Rates, Work
from moe_fx.bench.layer_runs import LayerRuns
from moe_fx.bench.points import HF, HF_GRAPH, MEASURING, OURS, OURS_GRAPH, Point
from moe_fx.bench.run import failures, run
from moe_fx.bench.selection import TOKENS, TRAINING_TOKENS, Selection, select
from moe_fx.errors import ConfigurationError
from moe_fx.report import Report
from moe_fx_cli import app

_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
QWEN3 = layers.Layer(
    "tiny",
    "8 experts",
    {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        **_ATTENTION,
    },
)
GPT_OSS = layers.Layer(
    "tiny-oss",
    "8 experts, biases",
    {
        "model_type": "gpt_oss",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        **_ATTENTION,
    },
)
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 4,
    "first_k_dense_replace": 3,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "quantization_config": {"quant_method": "fp8"},
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
RATES = Rates(flops=1e12, bytes=1e9)
SHORT: dict[str, Any] = {"seconds_per_point": 0.01, "base": "aot_eager"}


def layer_point(layer: layers.Layer, tokens: int = 8, **asked: Any) -> Point:
    selection = Selection([layer], tokens=[tokens], **SHORT, **asked)
    runs = LayerRuns(layer, selection, machine.Host(), RATES, lambda _: None)
    (found,) = runs.points([tokens])
    return found


# ---- The floor


def test_floor_is_the_longer_of_flops_and_bytes() -> None:
    work = Work(row_flops=100, expert_bytes=1000, dense_flops=10, dense_bytes=50, token_bytes=4)
    rates = Rates(flops=10.0, bytes=5.0)
    assert work.floor(tokens=3, top_k=2, hit=4, rates=rates) == (
        3 * (2 * 100 + 10) / 10,
        (4 * 1000 + 50 + 2 * 3 * 4) / 5,
    )
    flops, moved = work.floor(3, 2, 4, rates, training=True)
    assert flops == 3 * 3 * (2 * 100 + 10) / 10
    assert moved == (3 * (4 * 1000 + 50) + 4 * 3 * 4) / 5
    assert Point("x", "forward", 3, floor_flops=2.0, floor_bytes=3.0).floor == 3.0


@pytest.mark.parametrize("layer", [QWEN3, GPT_OSS])
def test_work_is_counted_from_the_parameters(layer: layers.Layer) -> None:
    block = layers.build_block(layer, torch.device("cpu"))
    width = 32 if layer is QWEN3 else 64
    biases = 0 if layer is QWEN3 else 2 * width + 64
    work = block.work()
    assert work.row_flops == 2 * 3 * 64 * width
    assert work.expert_bytes == 2 * (3 * 64 * width + biases)
    assert work.dense_flops == 2 * 8 * 64
    assert block.selected(torch.randn(1, 5, 64, dtype=torch.bfloat16)).shape == (5, 2)


def test_named_layers_have_the_widths_that_they_say() -> None:
    meta = torch.device("meta")
    found = {name: layers.build_block(layer, meta) for name, layer in layers.LAYERS.items()}
    flops = {name: block.work().row_flops for name, block in found.items()}
    assert flops == {
        "qwen3": 6 * 2048 * 768,
        "mixtral": 6 * 4096 * 14336,
        "deepseek": 6 * 7168 * 2048,
        "gpt-oss": 6 * 2880 * 2880,
    }
    experts = {name: len(next(block.experts.parameters())) for name, block in found.items()}
    assert experts == {"qwen3": 128, "mixtral": 8, "deepseek": 32, "gpt-oss": 32}


def test_whole_models_fit_a_card() -> None:
    for layer in layers.MODELS.values():
        model = layers.build_model(layer, torch.device("meta"))
        assert sum(p.numel() * p.element_size() for p in model.parameters()) < 60e9


# ---- What is right


def test_a_planted_error_is_seen() -> None:
    block = layers.build_block(QWEN3, torch.device("cpu"))
    tokens = torch.empty(1, 16, 64, dtype=torch.bfloat16)
    _, rows = reference.draw(block, tokens)
    expected = reference.InFloat64(block, machine.Host()).forward(tokens[:, rows])
    with torch.no_grad():
        right = reference.first(block.module(tokens))[:, rows]
    assert reference.relative_error(right, expected) < 1e-2
    assert reference.relative_error(1.1 * right, expected) == pytest.approx(0.1, rel=0.1)
    wrong = right.clone()
    wrong[0, 0, 0] = float("nan")
    assert reference.relative_error(wrong, expected) == math.inf
    nothing = torch.zeros(2)
    assert reference.relative_error(nothing, nothing) == 0.0
    assert reference.relative_error(nothing + 1, nothing) == math.inf


def test_float64_gives_gradients_too() -> None:
    block = layers.build_block(GPT_OSS, torch.device("cpu"))
    tokens, output = (torch.randn(1, 4, 64, dtype=torch.bfloat16) for _ in range(2))
    found = reference.InFloat64(block, machine.Host()).gradients(tokens, output)
    assert found["tokens"].dtype == torch.float64
    assert set(found) == {"tokens", *(name for name, _ in block.module.named_parameters())}


def test_tokens_between_two_experts_are_not_compared() -> None:
    block = layers.build_block(QWEN3, torch.device("cpu"))
    router = block.module.get_parameter("gate.weight")
    router.data[1::2] = router.data[::2]  # every expert has an equal
    assert block.selected(torch.randn(1, 4, 64, dtype=torch.bfloat16)).shape == (4, 2)
    router.data[:] = torch.linspace(1, 2, 8)[:, None].sqrt()
    clear = torch.ones(1, 1, 64, dtype=torch.bfloat16)
    close = clear.clone()
    close[..., 1::2] = -1  # logits of about nothing, in any order
    same = reference.steady(block, torch.cat([clear, close], 1))
    assert same.tolist() == [True, False]


def test_judgement() -> None:
    found = Point("x", "forward", 8, errors={HF: 4e-3, OURS: 1.9e-2, HF_GRAPH: 4e-3})
    found.judge()
    assert not found.failed
    found.errors[OURS_GRAPH] = math.inf
    found.judge()
    assert "wrong: inf from float64" in found.failed[OURS_GRAPH]
    noisy = Point("x", "forward", 8, errors={HF: 4e-2, OURS: 7e-2})
    noisy.judge()
    assert not noisy.failed
    apart = Point("x", "forward", 8, errors={HF: 4e-3, OURS: 4e-3}, apart=math.nan)
    apart.judge()
    assert failures([apart]) == ["x, 8 tokens: moe_fx: wrong: nan from HF's result, relative"]


def test_a_program_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = programs.compiled

    def planted(*given: Any) -> Any:
        functions, reports = compiled(*given)
        right = functions[OURS]
        return functions | {OURS: lambda tokens: 1.1 * right(tokens)}, reports

    monkeypatch.setattr("moe_fx.bench.layer_runs.compiled", planted)
    found = layer_point(QWEN3)
    assert found.errors[OURS] == pytest.approx(0.1, rel=0.1)
    assert set(found.failed) == {OURS, OURS_GRAPH}
    assert found.samples[OURS]  # its time may say why


def test_a_layer_that_moe_fx_did_not_rewrite_is_no_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    functions = {HF: lambda tokens: block(tokens), OURS: lambda tokens: block(tokens)}
    monkeypatch.setattr("moe_fx.bench.layer_runs.compiled", lambda *_: (functions, [Report()]))
    runs = LayerRuns(QWEN3, Selection([QWEN3], **SHORT), machine.Host(), RATES, lambda _: None)
    block = runs.block.module
    (found,) = runs.points([8])
    assert failures([found]) == ["tiny, 8 tokens: moe_fx: no layer was rewritten"]


def test_a_program_that_fails_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nfor this")

    functions = {HF: reference.first, OURS: broken}
    monkeypatch.setattr("moe_fx.bench.layer_runs.compiled", lambda *_: (functions, []))
    found = layer_point(QWEN3)
    assert found.failed[OURS] == "RuntimeError: no kernel"
    assert found.samples[HF] and OURS not in found.samples
    assert "no kernel" in results.one_line(found)


# ---- The whole way


def test_a_layer_from_end_to_end(tmp_path: Path) -> None:
    text = io.StringIO()
    selection = Selection([QWEN3, GPT_OSS], tokens=[8], parts=True, **SHORT)
    path = tmp_path / "figures.json"
    points = run(selection, machine.Host(), Console(file=text, width=160), path)
    assert failures(points) == []
    for point in points:
        assert set(point.samples) == {HF, OURS, HF_GRAPH, OURS_GRAPH} == set(point.errors)
        assert max(point.errors.values()) < 1e-2
        assert point.plan and point.apart is not None and 1 <= point.hit <= 8
        assert any("moe_fx" in part.name for part in point.parts)
    assert "tiny, 8 tokens" in text.getvalue() and "/ floor" in text.getvalue()
    assert "kernels" in text.getvalue()
    written = json.loads(path.read_text())
    assert written["machine"]["versions"]["torch"] == torch.__version__
    assert written["machine"]["name"] and written["machine"]["date"]
    for point, found in zip(points, written["points"], strict=True):
        assert found["medians"][OURS] == point.seconds(OURS)
        assert found["ours_over_hf"][OURS_GRAPH] == point.ratio(OURS_GRAPH)
        assert found["floor"] == max(found["floor_flops"], found["floor_bytes"])


def test_training() -> None:
    found = layer_point(QWEN3, 16, training=True)
    assert not found.failed
    assert found.title == "tiny, forward + backward, 16 tokens"
    assert set(found.samples) == {HF, OURS} == set(found.errors)
    assert 0 < max(found.errors.values()) < 2e-2


def test_one_compilation_for_all_numbers_of_tokens() -> None:
    selection = Selection([QWEN3], dynamic=True, **SHORT)
    runs = LayerRuns(QWEN3, selection, machine.Host(), RATES, lambda _: None)
    found = list(runs.points([8, 24]))
    assert not any(point.failed for point in found)
    assert found[1].compile_seconds[OURS] < found[0].compile_seconds[OURS] / 2


@pytest.mark.parametrize("layer", [QWEN3, GPT_OSS])
def test_a_model(layer: layers.Layer) -> None:
    selection = Selection(models=[layer], prefill=16, batches=[2], context=12, cache=32, **SHORT)
    runs = model_runs.ModelRuns(layer, selection, machine.Host(), lambda _: None)
    prefill, decode = runs.points()
    assert (prefill.kind, decode.kind) == ("prefill", "decode")
    for point in (prefill, decode):
        assert not point.failed
        assert set(point.samples) == {HF, OURS, HF_GRAPH, OURS_GRAPH}
        assert max(point.errors.values()) < 5e-2
        assert point.floor is None


def test_a_layer_of_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"model_type": "some_vlm", "text_config": DEEPSEEK}))
    layer = layers.from_file(path)
    assert layer.name == "mine"
    block = layers.build_block(layer, torch.device("cpu"))
    work = block.work()
    assert work.row_flops == 6 * 64 * 32
    assert work.dense_flops == 2 * (8 * 64 + 3 * 64 * 32)  # router, shared expert
    assert not layer_point(layer).failed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "expected a config.json"),
        ('{"hidden_size": 4}', "with its model_type"),
        ('{"model_type": "llama", "hidden_size": 64}', "no layer with experts"),
        ('{"model_type": "no_such"}', "transformers refuses it"),
    ],
)
def test_a_config_file_that_cannot_be_used(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        layers.build_block(layers.from_file(path), torch.device("cpu"))


# ---- What is asked for


def test_selection() -> None:
    everything = select()
    assert [layer.name for layer in everything.layers] == list(layers.LAYERS)
    assert (everything.tokens, everything.num_points) == (TOKENS, 16)
    assert select(training=True).tokens == TRAINING_TOKENS
    models = select(models=["gpt_oss"])
    assert (models.layers, models.num_points) == ([], 4)
    assert select(["deepseek"], ["deepseek"]).layers != select(models=["deepseek"]).models


def test_it_says_beforehand_how_long_it_will_take() -> None:
    assert select().announcement.startswith(
        "16 points: about 8 minutes, of which 64 seconds timing"
    )
    assert select(["qwen3"], tokens=[16]).announcement.startswith("1 point: about 29 seconds")


def test_what_has_no_room_is_said() -> None:
    found = Point("x", "forward", 8, failed={MEASURING: "OutOfMemoryError: 4 GiB"})
    text = io.StringIO()
    results.show([found], RATES, "a card", Console(file=text, width=160))
    assert "x, 8 tokens: measuring: OutOfMemoryError: 4 GiB" in text.getvalue()
    assert failures([found])


# ---- The command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "cpu"), "--device cpu: give cuda"),
        (("--device", "cuda", "--ratio", "1"), "--ratio is about the slow link"),
        (("--device", "cuda", "--forward"), "is about the slow link"),
        (("--device", "cuda", "--layer", "llama"), "give qwen3, mixtral, deepseek, gpt-oss"),
        (("--device", "cuda", "--model", "llama"), "--model llama: give qwen3"),
        (("--tokens", "16"), "--tokens is for one GPU; give --device cuda too"),
        (("--model", "qwen3"), "--model is for one GPU"),
        (("--seconds-per-point", "1"), "--seconds-per-point is for one GPU"),
    ],
)
def test_options_that_cannot_be_used(arguments: tuple[str, ...], said: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", "--device", "cuda"])
    assert result.exit_code == 2
    assert "sees no CUDA GPU here. Run this on a machine that has one" in result.output
    assert "Traceback" not in result.output


def test_the_command_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def wrong(*given: Any) -> list[Point]:
        asked.extend(given)
        return [Point("x", "forward", 16, failed={OURS: "wrong"})]

    monkeypatch.setattr("moe_fx.bench.run.on_gpu", wrong)
    options = ["--layer", "qwen3", "--tokens", "16", "--json", str(tmp_path / "f.json")]
    result = CliRunner().invoke(app, ["bench", "--device", "cuda:1", *options])
    assert result.exit_code == 1
    device, selection, _, path = asked
    assert (device, path) == ("cuda:1", tmp_path / "f.json")
    assert [layer.name for layer in selection.layers] == ["qwen3"]
    assert list(selection.tokens) == [16]
