"""What of a run can be refused before its model is opened, which may mean a download."""

from __future__ import annotations

from qalora.adapter import ADAPTER_FILES
from qalora.devices import find_device
from qalora.formats.output import check_output
from qalora.options.train import TrainOptions
from qalora.training.data import check_data
from qalora.training.state import check_state

__all__ = ["check_before"]


def check_before(options: TrainOptions) -> None:
    """OutputError for an output that exists, or a checkpoint of an earlier run that neither resume nor force is to
    touch; InputError for data that is neither a file nor of the Hub, and for a device that torch does not have here.
    """
    check_output(options.out, force=options.force, names=ADAPTER_FILES)
    if options.save_every:
        check_state(options.out, force=options.force or options.resume)
    check_data(options.data)
    find_device(options.device)
