"""The corpus itself: what is said of capture holds, and spellings of one function agree."""

from __future__ import annotations

import pytest
import torch

from tests.passes.graphs import relative_error
from tests.spellings import SPELLINGS
from tests.spellings.dump import graphs_of

# One function of the same weights each: the first is the reference.
SAME_FUNCTION = (
    (
        "classic_mixtral_stacked",
        "gpt_fast",
        "gathered_3d",
        "gathered_one_hot",
        "dense_einsum_3d",
        "dense_matmul_gather",
        "sorted_index_add",
        "sorted_index_put",
        "sorted_bincount",
        "sorted_one_hot",
        "sorted_scatter_count",
        "sorted_compared",
        "megatron_unpermute",
        "megatron_routing_map",
        "gshard",
    ),
    (
        "classic_mixtral",
        "lit_gpt",
        "mistral_inference",
        "nonzero_tokens",
        "masked_loop",
        "masked_loop_where",
        "masked_loop_gate",
        "masked_loop_stack",
        "masked_loop_per_slot",
    ),
    ("torchtitan_for_loop", "torchtitan_grouped", "torchtitan_grouped_bmm"),
    ("torchtitan_for_loop_before", "torchtitan_grouped_before"),
    ("dense_einsum", "dense_einsum_one_hot", "dense_einsum_ted"),
    ("switch_loop", "switch_loop_argmax", "switch_loop_topk", "switch_masked"),
)
DROPPING = {
    "gshard_drops": "gshard",
    "padded_slots_drops": "padded_slots",
    "switch_capacity_drops": "switch_capacity",
}


@pytest.mark.parametrize("names", SAME_FUNCTION, ids=lambda names: names[0])
def test_spellings_of_one_function_agree(names: tuple[str, ...]) -> None:
    x = SPELLINGS[names[0]].tokens()
    with torch.no_grad():
        expected = SPELLINGS[names[0]].build()(x)
        for name in names[1:]:
            spelling = SPELLINGS[name]
            found = spelling.build()(x.view(spelling.input_shape)).view_as(expected)
            assert relative_error(expected, found) < 1e-5, name


@pytest.mark.parametrize(("scarce", "ample"), DROPPING.items())
def test_scarce_capacity_drops_tokens(scarce: str, ample: str) -> None:
    x = SPELLINGS[scarce].tokens()
    with torch.no_grad():
        kept, dropped = SPELLINGS[ample].build()(x), SPELLINGS[scarce].build()(x)
    assert SPELLINGS[scarce].drops and not SPELLINGS[ample].drops
    assert relative_error(kept, dropped) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", SPELLINGS)
def test_captured_in_one_graph(name: str) -> None:
    spelling = SPELLINGS[name]
    graphs = graphs_of(spelling.build(), spelling.tokens(), fullgraph=spelling.needs_fullgraph)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["classic_mixtral", "torchtitan_for_loop", "sorted_bincount"])
def test_without_fullgraph_it_breaks(name: str) -> None:
    spelling = SPELLINGS[name]
    assert spelling.needs_fullgraph
    assert len(graphs_of(spelling.build(), spelling.tokens())) > 1
