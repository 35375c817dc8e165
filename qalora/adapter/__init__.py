"""QA-LoRA adapters: records, conventions, exact rewriting, and PEFT folders read and written.

`records` holds the mathematics and the three conventions, `rewriting` the exact conversions, `peft_config` what PEFT's
config means, `keys` what tensors are called, `saved` and `saving` what an adapter brings whole, `reading` and `writing`
the folders. `qalora.folding` puts an adapter into a model's minima.
"""

from qalora.adapter.reading import given_adapter, open_adapter, read_adapter
from qalora.adapter.records import CONVENTIONS, Adapter, AdapterLayer, Convention, convention_factor
from qalora.adapter.rewriting import convert, repool, to_plain_lora
from qalora.adapter.saved import SavedTensors, carry, check_plain
from qalora.adapter.writing import ADAPTER_FILES, adapter_sizes, write_adapter

__all__ = [
    "ADAPTER_FILES",
    "CONVENTIONS",
    "Adapter",
    "AdapterLayer",
    "Convention",
    "SavedTensors",
    "adapter_sizes",
    "carry",
    "check_plain",
    "convention_factor",
    "convert",
    "given_adapter",
    "open_adapter",
    "read_adapter",
    "repool",
    "to_plain_lora",
    "write_adapter",
]
