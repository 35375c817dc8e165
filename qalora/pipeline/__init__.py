"""A whole pipeline from one file: quantize, train, fold, export, verify, package; each step done once.

The steps are what the commands do, by the same records of options; see `qalora.options`.
"""

from qalora.pipeline.recipe import read_recipe
from qalora.pipeline.running import Row, run
from qalora.pipeline.watching import Watch

__all__ = ["Row", "Watch", "read_recipe", "run"]
