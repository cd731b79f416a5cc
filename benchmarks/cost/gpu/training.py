"""What one sample in 100 steps adds to training, beside the histograms of gradients that `wandb.watch` takes."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor import AttentionMonitor
from benchmarks.cost.gpu.clock import host_and_device
from benchmarks.cost.gpu.session import Rows
from benchmarks.cost.gpu.shapes import shapes_for

__all__ = ["GradientHistograms", "training"]

STEPS = 100
NUM_BINS = 64


class GradientHistograms:
    """The mechanism of `wandb.watch`: hooks on all parameters, a histogram of each gradient every so many backwards.

    Written anew after its operations, for a machine without wandb: what is found is kept, not sent.

    Args:
        model: The model.
        every: Backward passes between two histograms of a parameter, 1,000 by wandb's default.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self._every = every
        self._passes: dict[str, int] = {}
        self._hooks = ExitStack()
        self.found: dict[str, tuple[list[float], list[float]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._hooks.callback(parameter.register_hook(partial(self._see, name)).remove)

    def _see(self, name: str, gradient: Tensor) -> None:
        passes = self._passes[name] = self._passes.get(name, 0) + 1
        if passes < self._every:
            return
        self._passes[name] = 0
        flat = gradient.detach().reshape(-1).float()
        finite = flat.isfinite()
        if not finite.any().item():
            return
        if not finite.all().item():
            flat = flat[finite]
        lowest, highest = flat.min().item(), flat.max().item()
        counts = torch.histc(flat, bins=NUM_BINS, min=lowest, max=highest).cpu()
        self.found[name] = counts.tolist(), torch.linspace(lowest, highest, NUM_BINS + 1).tolist()

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()


def training(device: str, rows: Rows) -> None:
    """Time blocks of steps in turn: bare, with the monitor, with histograms as often; a row for each model."""
    steps = STEPS if device == "cuda" else 3
    for shape in shapes_for(device)[:2]:
        if rows.time_left < 0:
            return
        model = shape.model(device, torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        batch, probe = shape.tokens(device), shape.tokens(device)

        def step(model: nn.Module = model, optimizer: Any = optimizer, batch: Tensor = batch) -> None:
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        timed = _blocks(model, probe, step, steps, device, rows)
        bare = timed.pop("bare")
        row: dict[str, Any] = {"model": shape.name, "tokens": batch.numel(), "steps": steps}
        row["step ms"] = 1e3 * statistics.median(bare) / steps
        for name, seconds in timed.items():
            row[f"{name} adds"] = statistics.median(s / b - 1 for s, b in zip(seconds, bare, strict=True))
        rows.add(**row, rounds=len(bare))


@contextmanager
def _without_log() -> Iterator[None]:
    """Print no alarms: random tokens cause some."""
    log = logging.getLogger("attnmonitor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _blocks(
    model: nn.Module, probe: Tensor, step: Callable[[], None], steps: int, device: str, rows: Rows
) -> dict[str, list[float]]:
    """Seconds of each block, the kinds in turn, until half of the part's time is over."""
    timed: dict[str, list[float]] = {"bare": [], "bare again": [], "monitor": [], "histograms": []}
    with tempfile.TemporaryDirectory() as folder, _without_log():
        monitor = AttentionMonitor(model, probe, steps, record=Path(folder) / "run.sqlite", strict=True)
        for _ in range(3):
            step()
        stop, taken = rows.time_left / 2, 0
        while not taken or (device == "cuda" and rows.time_left > stop):
            for kind, seconds in timed.items():
                watch = GradientHistograms(model, steps) if kind == "histograms" else None
                start = 1 + taken * steps  # each block has one step at which a sample is due

                def block(kind: str = kind, start: int = start) -> None:
                    for number in range(start, start + steps):
                        step()
                        if kind == "monitor":
                            monitor.on_step(number)

                seconds.append(host_and_device(block, device)[1])
                if watch is not None:
                    watch.close()
            taken += 1
        monitor.close()
    return timed
