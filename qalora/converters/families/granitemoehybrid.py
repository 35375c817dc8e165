"""Granite 4 without experts and Mamba, the 350M, 1B and micro: a Granite 3 whose MLP is called a shared one."""

from qalora.converters.families.record import Variant

__all__ = ["VARIANT"]

VARIANT = Variant(
    model_type="granitemoehybrid",
    family="granite",
    which="without experts and Mamba",
    only={"num_local_experts": 0, "position_embedding_type": "rope"},
    lists={"layer_types": ("attention", "full_attention")},
    keys={"intermediate_size": "shared_intermediate_size"},
    dropped=(
        "layer_types",
        "layers_block_type",
        "mamba_",
        "num_experts_per_tok",
        "num_local_experts",
        "output_router_logits",
        "position_embedding_type",
        "router_aux_loss_coef",
        "shared_intermediate_size",
        "time_step_",
    ),
    modules={
        "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
        "shared_mlp.output_linear": ("mlp.down_proj",),
    },
)
