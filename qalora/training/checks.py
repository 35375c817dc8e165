"""What of a run can be refused before its model is opened, which may mean a download."""

from __future__ import annotations

from qalora.adapter import ADAPTER_FILES
from qalora.devices import find_device
from qalora.errors import InputError
from qalora.formats.output import check_output
from qalora.options.train import TrainOptions
from qalora.training.data import check_data
from qalora.training.distributed import launched
from qalora.training.state import check_state

__all__ = ["check_before"]


def check_before(options: TrainOptions) -> None:
    """OutputError for an output that exists, or a checkpoint of an earlier run that neither resume nor force is to
    touch; InputError for data that is neither a file nor of the Hub, for a device that torch does not have here, and
    for a base that is to be spread over one process.
    """
    check_output(options.out, force=options.force, names=ADAPTER_FILES)
    if options.save_every:
        check_state(options.out, force=options.force or options.resume)
    if options.shard and launched() == 1:
        raise InputError(
            field="shard",
            expected="several processes, to spread the base over",
            got="one",
            todo="start them with torchrun --nproc-per-node 2 -m qalora train ...",
        )
    check_data(options.data)
    find_device(options.device)
