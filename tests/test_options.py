"""What the options accept, and what they say of what they do not."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moe_fx
from moe_fx.options import parse_options
from moe_fx.ranks.groups import require_group
from moe_fx.testing import RankPool


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"verfy": "off"}, "verfy: there is no such option (Did you mean verify?)"),
        ({"ep_groups": None}, "ep_groups: there is no such option (Did you mean ep_group?)"),
        ({"qqq": 1}, "qqq: there is no such option. The options are: ep_group, base"),
        ({"verify": "sometimes"}, "verify: Input should be 'off', 'compile' or 'always'"),
        ({"ep_group": None}, "init_process_group"),
        ({"ep_group": "WORLD"}, "expected a torch.distributed.ProcessGroup"),
        ({"agree_timeout": 0}, "agree_timeout: Input should be greater than 0"),
        ({"agree_timeout": math.inf}, "agree_timeout: Input should be a finite number"),
        ({"overlap_memory": math.nan}, "overlap_memory: Input should be a finite number"),
        ({"overlap_memory": True}, "overlap_memory: Input should be a valid number"),
        ({"base": "moe_fx"}, "base: moe_fx would hand its graphs to itself"),
        (
            {"overlap": True},
            "overlap: Input should be 'auto' or 'off', or a valid integer (given: True)",
        ),
        ({"overlap": "4"}, "overlap: Input should be 'auto' or 'off', or a valid integer"),
        ({"overlap": 0}, "'auto' or 'off', or greater than or equal to 1 (given: 0)"),
        ({"strict": "no"}, "strict: Input should be a valid boolean (given: 'no')"),
        ({"exchange_cores": (0, 8)}, "exchange_cores.0: Input should be greater than or equal"),
        ({"exchange_cores": (8, True)}, "exchange_cores.1: Input should be a valid integer"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(moe_fx.ConfigurationError, match=re.escape(said)):
        parse_options(options)


def test_every_wrong_option_is_named_at_once() -> None:
    with pytest.raises(moe_fx.ConfigurationError) as error:
        parse_options({"verfy": "off", "overlap": True, "base": 3})
    for name in ("verfy", "overlap", "base"):
        assert f"{name}: " in str(error.value)


def test_a_misspelt_argument_beside_the_options() -> None:
    with pytest.raises(moe_fx.ConfigurationError, match=r"takes no stratgy.*Did you mean strategy"):
        parse_options({}, unknown={"stratgy": "allgather"})


def test_numbers_as_people_write_them() -> None:
    options = parse_options({"overlap": 4, "agree_timeout": 60, "exchange_cores": [8, 16]})
    assert (options.overlap, options.agree_timeout) == (4, 60.0)
    assert options.exchange_cores == (8, 16)


def mesh_answers(rank: int) -> tuple[bool, list[str]]:
    """Whether a mesh of one dimension stands for its group, and what others are answered."""
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    tensor_parallel = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    unnamed = init_device_mesh("cpu", (1, 2))
    taken = parse_options({"ep_group": grid["ep"]}).ep_group
    ranks = dist.get_process_group_ranks(taken)
    right = ranks == [0, 1] and taken is grid.get_group("ep") is require_group(grid["ep"])
    said = []
    for mesh in (grid, tensor_parallel, unnamed):
        try:
            parse_options({"ep_group": mesh})
        except moe_fx.ConfigurationError as error:
            said.append(str(error))
    return right, said


def test_a_mesh_stands_for_its_group_if_it_has_one_dimension(ranks2: RankPool) -> None:
    for right, (named, others, unnamed) in ranks2.run(mesh_answers):
        assert right
        assert "a DeviceMesh of 2 dimensions, ('dp', 'ep'), holds more than one group" in named
        assert "pass mesh['ep'], the dimension whose ranks share the experts" in named
        assert "pass mesh['tp']" in others
        assert "give it mesh_dim_names" in unnamed
