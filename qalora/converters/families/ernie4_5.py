"""ERNIE 4.5, dense: a Llama whose rotary positions turn neighbours, with heads of a size of their own."""

from qalora.converters.families.record import ATTENTION, DEFAULTS, MLP, Family, LlamaCpp, MlxLm

__all__ = ["FAMILY"]

FAMILY = Family(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    biased={"use_bias": (*ATTENTION, *MLP)},
    defaults={
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "use_bias": False,
        "tie_word_embeddings": True,
    },
    interleaved=True,
    gguf=LlamaCpp(architecture="ernie4_5", ropes=("default",)),
    mlx=MlxLm(
        defaults={"rope_theta": None, "tie_word_embeddings": None},
        wanted=("use_bias",),
        unread=("rope_scaling",),
        ordered=True,
    ),
    tiny={"head_dim": 32},
)
