"""What a fine-tune changed, shipped without the rest: a folder of files as a delta over another of the same base model.

A device that holds the base's folder gets the new one, byte for byte, from the delta and what it has.
"""

from qalora.delta.applying import Applied, apply_delta, chosen_files
from qalora.delta.making import WrittenDelta, check_base, write_delta

__all__ = ["Applied", "WrittenDelta", "apply_delta", "check_base", "chosen_files", "write_delta"]
