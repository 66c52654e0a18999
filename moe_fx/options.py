"""The options of ``torch.compile(model, backend="moe_fx", options={...})``, typed and validated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch.distributed as dist
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from moe_fx.compat import inductor_mode
from moe_fx.errors import ConfigurationError
from moe_fx.plan import PADDED
from moe_fx.ranks.groups import as_group
from moe_fx.ranks.waiting import TIMEOUT
from moe_fx.suggest import did_you_mean
from moe_fx.wrong_options import describe

Verification = Literal["off", "compile", "always"]
Overlap = Literal["auto", "off"]
Strategy = Literal[
    "auto", "alltoall", "padded_alltoall", "allgather", "direct", "mc2", "gather_weights"
]
Overflow = Literal["error", "drop"]
Lower = Literal["auto", "off", "npu", "cuda"]

ORDERS_LATER = ("inductor",)
"""Base compilers that call `moe_fx.bases.inductor.OrderPass` on the graphs they run, backwards as
well."""


class Options(BaseModel):
    """What the backend and `moe_fx.explain` accept.

    ep_group: the expert-parallel group of a *replicated* program, or a `DeviceMesh` of one
        dimension: its group. A *gathered* program (`moe_fx.shard_experts`) brings its own. Without
        either, MoE layers stay on one device.
    base: the compiler that gets the rewritten graph: "inductor", "npugraph_ex" or "torchair" (both
        of torch_npu: docs/ascend.md), "aot_eager", "eager", or any other registered torch.compile
        backend.
    mode: of "inductor": as torch.compile's ``mode``, which it refuses beside ``options``:
        "reduce-overhead", "max-autotune", ... CUDA graphs are made of a graph only if nothing in it
        makes the host wait for the device (`moe_fx.plan.ExchangePlan.host_sync`).
    base_options: options for that compiler: Inductor's ``options``, npugraph_ex's ``options``,
        attributes of torchair's ``CompilerConfig`` by their dotted names.
    lower: "auto": on an NPU make ops of the device of the dialect ops, on CUDA fuse the experts of
        local layers and of "direct"; "off": neither (the exchange of "direct" is kernels all the
        same); "npu": as on an NPU wherever the graph is, for tests with
        `moe_fx.devices.ascend.reference`; "cuda": fuse local layers' experts as on CUDA, wherever
        the graph runs.
    exchange_cores: (AI cores, vector cores) that ops on the exchange's stream may use on an NPU.
    verify: compare each region with its replacement by value: "off"; "compile": when a graph is
        compiled, equal layers once; "always": every layer.
    strict: a layer that may have been missed (`Report.missed`), or none at all, is an error.
    strategy: how tokens and experts meet (`moe_fx.plan.ExchangePlan`); "auto": what costs least of
        "alltoall" and, with even_tokens, "allgather"; on an NPU, with even_tokens, "mc2" for as few
        tokens as it takes; on GPUs that write to each other's memory "direct", unless ``overlap``
        is a number above 1. The others only if asked for.
    even_tokens: a promise that in every step all ranks have the same number of tokens, checked when
        the graph runs: lets "auto" take "allgather" too. Asking for a strategy that needs it is to
        promise it.
    capacity_factor: of "padded_alltoall" and "allgather": rows a rank has room for, over the mean;
        None: room for all that can come.
    on_overflow: what happens to rows that find no room: "error", or "drop": those of the last
        tokens are left out, which changes results.
    overlap: into how many chunks the exchange is cut so that it runs beside the experts: a number,
        "auto" (as the cost model says), or "off" (one, waited for at once). On GPUs a number is the
        most: no more are planned than pay, decided once for all layers of a kind, and the report
        has a note where there are fewer.
    overlap_memory: how much more memory than in the captured order the results alive at once may
        take for the sake of overlap, as a factor.
    agree_timeout: seconds to wait for the other ranks to have compiled the same plans.
    progress: a line for each compiled graph on standard error, if that is a terminal: the layers
        found, the plan, and the seconds it took; on rank 0 alone. Otherwise the log of moe_fx has
        it, at level INFO.
    exchange_timeout: seconds that an exchange waits for a rank that does not come, before it is
        `RankMissing` on every rank that waits; the group's own timeout, if that is shorter.
    on_report: called with the `moe_fx.Report` of each compiled graph.
    """

    # Strict: True is no number of chunks and "no" is no bool.
    model_config = ConfigDict(
        arbitrary_types_allowed=True,
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
    )

    ep_group: Any = Field(default=None, repr=False)
    base: str = "inductor"
    mode: str | None = None
    base_options: Mapping[str, Any] = Field(default_factory=dict)
    lower: Lower = "auto"
    exchange_cores: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None, strict=False
    )
    verify: Verification = "compile"
    strict: bool = False
    strategy: Strategy = "auto"
    even_tokens: bool = False
    capacity_factor: float | None = Field(default=None, gt=0)
    on_overflow: Overflow = "error"
    overlap: Overlap | Annotated[int, Field(ge=1)] = "auto"
    overlap_memory: float = Field(default=1.25, ge=1)
    agree_timeout: float = Field(default=300.0, gt=0)
    progress: bool = True
    exchange_timeout: float = Field(default=TIMEOUT, gt=0)
    on_report: Callable[[Any], None] | None = Field(default=None, repr=False)

    @field_validator("base")
    @classmethod
    def _is_another(cls, base: str) -> str:
        if base == "moe_fx":
            raise ValueError(
                "moe_fx would hand its graphs to itself. base is the compiler that gets them, such "
                "as 'inductor'"
            )
        return base

    @field_validator("mode")
    @classmethod
    def _is_mode(cls, mode: str | None, info: ValidationInfo) -> str | None:
        base = info.data.get("base")
        if mode in (None, "default"):
            return None
        if base != "inductor":
            raise ValueError(f"is for base='inductor', not {base!r}")
        try:
            inductor_mode(mode)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        return mode

    @field_validator("capacity_factor")
    @classmethod
    def _has_capacity(cls, factor: float | None, info: ValidationInfo) -> float | None:
        strategy = info.data.get("strategy")
        if factor is not None and strategy not in PADDED:
            raise ValueError(f"is for strategy={' or '.join(map(repr, PADDED))}, not {strategy!r}")
        return factor

    @field_validator("on_overflow")
    @classmethod
    def _can_overflow(cls, on_overflow: str, info: ValidationInfo) -> str:
        if on_overflow == "drop" and info.data.get("capacity_factor") is None:
            raise ValueError("nothing overflows without a capacity_factor")
        return on_overflow

    @field_validator("ep_group")
    @classmethod
    def _is_group(cls, group: Any) -> Any:
        if group is None and dist.is_initialized():
            return None
        if group is None:
            raise ValueError(
                "is None, and torch.distributed is not initialised: call init_process_group() "
                "first (dist.group.WORLD is None before), or leave ep_group out to use one device"
            )
        return as_group(group)


def parse_options(
    options: Mapping[str, Any] | Options | None,
    mode: str | None = None,
    unknown: Mapping[str, Any] | None = None,
) -> Options:
    """Validated `Options`; raises `ConfigurationError` naming each option that is wrong. mode,
    unknown: what torch.compile gives beside the options."""
    if unknown:
        close = "".join(did_you_mean(name, Options.model_fields) for name in sorted(unknown))
        raise ConfigurationError(
            f"moe_fx takes no {', '.join(sorted(unknown))}: only options={{...}} or mode=. {close}"
            f"The options are: {', '.join(Options.model_fields)}; see moe_fx.Options."
        )
    if isinstance(options, Options):
        if mode is None:
            return options
        options = dict(options)
    given = dict(options or {})
    if mode is not None:
        if given.get("mode") not in (None, mode):
            raise ConfigurationError(f"mode={mode!r} and the option mode={given['mode']!r} differ.")
        given["mode"] = mode
    try:
        return Options(**given)
    except ValidationError as error:
        known = ", ".join(Options.model_fields)
        raise ConfigurationError(
            f"moe_fx options are not valid: {describe(error, Options.model_fields)}. The options "
            f"are: {known}; see moe_fx.Options."
        ) from None
