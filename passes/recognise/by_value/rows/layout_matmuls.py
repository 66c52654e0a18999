"""Rules for matmuls: rows with their experts' table, rows or tables with routing values, and rows
with a matrix that all experts share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from moe_fx.graph.contraction import Contraction
from moe_fx.graph.nodes import same, shape
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.recognise.by_value.rows.layout import Laid, Layout, product

aten = torch.ops.aten
ops = torch.ops.moe_fx


class LayoutMatmuls(Layout):
    """See `row_layout.py` for the contract of a rule."""

    def _grouped(self, node: Node) -> Laid:
        rows, table = (self.laid[n] for n in node.args[:2])  # type: ignore[index]
        if rows.kind != "rows" or self.laid[node.args[2]].kind != "route":  # type: ignore[index]
            raise Refusal("the grouped matmul's rows are not the dispatched tokens", node, 3)
        if table.kind != "constant":
            raise Refusal("the grouped matmul's weight is not one matrix per expert", node, 3)
        weight = self.table(node.args[1], 0, [1, 2])  # type: ignore[arg-type]
        self.met.append(node)
        product = self.call(ops.grouped_mm.default, rows.node, weight, self.body.offsets)
        return Laid("rows", rows.features, product, True)

    def _contract(self, node: Node, found: Contraction) -> Laid:
        laid = [self.laid[n] for n in found.operands]
        kinds = [x.kind for x in laid]
        if "rows" in kinds and kinds.count("rows") == 1:
            at = kinds.index("rows")
            if kinds[1 - at] == "route":
                return self._dispatched(node, found, at, laid)
            result = self._multiplied(node, found, at, laid)
        elif "route" in kinds and "constant" in kinds:
            return self._picked(node, found, kinds.index("constant"))
        else:
            raise Refusal(f"{node.target} of {' and '.join(kinds)}", node, 3)
        if found.bias is not None:
            result = self._biased(node, found.bias, result)
        return result

    def _dispatched(self, node: Node, found: Contraction, at: int, laid: Sequence[Laid]) -> Laid:
        """Rows times routing values: summed along rows, rows go to their places."""
        rows, letters = laid[at], found.letters[at]
        feature = {x for x, is_feature in zip(letters, rows.features, strict=True) if is_feature}
        if feature & set(found.letters[1 - at]) or not feature <= set(found.out):
            raise Refusal("routing values differ between the features of a row", node, 3)
        if rows.met:
            raise Refusal("the experts' rows are summed", node, 4)
        order = [letters.index(x) for x in found.out if x in feature]
        reordered = self.reordered(
            rows, [*(d for d in range(len(letters)) if not rows.features[d]), *order]
        )
        return Laid("rows", tuple(x in feature for x in found.out), reordered.node, rows.met)

    def _picked(self, node: Node, found: Contraction, at: int) -> Laid:
        """A table times one-hot ids: each row's own entry."""
        table, letters = found.operands[at], found.letters[at]
        summed = [x for x in letters if x in found.letters[1 - at] and x not in found.out]
        if len(summed) != 1 or set(letters) & set(found.letters[1 - at]) != set(summed):
            raise Refusal(f"{table} is multiplied by routing values in a way not known", node, 3)
        order = [letters.index(x) for x in found.out if x in letters]
        features = tuple(x in letters for x in found.out)
        return Laid("table", features, self.table(table, letters.index(summed[0]), order))

    def _multiplied(self, node: Node, found: Contraction, at: int, laid: Sequence[Laid]) -> Laid:
        rows, other = laid[at], laid[1 - at]
        letters, theirs = found.letters[at], found.letters[1 - at]
        feature = [x for x, is_feature in zip(letters, rows.features, strict=True) if is_feature]
        summed = [x for x in feature if x in theirs and x not in found.out]
        if any(x not in found.out and x not in summed for x in {*letters, *theirs}):
            raise Refusal("the matmul sums over rows", node, 3)
        if summed != feature:
            raise Refusal("the matmul sums over a part of a row's features", node, 3)
        if other.kind == "buffer":
            raise Refusal("rows are multiplied by an empty buffer", node, 3)
        assert rows.node is not None
        operand = found.operands[1 - at]
        size_of = dict(zip(theirs, shape(operand), strict=True))
        new = [x for x in found.out if x in theirs and x not in letters]
        if other.kind == "constant":
            expert = self._expert_letter(theirs, letters, rows, size_of, new)
            if expert is None:
                return self._shared(node, found, at, rows, feature)
            new = [x for x in new if x != expert]
            order = [theirs.index(x) for x in (*summed, *new)]
            table = self.table(operand, theirs.index(expert), order)
        else:
            expert = None
            outs = [x for x, is_feature in zip(theirs, other.features, strict=True) if is_feature]
            new = [x for x in new if x in outs]
            if sorted(outs) != sorted([*summed, *new]):
                raise Refusal("a table's features meet rows in a way not known", node, 3)
            assert other.node is not None
            table = self._ordered(other.node, [0, *(outs.index(x) + 1 for x in (*summed, *new))])
        self.met.append(node)
        out_sizes = [size_of[x] for x in new]
        result = self._grouped_product(rows, table, [size_of[x] for x in summed], out_sizes)
        return Laid("rows", tuple(x in new for x in found.out), result, True)

    def _grouped_product(self, rows: Laid, table: Node, summed: list[int], out: list[int]) -> Node:
        left: Any = rows.node
        if len(summed) != 1 or len(out) != 1:
            flat = [self.num_experts, product(summed), product(out)]
            table = self.call(aten.reshape.default, table, flat)
            left = self.call(aten.reshape.default, left, [-1, product(summed)])
        result = self.call(ops.grouped_mm.default, left, table, self.body.offsets)
        if len(out) != 1:
            result = self.call(aten.reshape.default, result, [-1, *out])
        return result

    def _expert_letter(
        self, theirs: str, letters: str, rows: Laid, size_of: Mapping[str, Any], new: Sequence[str]
    ) -> str | None:
        """The letter that counts experts in a parameter that rows meet: one they have in common
        that tells rows apart, or a new one of that size; None: no experts."""
        shared = [
            x
            for x, is_feature in zip(letters, rows.features, strict=True)
            if not is_feature and x in theirs
        ]
        if shared:
            return shared[0] if len(shared) == 1 else None
        if len(theirs) < 3:
            return None
        fitting = [x for x in theirs if x in new and same(size_of[x], self.num_experts)]
        return fitting[0] if fitting and len(new) > 1 else None

    def _shared(
        self, node: Node, found: Contraction, at: int, rows: Laid, feature: Sequence[str]
    ) -> Laid:
        """A matrix that all experts share."""
        theirs = found.letters[1 - at]
        out = [x for x in found.out if x in theirs or x in feature]
        operand = self._operand(found.operands[1 - at], found.operands[1 - at].name)
        equation = f"N{''.join(feature)},{theirs}->N{''.join(out)}"
        product = self.call(aten.einsum.default, equation, [rows.node, operand])
        return Laid("rows", tuple(x in theirs for x in found.out), product, rows.met)

    def _biased(self, node: Node, bias: Node, result: Laid) -> Laid:
        laid = self.laid[bias]
        if laid.kind not in ("table", "constant"):
            raise Refusal("a matmul adds something that is no bias", node, 3)
        added, met = self._aligned(node, bias, laid, result.features, "rows")
        total = self.call(aten.add.Tensor, result.node, added)
        return Laid("rows", result.features, total, result.met or met)
