"""moe_fx's costs as Inductor's scheduler asks for them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.fx import Graph

import moe_fx
from moe_fx.cost.link import calibrate
from moe_fx.ranks.groups import require_group
from moe_fx.testing import RankPool

aten = torch.ops.aten


def estimates(rank: int) -> tuple[float | None, float | None, float | None, float]:
    """Milliseconds of an exchange of 1 MiB, a product and an addition; and of the exchange as the
    measured link says."""
    group = require_group(dist.group.WORLD)
    estimate = moe_fx.inductor_runtime_estimation(group, "cpu")
    graph = Graph()
    rows = graph.placeholder("rows")
    rows.meta["val"] = torch.empty(512, 512)
    splits = [256, 256]
    exchange = graph.call_function(
        torch.ops._c10d_functional.all_to_all_single.default,
        (rows, splits, splits, group.group_name),
    )
    product = graph.call_function(aten.mm.default, (rows, rows))
    added = graph.call_function(aten.add.Tensor, (rows, rows))
    for node in (exchange, product, added):
        node.meta["val"] = rows.meta["val"]
    link = calibrate(group, torch.device("cpu"))
    expected = 1e3 * (link.latency + link.busy * rows.meta["val"].nbytes / 2)
    return estimate(exchange, None), estimate(product, None), estimate(added, None), expected


def test_exchanges_and_products_cost_what_was_measured(ranks2: RankPool) -> None:
    for exchange, product, added, expected in ranks2.run(estimates):
        assert exchange == expected
        assert product is not None and 0 < product < 1000
        assert added is None
