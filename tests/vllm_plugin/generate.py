"""Generate with vLLM in this process: ``python -m tests.vllm_plugin.generate JSON``.

JSON: model (folders, one after the other), args (for ``vllm.LLM``), piecewise (compile as vLLM does
where it has GPUs). Prints one line, ``TOKENS`` and what was generated.
"""

from __future__ import annotations

import json
import sys
from typing import Any

PROMPTS = [[3 + 7 * i + 5 * j for j in range(5 + i)] for i in range(3)]
LENGTH = 8
LIMITS = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64}


def main(request: dict[str, Any]) -> None:
    arguments = dict(request.get("args", {}))
    if request.get("piecewise"):
        keep_compile_mode()
        arguments["worker_cls"] = "tests.vllm_plugin.worker.OpaqueWorker"
    tokens = [generated(model, arguments) for model in request["model"]]
    print("TOKENS", json.dumps(tokens), flush=True)


def generated(model: str, arguments: dict[str, Any]) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, skip_tokenizer_init=True, dtype="float32", **LIMITS, **arguments)
    sampling = SamplingParams(
        temperature=0, max_tokens=LENGTH, min_tokens=LENGTH, ignore_eos=True, detokenize=False
    )
    prompts: Any = [{"prompt_token_ids": ids} for ids in PROMPTS]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def keep_compile_mode() -> None:
    """On CPUs vLLM compiles whole graphs, with Inductor alone; here as elsewhere: piecewise, with
    its pass manager."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform

    before = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: Any, config: Any) -> None:
        before(config)
        compilation = config.compilation_config
        compilation.mode = CompilationMode.VLLM_COMPILE
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        compilation.compile_sizes = []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
