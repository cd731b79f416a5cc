"""Raw PyTorch loops: one line after the optimizer is made, none in the loop.

The monitor hooks into the optimizer's step (``register_step_post_hook``), so it counts optimizer steps whatever the
loop does around them: accumulated gradients count once, a step that a gradient scaler skips does not count.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from attnmonitor.callbacks.framework import check_settings
from attnmonitor.measurement.quiet import not_compiled
from attnmonitor.messages import warn
from attnmonitor.monitor import AttentionMonitor
from attnmonitor.monitor.final_report import print_final_report
from attnmonitor.monitor.schedules import Schedule, one_schedule

__all__ = ["attach"]

_attached_names: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[str | None]] = weakref.WeakKeyDictionary()
"""Names of the open monitors that are attached to each optimizer."""

_OTHERS_IN_ROW = 3
"""Steps of other optimizers without one of the attached, after which it counts as replaced."""

_INNER = ("optimizer", "base_optimizer", "optim", "_optimizer")
"""Attributes under which wrappers keep the optimizer that they wrap."""


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    probe: Any,
    *,
    every_n_steps: int | None = None,
    schedule: int | Schedule | Iterable[int] | None = None,
    **settings: Any,
) -> AttentionMonitor:
    """Attach a monitor to an optimizer's steps; the baseline is sampled right before the first step.

    When the monitor is closed, or at the end of the program, the final report is printed.

    Args:
        model: The model that is trained.
        optimizer: The optimizer whose steps are counted, or a wrapper with it as ``.optimizer``, such as accelerate's.
        probe: The probe batch, as `AttentionMonitor` takes it.
        every_n_steps: Optimizer steps between two samples, 100 by default.
        schedule: Instead of ``every_n_steps``: any schedule `AttentionMonitor` takes.
        settings: Every other keyword of `AttentionMonitor`.

    Returns:
        The monitor. After a resume, ``monitor.load_state_dict(...)`` continues the saved step count. ``close()``
        removes the hooks.

    Raises:
        ValueError: Both ``every_n_steps`` and ``schedule`` are given, or `AttentionMonitor` refuses an argument.
        TypeError: `AttentionMonitor` has no such keyword.

    Example:
        >>> model = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> probe = torch.randn(2, 12, 16)
        >>> monitor = attach(model, optimizer, probe, every_n_steps=1, record=None)
        >>> model(probe).sum().backward()
        >>> optimizer.step()
        >>> monitor.history.steps
        [0, 1]
        >>> monitor.close()  # doctest: +ELLIPSIS
        <BLANKLINE>
        attnmonitor: 2 heads in 1 layer watched over 2 samples: no alarm, but some rules first wait for 25 samples
        ...
    """
    optimizer = _with_hooks(optimizer)
    check_settings(settings)
    monitor = AttentionMonitor(model, probe, one_schedule(every_n_steps, schedule), **settings)
    steps = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if steps.isdisjoint(model.parameters()):  # not an error: some optimizers step copies of the parameters
        warn(f"attnmonitor: optimizer={type(optimizer).__name__} has none of the model's parameters; is it another's?")

    names, name = _attached_names.setdefault(optimizer, []), monitor.name
    if name in names:
        warn(
            f"attnmonitor: a monitor{f' named {name!r}' if name else ''} is attached to this optimizer "
            "already, and both go on under the same keys; close() the one before, or tell them apart by name="
        )
    names.append(name)
    monitor.on_close(lambda: names.remove(name))

    # The baseline is sampled at the first step, so that a state can be loaded after attach.
    @not_compiled
    def before_step(*_: object) -> None:
        monitor.on_step(max(0, monitor.global_step))

    @not_compiled
    def after_step(*_: object) -> None:
        monitor.on_step(monitor.global_step + 1)

    monitor.on_close(optimizer.register_step_pre_hook(before_step).remove)
    monitor.on_close(optimizer.register_step_post_hook(after_step).remove)
    _warn_of_replacement(monitor, optimizer)
    _close_at_exit(monitor)
    return monitor


def _warn_of_replacement(monitor: AttentionMonitor, attached: torch.optim.Optimizer) -> None:
    """Warn once if another optimizer steps the model's parameters in the place of the attached one."""
    holds_model = weakref.WeakKeyDictionary[torch.optim.Optimizer, bool]()
    num_others_in_row, kind = 0, type(attached).__name__
    # torch keeps this hook in a global list, which must keep neither a forgotten monitor nor its optimizer alive.
    monitor_of, attached_of = weakref.ref(monitor), weakref.ref(attached)

    @not_compiled
    def after_any_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
        nonlocal num_others_in_row
        if (still_open := monitor_of()) is None:
            return
        if optimizer is attached_of():
            num_others_in_row = 0
            return
        if optimizer not in holds_model:
            stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            holds_model[optimizer] = not stepped.isdisjoint(still_open.model.parameters())
        num_others_in_row += holds_model[optimizer]
        if num_others_in_row == _OTHERS_IN_ROW:
            warn(
                f"attnmonitor: {type(optimizer).__name__} steps the model's parameters and the attached "
                f"{kind} does not any more, so no samples are taken; close() this monitor, "
                "attach(model, optimizer, probe, ...) the new optimizer, and load_state_dict() this one's state_dict()"
            )

    monitor.on_close(register_optimizer_step_post_hook(after_any_step).remove)


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
        ".optimizer; give the one whose steps count"
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
