"""What a forward does after its last attention: recorded at attach, then skipped, because no number depends on it.

The output projection and the MLP of the last layer, the head and the loss are a large part of a forward. In the forward
of attach every call of a torch function after the last attention is recorded. In a sample each of these calls returns
what it returned then, a tensor as zeros of the same shape, type and device, and nothing is computed. The code of the
model runs to its end as always: an exception instead would leave its counters half-way.

Nobody may notice the zeros, so they are used only where

* the recorded calls read no value out of a tensor, draw no random number, and neither make nor write anything that
  outlives the forward;
* no hook or mode of somebody else's is there (`obstacle_now`, asked before each forward), and no module or forward was
  replaced since attach;
* a second forward at attach, without the calls, gave the same numbers, errors and statistics, came through the same
  calls, and computed nothing else.

Each forward is compared anew, call by call. One that does anything else stops where it would read zeros and is run
again in full, and so are all that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from attnmonitor.measurement.tail_calls import Recording, Skippable
from attnmonitor.measurement.tail_skipping import Skipping, Trial
from attnmonitor.messages import error_text
from attnmonitor.parallel.wrappers import unwrapped_modules

__all__ = ["SKIPPED", "Tail", "obstacle_now"]

T = TypeVar("T")

SKIPPED = "skipped"
"""How a forward ran that computed nothing after its last attention."""

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS[:4])


class Tail:
    """What a model's forward does after its last attention, and whether it is skipped.

    Attributes:
        obstacle: Why every forward is run in full; ``""`` where one that nothing can notice skips it.
        route: How the last forward ran: `SKIPPED`, or in full, and why.
    """

    def __init__(self, obstacle: str) -> None:
        self.obstacle = obstacle
        self.route = _in_full(obstacle)
        self._part: Skippable | None = None
        self._code_parts: object = None

    @classmethod
    def tried(
        cls, model: nn.Module, recording: Recording, numbers: object, attempt: Callable[[Recording | Skipping], object]
    ) -> Tail:
        """Skip the recorded calls from now on, if a forward without them differs in nothing.

        Args:
            model: The model.
            recording: Its forward in full.
            numbers: What was measured in it, for a comparison.
            attempt: Measures the same in another forward.
        """
        part, may_differ = _found(model, recording, numbers, attempt)
        if may_differ:  # a model may set something up in its first forward, as a classifier its kind of loss
            with suppress(Exception):
                recording = Recording(model)
                part, _ = _found(model, recording, attempt(recording), attempt)
        tail = cls(part.obstacle)
        tail.route = _in_full(tail.obstacle) if tail.obstacle else SKIPPED
        tail._part, tail._code_parts = part, _code_parts(model)
        return tail

    def run(self, model: nn.Module, forward: Callable[[Skipping | None], T], in_full: str = "") -> T:
        """Return what ``forward`` returns, run without what follows the last attention where nothing can notice.

        Args:
            model: The model.
            forward: Runs its forward.
            in_full: Why this one has to be run in full.
        """
        obstacle = in_full or self.obstacle or obstacle_now(model)
        if not obstacle and _code_parts(model) != self._code_parts:
            obstacle = "modules were added or replaced since attach"
        if obstacle or self._part is None:
            self.route = _in_full(obstacle)
            return forward(None)
        skipping = Skipping(self._part)
        try:
            result = forward(skipping)
        except Exception:
            if not skipping.departure:
                raise
        else:
            if not skipping.departure:
                self.route = SKIPPED if skipping.begun else _in_full("not every layer of attach computes attention")
                return result
            del result
        self.obstacle = skipping.departure
        self.route = _in_full(self.obstacle)
        return forward(None)


def _in_full(obstacle: str) -> str:
    return f"in full: {obstacle}"


def _found(
    model: nn.Module, recording: Recording, numbers: object, attempt: Callable[[Skipping], object]
) -> tuple[Skippable, bool]:
    """Return the largest part that is skipped without a difference, and whether a forward without one differed.

    Where there is none, the obstacle is that of the last.
    """
    differed = False
    for part in recording.skippable():
        if not part.obstacle:
            part = replace(part, obstacle=_difference(model, part, recording.statistics, numbers, attempt))
            differed = bool(part.obstacle)
        if not part.obstacle:
            break
    return part, differed


def _difference(
    model: nn.Module,
    part: Skippable,
    statistics: object,
    numbers: object,
    attempt: Callable[[Skipping], object],
) -> str:
    """Run a forward without a part; return how it differs from the recorded one, ``""`` if it does not."""
    trial = Trial(model, part)
    try:
        found = attempt(trial)
    except Exception as error:
        return trial.departure or f"a second forward of the probe fails: {error_text(error)}"
    if trial.departure:
        return trial.departure
    if found != numbers:
        return "two forwards of the probe give different numbers"
    if not trial.begun:
        return "two forwards of the probe do not compute the same attention"
    return "" if trial.statistics == statistics else "statistics are updated after the last attention"


def obstacle_now(model: nn.Module) -> str:
    """Why somebody could notice now that a forward of the model is not run in full; ``""`` where nobody can."""
    if any(getattr(torch_modules, hooks) for hooks in _GLOBAL_HOOKS):
        return "there is a hook on all modules"
    for name, module in unwrapped_modules(model):
        own = vars(module)
        if hooks := next((hooks for hooks in _HOOKS if own.get(hooks)), None):
            return f"there is a hook on {name} ({hooks.strip('_').replace('_', ' ')})"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{name} is a scripted module"
        if "_hf_hook" in own:
            return f"there is a hook of accelerate on {name}"
        if own.get("_compiled_call_impl") is not None or isinstance(getattr(module, "_orig_mod", None), nn.Module):
            return f"{name} is compiled"
    others = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    for mode in others:
        if not isinstance(mode, DeviceContext):
            return f"{type(mode).__name__} is active, which sees every call"
    return ""


def _code_parts(model: nn.Module) -> object:
    """Return what the code of the model's forward is made of, for a comparison."""
    return [(id(module), type(module), vars(module).get("forward")) for module in model.modules()]
