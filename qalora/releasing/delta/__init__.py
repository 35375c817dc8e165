"""What a fine-tune changed, shipped without the rest: a release as a delta over another release of the same base model.

A device that holds the base release gets the new release, byte for byte, from the delta and what it has.
"""

from qalora.releasing.delta.applying import Applied, apply_delta, chosen_files
from qalora.releasing.delta.making import WrittenDelta, check_base, write_delta

__all__ = ["Applied", "WrittenDelta", "apply_delta", "check_base", "chosen_files", "write_delta"]
