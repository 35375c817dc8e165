"""The caller's process as it was: what libraries change of it when they are imported, or load a model, is undone.

GPTQModel alone sets HF_HOME to a folder of its own, and gives the root logger a handler and a level; loading a model
draws from torch's random numbers; transformers' progress bars and log level are switched off here while it loads.
OpenVINO gives the thread a stack of its own for signals, which it frees with its last model: where another thread does
that, the stack stays set, and the next signal ends the process.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["keep_settings", "quiet"]


@contextmanager
def keep_settings() -> Iterator[None]:
    """Give back, also after an error: the environment, levels and handlers of all loggers, the filters of warnings,
    the state of the random numbers of torch, numpy and Python, and on Linux the stack for signals of this thread.

    What was imported stays imported, and torch's threads are the caller's matter.
    """
    with ExitStack() as stack:
        for save in (_environment, _logging, _random_numbers, _signal_stack):
            stack.callback(save())
        stack.enter_context(warnings.catch_warnings())
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and with errors alone in its log, which is then as it was."""
    from transformers.utils import logging as log

    utils: Any = importlib.import_module("huggingface_hub.utils")  # whose names are made when they are asked for
    level, bars, of_the_hub = log.get_verbosity(), log.is_progress_bar_enabled(), not utils.are_progress_bars_disabled()
    log.disable_progress_bar()  # and the Hub's with them
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bars that a variable of the environment forbids
            if bars:
                log.enable_progress_bar()
            if of_the_hub:
                utils.enable_progress_bars()
        if bars and not of_the_hub:
            utils.disable_progress_bars()


def _environment() -> Callable[[], None]:
    before = dict(os.environ)

    def give_back() -> None:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})

    return give_back


def _logging() -> Callable[[], None]:
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = [(one, one.level, one.propagate, one.disabled, [*one.handlers]) for one in (logging.root, *loggers)]

    def give_back() -> None:
        for one, level, propagate, disabled, handlers in before:
            if one.level != level:
                one.setLevel(level)
            one.propagate, one.disabled = propagate, disabled
            if one.handlers != handlers:
                one.handlers[:] = handlers

    return give_back


def _signal_stack() -> Callable[[], None]:
    if sys.platform != "linux":
        return lambda: None
    change = ctypes.CDLL(None).sigaltstack
    before = ctypes.create_string_buffer(24)  # stack_t: an address, flags, a size
    change(None, before)
    return lambda: change(before, None)


def _random_numbers() -> Callable[[], None]:
    ours, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def give_back() -> None:
        random.setstate(ours)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)

    return give_back
