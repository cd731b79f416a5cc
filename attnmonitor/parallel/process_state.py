"""State of the process that belongs to the user's program: random generators, and what an import may change."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["first_import", "random_state", "restored_random_state"]


def random_state() -> tuple[bytes, ...]:
    """Return the state of the random number generators of torch, ``random`` and numpy, for a comparison."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    kind, keys, *rest = np.random.get_state()
    return (
        *(state.numpy().tobytes() for state in (torch.get_rng_state(), *devices)),
        repr(random.getstate()).encode(),
        np.asarray(keys).tobytes(),
        repr((kind, rest)).encode(),
    )


@contextmanager
def restored_random_state() -> Iterator[None]:
    """On exit, restore the random number generators of torch, ``random`` and numpy."""
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def first_import(*modules: str) -> Iterator[None]:
    """Import libraries in this context, in the middle of the user's run; on exit their side effects are undone.

    Importing ``rich`` draws from ``random``; other libraries change warnings filters, logging or hooks. Random
    generators, warnings filters, the root logger, ``sys.excepthook``, ``sys.stdout`` and ``sys.stderr`` are restored.

    Args:
        modules: What is imported; where all of it has been imported before, nothing is saved and restored.
    """
    if all(name in sys.modules for name in modules):
        yield
        return
    root = logging.getLogger()
    handlers, level, disabled = [*root.handlers], root.level, root.manager.disable
    streams = sys.stdout, sys.stderr, sys.excepthook
    with restored_random_state(), warnings.catch_warnings():
        try:
            yield
        finally:
            sys.stdout, sys.stderr, sys.excepthook = streams
            root.handlers[:] = handlers
            root.setLevel(level)
            root.manager.disable = disabled
