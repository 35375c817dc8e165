"""A run in several processes: `torchrun --nproc-per-node N -m qalora train ...`, or `accelerate launch` the same.

Both launchers tell each process its place in the environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
Processes talk through torch.distributed: gloo between CPUs, NCCL between GPUs, of which each process takes the one of
its LOCAL_RANK.

Every process reads the model and the data itself and holds the same adapter. The sequences of a step, and of an
evaluation, are shared out; the gradients of the summed loss, each divided by the tokens of the whole step, are summed
over all processes, and each makes the same optimizer step. So the number of processes is like the number of threads: it
decides how long a run takes, and in which order numbers are summed, and not what is trained. The first process alone
writes.

torch's DistributedDataParallel is not used. Its worth is to send gradients while others are still computed, and here
there are few: the adapter's alone, two million numbers of a model of 135 million, which go in one flat piece. It would
give the mean of the processes' means, which is not the mean over tokens where processes have different numbers of them,
wants a forward in every process in every step, which a share of no sequences does not have, and wraps the module, whose
parts the loop calls itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from qalora.errors import InputError, first_line, shown

__all__ = ["ALONE", "Processes", "joined", "launched"]

SENTENCE = 1000
"""Bytes of a text that processes tell each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """The processes of a run, as one of them sees them: its number `rank`, from 0, of `size`."""

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> Tensor:
        """Which of `count` sequences are this process's, int64: runs of equal length up to one, perhaps none."""
        return torch.tensor_split(torch.arange(count), self.size)[self.rank]

    def sum(self, value: float) -> float:
        """The sum of each process's number, in float64; the same in all."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=_device())
        _call(dist.all_reduce, total)
        return float(total)

    def sum_tensors(self, tensors: Collection[Tensor]) -> None:
        """Make each of some float32 tensors the sum of all processes', in one piece."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        _call(dist.all_reduce, flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Every process's rows [n, ...], as many in each, one after the other; itself in one process."""
        if self.size == 1:
            return rows
        gathered = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        if rows.is_cpu:  # gloo gathers into memory of its own, of the whole size, and copies it
            parts = torch.split(gathered, len(rows))
            parts[self.rank].copy_(rows)
            for rank, part in enumerate(parts):
                _call(dist.broadcast, part, rank)
        else:  # the new name of torch 2.13, which warns of the old one
            _call(getattr(dist, "all_gather_single", dist.all_gather_into_tensor), gathered, rows)
        return gathered

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that every process runs, and none leaves before all are through it.

        An error in one of them is raised in all: its own there, an InputError of the same sentence elsewhere.
        """
        if self.size == 1:
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        sentences = self._gather("" if failed is None else str(failed) or type(failed).__name__)
        if failed is not None:
            raise failed
        for sentence in sentences:
            if sentence:
                raise InputError(sentence)

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """A block in which torch sends something by itself: an end of another process is said as elsewhere."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise _lost(error) from error

    def check_same(self, facts: Mapping[str, object]) -> None:
        """InputError that names the first of some facts (their text, shortened) that is not the same in all."""
        if self.size == 1:
            return
        for name, value in facts.items():
            texts = [text[:100] for text in self._gather(str(value))]
            other = next((text for text in texts if text != texts[0]), None)
            if other is not None:
                raise InputError(f"{name}: expected the same in every process, got {texts[0]} and {other}")

    def heard(self, text: str) -> str:
        """What the first process says, shortened, in all of them, which wait for it."""
        return text if self.size == 1 else self._gather(text)[0]

    def speaks(self) -> bool:
        """Whether this process is the first to ask: it says what went wrong, and the others nothing."""
        if self.store is None:
            return self.first
        try:
            return bool(self.store.add("qalora/told", 1) == 1)
        except RuntimeError:  # who kept the store has ended
            return False

    def _gather(self, text: str) -> list[str]:
        data = text.encode("utf-8")[:SENTENCE]
        mine = torch.zeros(SENTENCE, dtype=torch.uint8)
        mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        mine = mine.to(_device())
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        _call(dist.all_gather, parts, mine)
        return [bytes(part.tolist()).rstrip(b"\0").decode("utf-8", "ignore") for part in parts]


ALONE = Processes()
"""The one process of a run without a launcher."""


def launched() -> int:
    """How many processes a launcher started, or a caller of torch.distributed; InputError as `joined` raises it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return _number("WORLD_SIZE", 1)


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes that a launcher started, or ALONE; those of torch.distributed where a caller has set it up.

    device  of TrainOptions: on "auto" or "cuda" each process takes the GPU of its LOCAL_RANK.

    Raises InputError for an environment that is not as launchers make it, too few GPUs, and processes that do not meet.
    """
    if dist.is_available() and dist.is_initialized():
        yield Processes(rank=dist.get_rank(), size=dist.get_world_size())
        return
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        yield ALONE
        return
    if not dist.is_available():
        raise InputError(f"WORLD_SIZE is {size}, and this build of torch has no torch.distributed")
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        _take_gpu(device, _number("LOCAL_RANK", 0))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"the {size} processes of this run did not meet: {reason}") from error
    try:
        yield Processes(rank=rank, size=size, store=store)
    finally:
        dist.destroy_process_group()


def _number(name: str, least: int) -> int:
    text = os.environ.get(name, str(least))
    if not text.isdecimal():
        raise InputError(f"{name} in the environment", expected="a number", got=shown(text))
    return int(text)


def _take_gpu(device: str, local: int) -> None:
    if ":" in device:
        raise InputError(field="device", expected="cuda, of which each process takes one", got=shown(device))
    count = torch.cuda.device_count()
    if local >= count:
        raise InputError("processes of this machine", expected=f"{count} at most, one a GPU", got=f"number {local + 1}")
    torch.cuda.set_device(local)


def _device() -> torch.device:
    """Where what processes send must lie."""
    gpus_alone = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if gpus_alone else torch.device("cpu")


def _call(collective: Callable[..., object], *tensors: object) -> None:
    try:
        collective(*tensors)
    except RuntimeError as error:
        raise _lost(error) from error


def _lost(error: RuntimeError) -> InputError:
    reason = first_line(error)
    return InputError(f"another process of this run has ended ({reason[:200]})", todo="continue with `resume`")
