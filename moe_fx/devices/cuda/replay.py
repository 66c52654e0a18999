"""What a recorded call does, as one Python function.

A layer of few tokens takes the GPU less time than it takes the host to go through a list of steps.
So the steps are written out once: a line a launch, with the addresses and numbers that it takes. ::

    def again(inputs, empty, stream):
        t0, t1 = inputs
        p0 = t0.data_ptr()
        p1 = t1.data_ptr()
        t2 = empty(c0, c1, c2)
        p2 = t2.data_ptr()
        c3(4, 1, 1, stream, c4, c5, None, None, None, p0, p1 + 256, p2, 16)
        return (t2,)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Code", "Function"]

Function = Callable[[Sequence[Tensor | None], Callable[..., Tensor], int], tuple[Tensor, ...]]
"""``(inputs, empty, stream)``, `moe_fx.compat.empty_on` and torch's current one, to the results."""


class Code:
    """Lines of the function. Slots are tensors ``t<slot>`` and their addresses ``p<slot>``."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.read: set[int] = set()  # inputs of which the address is
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}

    def constant(self, value: Any) -> str:
        """How the function says ``value``."""
        if value is None or type(value) in (bool, int):
            return repr(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def address(self, slot: int, offset: int) -> str:
        if slot < self.inputs:
            self.read.add(slot)
        return f"p{slot} + {offset}" if offset else f"p{slot}"

    def line(self, text: str) -> None:
        self.lines.append(text)

    def becomes(self, slot: int, made: str) -> None:
        self.line(f"t{slot} = {made}")
        self.line(f"p{slot} = t{slot}.data_ptr()")

    def function(self, results: Sequence[str]) -> Function:
        given = f"({''.join(f't{slot}, ' for slot in range(self.inputs))}) = inputs"
        addresses = [f"p{slot} = t{slot}.data_ptr()" for slot in sorted(self.read)]
        body = [
            given,
            *addresses,
            *self.lines,
            f"return ({''.join(f'{each}, ' for each in results)})",
        ]
        source = "def again(inputs, empty, stream):\n" + "".join(f"    {line}\n" for line in body)
        namespace = dict(self.constants)
        exec(compile(source, "<moe_fx: a recorded call>", "exec"), namespace)
        function: Function = namespace["again"]
        return function
