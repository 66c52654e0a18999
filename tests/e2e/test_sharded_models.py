"""A sharded model in the hands of tools that know nothing of shards: right, or an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_fx.testing import RankPool
from tests.e2e import sharded as on_rank
from tests.e2e import sharded_saving as saving

EXACT = 1e-5


# ---- Training


@pytest.mark.parametrize("optimizer", list(on_rank.OPTIMIZERS))
@pytest.mark.parametrize("wrap", [on_rank.ddp, on_rank.fsdp2], ids=lambda wrap: wrap.__name__)
def test_data_parallel_training_is_that_of_one_process(
    ranks2: RankPool, wrap: Callable[..., Any], optimizer: str
) -> None:
    for difference, norms in ranks2.run(partial(on_rank.trained, wrap=wrap, optimizer=optimizer)):
        assert difference < EXACT
        assert max(norms) < EXACT


@pytest.mark.parametrize(
    "wrap", [on_rank.ddp_of_compiled, on_rank.compiled_ddp], ids=lambda wrap: wrap.__name__
)
def test_ddp_of_a_compiled_model_trains_as_one_process(
    ranks2: RankPool, wrap: Callable[..., Any]
) -> None:
    for difference, norms in ranks2.run(partial(on_rank.trained, wrap=wrap, optimizer="SGD")):
        assert difference < EXACT
        assert max(norms) < EXACT


def test_four_ranks_in_ddp_train_as_one_process(ranks4: RankPool) -> None:
    step = partial(on_rank.trained, wrap=on_rank.ddp, optimizer="AdamW")
    for difference, norms in ranks4.run(step):
        assert difference < EXACT
        assert max(norms) < EXACT


@pytest.mark.parametrize("wrap", [on_rank.ddp, on_rank.fsdp2], ids=lambda wrap: wrap.__name__)
def test_two_pairs_that_share_the_experts_train_as_one_process(
    ranks4: RankPool, wrap: Callable[..., Any]
) -> None:
    """Expert parallelism in pairs, data parallelism over all four ranks."""
    step = partial(on_rank.trained, wrap=wrap, optimizer="AdamW", in_pairs=True, steps=10)
    for difference, norms in ranks4.run(step):
        assert difference < EXACT
        assert max(norms) < EXACT


def test_two_pairs_train_compiled_as_one_process(ranks4: RankPool) -> None:
    for difference, strategies in ranks4.run(on_rank.compiled_in_pairs):
        assert difference < EXACT
        assert set(strategies) == {"alltoall"}


def test_gradients_accumulate_under_no_sync(ranks2: RankPool) -> None:
    assert max(ranks2.run(on_rank.accumulated)) < EXACT


@pytest.mark.parametrize("kind", [1.0, 2.0, 3.0, float("inf")])
def test_clipping_takes_the_norm_of_all_ranks_experts(ranks2: RankPool, kind: float) -> None:
    for found, expected in ranks2.run(on_rank.norm, kind):
        assert found == pytest.approx(expected, rel=1e-6)


# ---- What is refused, on every rank

DTENSORS = "got mixed torch.Tensor and DTensor"
REFUSED = {
    on_rank.wrapped_deeper: DTENSORS,
    on_rank.fsdp1: DTENSORS,
    on_rank.fsdp2_of_shards: "Error",  # torch's own check of meshes; its words differ by version
    on_rank.torch_clip: DTENSORS,
    on_rank.torch_clip_one_by_one: DTENSORS,
    on_rank.torch_clip_value: DTENSORS,
    on_rank.foreach_optimizer: DTENSORS,
    on_rank.foreach_average: DTENSORS,
    on_rank.one_vector: DTENSORS,
    on_rank.safetensors_file: "data pointer",
    on_rank.whole_parameter: "ConfigurationError: weight of Experts is sharded",
    on_rank.parametrised: "ConfigurationError: weight of Experts is sharded",
    on_rank.pruned: "TypeError: cannot assign",
    on_rank.weight_norm: "Error",
    on_rank.whole_call: "ConfigurationError: A Parameter stands where a shard",
    on_rank.wrong_shape: "size mismatch for mlp.bias",
}


@pytest.mark.parametrize("use", REFUSED, ids=lambda use: use.__name__)
def test_what_would_take_a_shard_for_the_whole_is_refused(
    ranks2: RankPool, use: Callable[..., None]
) -> None:
    for message in ranks2.run(on_rank.refusal, use):
        assert REFUSED[use] in message


def test_an_optimizer_made_before_sharding_says_so(ranks2: RankPool) -> None:
    for message in ranks2.run(on_rank.early_optimizer):
        assert "Create the optimizer" in message
        assert "after shard_experts" in message


def test_data_parallelism_of_groups_of_other_sizes_is_refused(ranks4: RankPool) -> None:
    for message in ranks4.run(on_rank.uneven_groups_in_ddp):
        assert "shared by the ranks [0, 1], [2], [3]" in message


def test_accelerate_is_told_what_to_do_instead(ranks2: RankPool) -> None:
    pytest.importorskip("accelerate")
    for message in ranks2.run(on_rank.with_accelerator):
        assert "docs/sharding.md" in message


# ---- Saving and loading


def test_experts_are_made_whole_again(ranks2: RankPool, tmp_path: Path) -> None:
    for differences in ranks2.run(saving.unsharded):
        assert max(differences) < 1e-6
    files, _ = ranks2.run(saving.unsharded_pretrained, tmp_path)
    assert "model.safetensors" in files


def test_dcp_saves_the_whole_and_loads_into_any_number_of_ranks(
    ranks2: RankPool, ranks4: RankPool, tmp_path: Path
) -> None:
    ranks2.run(saving.saved, tmp_path / "dcp")
    for pool, sharded in ((ranks2, True), (ranks4, True), (ranks2, False)):
        for weights, moments in pool.run(saving.loaded, tmp_path / "dcp", sharded):
            assert weights < EXACT
            assert moments < EXACT


def test_the_full_state_dict_has_the_names_and_values_of_the_whole_model(ranks2: RankPool) -> None:
    (names, difference), (others, _) = ranks2.run(saving.gathered)
    assert set(names) == {"inner.weight", "inner.bias", "mlp.weight", "mlp.bias", "scale"}
    assert difference == 0
    assert others == []


def test_gathering_on_one_rank_alone_is_an_error(ranks2: RankPool) -> None:
    message, _ = ranks2.run(saving.gathered_by_one)
    assert "rank(s) [1]" in message
    assert "on every rank" in message


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_whole_state_dict_is_cut(ranks2: RankPool, assign: bool) -> None:
    assert ranks2.run(saving.given_whole, assign) == [0.0, 0.0]


def test_another_ranks_file_is_refused(ranks2: RankPool, tmp_path: Path) -> None:
    own, other = ranks2.run(saving.given_anothers, tmp_path / "rank0.pt")
    assert own == ""
    assert "mlp.weight holds the rows of another rank" in other
    assert "full_state_dict" in other


def test_each_rank_may_save_and_load_its_own_file(ranks2: RankPool, tmp_path: Path) -> None:
    assert ranks2.run(saving.given_its_own, tmp_path) == [0.0, 0.0]


# ---- What a module can do


@pytest.mark.parametrize("decay", [None, 0.9], ids=["mean", "exponential"])
def test_averages_of_weights(ranks2: RankPool, decay: float | None) -> None:
    assert max(ranks2.run(saving.averaged, decay)) < 1e-6


def test_casts_and_copies_stay_shards(ranks2: RankPool) -> None:
    assert max(ranks2.run(saving.cast)) < 1e-12


# ---- transformers and PEFT


@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",
        "gpt_oss",
        pytest.param("mixtral", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", marks=pytest.mark.slow),
    ],
)
def test_save_pretrained_streams(ranks2: RankPool, tmp_path: Path, family: str) -> None:
    """Under the names that transformers writes, whatever the layout of the experts there."""
    (difference, names, wanted), _ = ranks2.run(saving.streamed, tmp_path, family)
    assert names == wanted
    assert difference == 0.0


def test_a_save_that_is_cut_short_leaves_the_checkpoint_before(
    ranks2: RankPool, tmp_path: Path
) -> None:
    assert ranks2.run(saving.killed, tmp_path) == [0.0, 0.0]


@pytest.mark.slow
def test_saving_takes_no_more_memory_than_a_table(ranks2: RankPool, tmp_path: Path) -> None:
    """The largest one's; the model's experts are twelve times as much."""
    for grown, largest in ranks2.run(saving.memory, tmp_path):
        assert grown <= largest


def test_save_pretrained_writes_the_whole_model(ranks2: RankPool, tmp_path: Path) -> None:
    assert ranks2.run(saving.pretrained, tmp_path) == [0.0, 0.0]


def test_lora_beside_sharded_experts_trains_and_on_them_is_refused(ranks2: RankPool) -> None:
    pytest.importorskip("peft")
    for difference, message in ranks2.run(saving.adapted):
        assert difference < EXACT
        assert "ConfigurationError: down_proj of" in message
        assert "is sharded" in message
