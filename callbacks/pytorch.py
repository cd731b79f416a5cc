"""Raw PyTorch loops: one line anywhere before training, none in the loop.

The monitor counts optimizer steps with torch's own step hooks (`optimizer_steps`), whatever the loop does around them:
accumulated gradients count once, a step that a gradient scaler skips does not count.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from attnmonitor.callbacks.framework import check_keywords
from attnmonitor.messages import warn
from attnmonitor.monitor import AttentionMonitor
from attnmonitor.monitor.final_report import print_final_report
from attnmonitor.monitor.optimizer_steps import OptimizerSteps
from attnmonitor.monitor.schedules import Schedule, one_schedule

__all__ = ["attach"]

_attached_names: weakref.WeakKeyDictionary[Any, list[str | None]] = weakref.WeakKeyDictionary()
"""Names of the open monitors that are attached to each optimizer or model."""

_INNER = ("optimizer", "base_optimizer", "optim", "_optimizer")
"""Attributes under which wrappers keep the optimizer that they wrap."""


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    probe: Any = None,
    *,
    every_n_steps: int | None = None,
    schedule: int | Schedule | Iterable[int] | None = None,
    **settings: Any,
) -> AttentionMonitor:
    """Attach a monitor to a model's optimizer steps; the baseline is sampled right before the first step.

    When the monitor is closed, or at the end of the program, the final report is printed.

    Args:
        model: The model that is trained.
        optimizer: Leave it out, and the optimizers that step the model's parameters are found at their first step,
            however they are made, wrapped or replaced; several of them count one step when each has stepped. Where
            only the steps of one are to count: that one, or a wrapper with it as ``.optimizer``.
        probe: The probe batch, as `AttentionMonitor` takes it.
        every_n_steps: Optimizer steps between two samples, 100 by default.
        schedule: Instead of ``every_n_steps``: any schedule `AttentionMonitor` takes.
        settings: Every other keyword of `AttentionMonitor`.

    Returns:
        The monitor. After a resume, ``monitor.load_state_dict(...)`` continues the saved step count. ``close()``
        removes the hooks. Where an optimizer that is not torch's trains the model, call ``monitor.on_step(step)``.

    Raises:
        ValueError: No probe is given, both ``every_n_steps`` and ``schedule`` are, or `AttentionMonitor` refuses an
            argument.
        TypeError: `AttentionMonitor` has no such keyword.

    Example:
        >>> model = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> probe = torch.randn(2, 12, 16)
        >>> monitor = attach(model, probe=probe, every_n_steps=1, record=None)
        >>> model(probe).sum().backward()
        >>> optimizer.step()
        >>> monitor.history.steps
        [0, 1]
        >>> monitor.close()  # doctest: +ELLIPSIS
        <BLANKLINE>
        attnmonitor: unknown: 2 heads in 1 layer watched over 2 samples: no alarm, but
        ...
    """
    if probe is None:
        given = "" if optimizer is None else f", and optimizer={type(optimizer).__name__} came second"
        raise ValueError(f"probe=None{given}; give a batch as the model takes it: attach(model, probe=batch)")
    stepped = None if optimizer is None else _with_hooks(optimizer)
    check_keywords(settings)
    monitor = AttentionMonitor(model, probe, one_schedule(every_n_steps, schedule), **settings)
    _keep_apart(monitor, monitor.model if stepped is None else stepped)
    if stepped is not None:
        steps = {parameter for group in stepped.param_groups for parameter in group["params"]}
        if steps.isdisjoint(model.parameters()):  # not an error: some optimizers step copies of the parameters
            name = type(stepped).__name__
            warn(f"attnmonitor: optimizer={name} has none of the model's parameters; is it another's?")
    _close_at_exit(monitor)
    OptimizerSteps(monitor, stepped)
    return monitor


def _keep_apart(monitor: AttentionMonitor, attached_to: Any) -> None:
    """Warn where two open monitors write under the same keys."""
    names, name = _attached_names.setdefault(attached_to, []), monitor.name
    if name in names:
        kind = "model" if attached_to is monitor.model else "optimizer"
        warn(
            f"attnmonitor: a monitor{f' named {name!r}' if name else ''} is attached to this {kind} "
            "already, and both go on under the same keys; close() the one before, or tell them apart by name="
        )
    names.append(name)
    monitor.on_close(lambda: names.remove(name))


def _with_hooks(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer itself, or the one in it that has step hooks (accelerate's, Lookahead's).

    Raises:
        ValueError: There is none.
    """
    inner, seen = optimizer, list[Any]()
    while inner is not None and not any(inner is one for one in seen):
        if isinstance(inner, torch.optim.Optimizer) and hasattr(inner, "_optimizer_step_post_hooks"):
            return inner
        seen.append(inner)
        inner = next(filter(None, (getattr(inner, name, None) for name in _INNER)), None)
    raise ValueError(
        f"optimizer={type(optimizer).__name__} is not a torch.optim.Optimizer with step hooks and holds none as "
        ".optimizer; give the one whose steps count, or leave it out: attach(model, probe=batch); where no optimizer "
        "of torch's trains the model, also call monitor.on_step(step) with the number of optimizer steps done"
    )


def _close_at_exit(monitor: AttentionMonitor) -> None:
    """Print the final report on close; close the monitor at the end of this process if it is still open."""
    monitor.on_close(lambda: print_final_report(monitor))
    process, reference = os.getpid(), weakref.ref(monitor)

    def close() -> None:
        # A forked child must not close its parent's monitor.
        if (still_open := reference()) is not None and os.getpid() == process:
            still_open.close()

    atexit.register(close)
    monitor.on_close(lambda: atexit.unregister(close))
