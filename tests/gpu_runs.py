"""The device of the tests in tests/gpu: the GPU where there is one, else the CPU, where they try themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: cuBLAS is then reproducible

import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def no_waits() -> Iterator[None]:
    """Let every wait for the GPU raise."""
    before = torch.cuda.get_sync_debug_mode() if DEVICE == "cuda" else 0
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode(before)


class ForwardWithoutWaits:
    """A probe's forward in which, from the second on, every wait for the GPU raises.

    In the first, at attach, the kind of each mask is found, which waits.
    """

    def __init__(self, call: Callable[[nn.Module, Tensor], object] = lambda model, batch: model(batch)) -> None:
        self.call = call
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Tensor) -> object:
        self.calls += 1
        if self.calls == 1:
            return self.call(model, batch)
        with no_waits():
            return self.call(model, batch)


@contextmanager
def reproducible() -> Iterator[None]:
    """Deterministic kernels, where torch has them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
