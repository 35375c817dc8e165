"""Training QA-LoRA adapters on integer weights, with the fold in the loop: what is trained is what ships.

options      what a user may choose; checks: what is refused before the model is opened
data         documents, tokens, blocks
documents    a document, and the account of what is learned
sources      files and datasets, known by their content
rows         a row and what it means
chat         conversations through the chat template, and where answers stand
layer        the linear layer that computes with folded, rounded minima: the exact forward
fast         the products of training steps: the base's weights, and beside them what the fold adds
lean         the other parts of a decoder in training steps
starting     the rows that A starts with, and the rank of each layer
loss         cross entropy without the whole logits
state        checkpoints
distributed  a run in several processes
sharding     the base, spread over them
interrupt    Ctrl-C waits for the step
pace         what a run says of itself
plan         what a run would train, and on what
loop         steps, held-out loss, the adapter's folder
"""

from qalora.options.train import TrainOptions
from qalora.training.checks import check_before
from qalora.training.loop import train
from qalora.training.pace import StepReport

__all__ = ["StepReport", "TrainOptions", "check_before", "train"]
