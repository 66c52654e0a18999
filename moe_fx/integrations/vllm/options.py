"""The options of the pass in vLLM."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_fx.errors import ConfigurationError

ENVIRONMENT = "MOE_FX_VLLM_OPTIONS"
"""Environment variable with options as JSON, for ``moe_fx.vllm_pass``."""


class VllmOptions(BaseModel):
    """strategy: how tokens and experts meet. "replicated": where every rank of the expert-parallel
        group has the same tokens, each computes its own experts' share of the results, and the
        all-reduce that follows in vLLM sums them; "alltoall": rows travel to their experts' ranks
        and back, of tokens that several ranks have each takes its part; "allgather": every rank
        gets all tokens, which must be as many on each; "auto": where ranks have different tokens
        (data parallel) "alltoall", or "allgather" if the graph will be captured; otherwise
        "replicated" on CPUs, and nothing elsewhere, where vLLM's kernels skip other ranks' experts
        by themselves.
    overlap: chunks that "alltoall" is cut into, by experts, so that it runs beside them.
    overlap_memory: as of `moe_fx.Options`.
    min_tokens: graphs that vLLM compiles for fewer tokens are left alone; not where ranks have
        different tokens, and could be in different graphs then.
    strict: a layer that is left alone is an error.
    agree_timeout: seconds to wait for the other ranks to have compiled the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["auto", "replicated", "alltoall", "allgather"] = "auto"
    overlap: Annotated[int, Field(ge=1)] = 1
    overlap_memory: float = Field(default=1.25, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    strict: bool = False
    agree_timeout: float = Field(default=300.0, gt=0)


def parse(options: Mapping[str, Any] | VllmOptions | None) -> VllmOptions:
    """None: those of the environment. Raises `ConfigurationError` naming what is wrong."""
    if isinstance(options, VllmOptions):
        return options
    source = "options of moe_fx's pass in vLLM"
    try:
        if options is None:
            source = f"environment variable {ENVIRONMENT}"
            return VllmOptions.model_validate_json(os.environ.get(ENVIRONMENT) or "{}")
        return VllmOptions(**options)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        known = json.dumps(VllmOptions().model_dump())
        raise ConfigurationError(f"{source}: {wrong}. What there is, as JSON: {known}") from None
