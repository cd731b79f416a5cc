"""Which optimizer steps are steps of a model, whoever makes, wraps or replaces its optimizers.

torch calls global hooks before and after each step of every optimizer in the process. From them alone follows:

* **Whose step it is.** An optimizer that holds parameters of the model is the model's. One that steps inside the step
  of another (Lookahead, SAM) is a part of it. One that holds copies of the parameters (master weights) is the model's
  once the model is seen to change by its steps.
* **Rounds.** Several optimizers (Muon and Adam, one per parameter) are one step when each has stepped. Which there are
  is learned as they step. Before a sample, others are expected while trainable parameters were not stepped by any.
* **Late counts.** Where something still writes the weights after the step that torch sees (copies, Lookahead's slow
  weights), and where a round was left open, the step is counted right before the next one begins: the weights are the
  same until then.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.optimizer import Optimizer

from attnmonitor.messages import error_text, warn
from attnmonitor.monitor.monitor import AttentionMonitor
from attnmonitor.monitor.step_hooks import add_step_hooks
from attnmonitor.parallel.sharding import is_sharded

__all__ = ["OptimizerSteps"]

_IDLE_ROUNDS = 5  # without a step, after which an optimizer is no longer waited for
_COMPARED_STEPS = 12  # Lookahead moves the weights in every fifth step or so
_NUM_PARAMETERS, _NUM_VALUES = 16, 64  # that are compared, to see whether a model has changed


class OptimizerSteps:
    """Calls ``monitor.on_step`` before the first and after each optimizer step of its model, until it is closed.

    Args:
        monitor: The monitor.
        optimizer: Only its steps count, and those of one that takes its place; by default those of all optimizers
            that hold parameters of the model.
    """

    def __init__(self, monitor: AttentionMonitor, optimizer: Optimizer | None = None) -> None:
        # The hooks are global: they must keep neither a forgotten monitor alive nor an optimizer.
        self._monitor = weakref.ref(monitor)
        self._given = optimizer is not None
        self._held = weakref.WeakKeyDictionary[Optimizer, frozenset[int]]()  # of the model's parameters, by id
        self._looked_at = weakref.WeakKeyDictionary[Optimizer, int]()
        self._copies = weakref.WeakKeyDictionary[Optimizer, tuple[Tensor | None, int]]()
        self._members = weakref.WeakKeyDictionary[Optimizer, int]()  # and rounds without a step
        self._expected = set[int]()  # parameters that the members hold
        self._stepped = weakref.WeakSet[Optimizer]()  # members, in the present round
        self._left_out = set[int]()  # trainable parameters that none has stepped in a whole round
        self._is_waiting = False  # for an optimizer that steps others
        self._running: weakref.ref[Optimizer] | None = None
        self._inner = weakref.WeakSet[Optimizer]()  # begun inside the running one
        self._is_open = False  # whether steps of the present round are not counted
        self._is_pending = self._is_late = False
        self._compares, self._num_compared = True, 0
        self._counted: Tensor | None = None
        self._at_attach = _content(monitor.model)
        self._num_skipped: Tensor | None = None
        self._keeper: weakref.ref[Any] | None = None
        self._has_warned = False
        if optimizer is not None:
            self._members[optimizer] = 0
            self._expected |= _parameters(optimizer)
        self._keep_by(monitor.model if optimizer is None else optimizer)
        remove = add_step_hooks(self._contained(self._before), self._contained(self._after))
        weakref.finalize(monitor, remove).atexit = False
        monitor.on_close(remove)
        monitor.on_close(self._close)

    def _contained(self, hook: Callable[[Optimizer, AttentionMonitor], None]) -> Callable[[Optimizer], None]:
        """Return the hook as it is called; an exception in it is one warning, raised if strict."""

        def call(optimizer: Optimizer) -> None:
            if (monitor := self._monitor()) is None:
                return
            try:
                hook(optimizer, monitor)
            except Exception as error:
                if monitor.strict:
                    raise
                if not self._has_warned:
                    self._has_warned = True
                    warn(f"attnmonitor: a step of {type(optimizer).__name__} is not counted: {error_text(error)}")

        return call

    def _before(self, optimizer: Optimizer, monitor: AttentionMonitor) -> None:
        if not self._is_own(optimizer, monitor) or self._is_inner(optimizer):
            return
        self._running = weakref.ref(optimizer)
        self._inner.clear()
        if self._is_pending or optimizer in self._stepped or self._leads_a_new_round(optimizer):
            self._count(monitor)
        elif self._compares and self._counted is not None:
            self._is_late |= not _is_same(self._counted, _content(monitor.model))
        self._counted = None
        self._sample_baseline(monitor)

    def _after(self, optimizer: Optimizer, monitor: AttentionMonitor) -> None:
        if self._running is None or self._running() is not optimizer:
            return
        self._running = None
        found_inf = getattr(optimizer, "found_inf", None)  # set by a gradient scaler whose optimizer skips by itself
        if isinstance(found_inf, Tensor) and found_inf.device.type == "cpu" and bool(found_inf):
            return
        if optimizer not in self._members and not self._join(optimizer):
            return
        self._stepped.add(optimizer)
        self._is_open = True
        if not self._is_complete(monitor):
            return
        if isinstance(found_inf, Tensor) and found_inf.device.type != "cpu":
            self._num_skipped = found_inf.detach() + (0 if self._num_skipped is None else self._num_skipped)
        if self._is_late:
            self._is_pending = True
        else:
            self._count(monitor, right_after=True)

    def _is_own(self, optimizer: Optimizer, monitor: AttentionMonitor) -> bool:
        """Return whether it is one of the model's optimizers."""
        held = self._held.get(optimizer)
        if held:
            return True
        if optimizer in self._members:  # the given one, in its first step
            self._held[optimizer] = _parameters(optimizer)
            self._expected = set(self._held[optimizer])
            return True
        if (held is None or not self._members) and self._looks_again(optimizer):
            held = _parameters(optimizer) & {id(each) for each in monitor.model.parameters()}
            if self._given and held.isdisjoint(self._expected):
                self._compares &= not held  # one beside the given one, between whose steps it changes the model
                held = frozenset()
            self._held[optimizer] = held
            if not (held or self._given or self._members):
                self._note_copies(optimizer, monitor)
        return bool(held) or (optimizer in self._copies and self._steps_copies(optimizer, monitor))

    def _looks_again(self, optimizer: Optimizer) -> bool:
        """Return whether to look at its parameters: at steps 1, 2, 4, 8, ..., because they may be exchanged."""
        number = self._looked_at[optimizer] = self._looked_at.get(optimizer, 0) + 1
        return number & (number - 1) == 0

    def _note_copies(self, optimizer: Optimizer, monitor: AttentionMonitor) -> None:
        """Begin to compare the model from step to step, if the optimizer may hold copies of its parameters."""
        if optimizer not in self._copies and _holds_copies(optimizer, monitor.model):
            self._copies[optimizer] = _content(monitor.model), 0
            self._sample_baseline(monitor)

    def _steps_copies(self, optimizer: Optimizer, monitor: AttentionMonitor) -> bool:
        """Return whether the model has changed since its first step; make it a member then."""
        content, num_steps = self._copies[optimizer]
        if _is_same(content, _content(monitor.model)):
            self._copies[optimizer] = content, num_steps + 1
            return False
        self._held[optimizer] = frozenset(id(each) for each in monitor.model.parameters() if each.requires_grad)
        self._join(optimizer)
        self._is_late = True
        monitor.on_step(max(0, monitor.global_step) + num_steps)
        return True

    def _is_inner(self, optimizer: Optimizer) -> bool:
        """Return whether it steps as a part of the step that is running."""
        running = None if self._running is None else self._running()
        if running is None or running is optimizer or optimizer in self._inner:
            return False  # where it begins a second time, the running one has raised and is over
        self._inner.add(optimizer)
        return True

    def _leads_a_new_round(self, optimizer: Optimizer) -> bool:
        """Return whether the first of several begins while the round lacks others: a scaler has left them out."""
        return bool(self._stepped) and optimizer is next(iter(self._members), None) and not _is_in_backward()

    def _join(self, optimizer: Optimizer) -> bool:
        """Make it a member, in the place of those whose parameters it steps; return whether the round is its own."""
        held = self._held[optimizer]
        # Where the round of the others has just been counted, this is the last step of that round.
        is_counted = bool(self._members) and not self._stepped
        if not held.isdisjoint(self._expected):
            for member in list(self._members):
                if not held.isdisjoint(self._held.get(member) or _parameters(member)):
                    del self._members[member]
                    self._stepped.discard(member)
                    is_counted = False
            self._expected = set[int]().union(*(self._held.get(member, ()) for member in self._members))
        is_counted &= bool(self._members)
        self._members[optimizer] = 0
        self._expected |= held
        self._copies.clear()
        return not is_counted

    def _is_complete(self, monitor: AttentionMonitor) -> bool:
        if len(self._stepped) < len(self._members):
            return False
        self._is_waiting = not self._given and self._is_due(monitor) and bool(self._not_stepped(monitor))
        return not self._is_waiting

    def _not_stepped(self, monitor: AttentionMonitor) -> set[int]:
        trained = {id(each) for each in monitor.model.parameters() if each.requires_grad}
        return trained - self._expected - self._left_out

    def _is_due(self, monitor: AttentionMonitor) -> bool:
        """Return whether the next step is sampled."""
        try:
            return monitor.is_due(max(0, monitor.global_step) + 1)
        except Exception:  # a schedule of the user's: `on_step` reports it
            return True

    def _count(self, monitor: AttentionMonitor, *, right_after: bool = False) -> None:
        """Count a step that is complete."""
        for member, num_idle in list(self._members.items()):
            self._members[member] = 0 if member in self._stepped else num_idle + 1
            if num_idle >= _IDLE_ROUNDS and member not in self._stepped:
                del self._members[member]
        self._stepped.clear()
        if self._is_waiting:
            self._left_out |= self._not_stepped(monitor)
        self._is_open = self._is_pending = self._is_waiting = False
        if (first := next(iter(self._members), None)) is not None:
            self._keep_by(first)
        if right_after and _is_in_backward():
            # Optimizers that step in the backward: it ends first, and with it what FSDP does to the weights.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._sample(monitor))
        else:
            self._sample(monitor)

    def _sample(self, monitor: AttentionMonitor) -> None:
        is_due = self._is_due(monitor)
        if is_due and self._num_skipped is not None:  # only now: reading it waits for the device
            monitor.global_step -= int(self._num_skipped)
            self._num_skipped = None
        step = max(0, monitor.global_step) + 1
        if is_due:
            monitor.on_step(step)
        else:
            monitor.global_step = step
        if self._compares and self._num_compared < _COMPARED_STEPS and not self._is_late:
            self._num_compared += 1
            self._counted = _content(monitor.model)

    def _sample_baseline(self, monitor: AttentionMonitor) -> None:
        """Sample before the first step, and not at attach: a state can be loaded in between."""
        if monitor.global_step >= 0 or (_is_in_backward() and is_sharded(monitor.model)):
            return
        monitor.on_step(0)

    def _close(self) -> None:
        """Count a step that is still open; warn if the model was trained by steps that torch did not see."""
        monitor = self._monitor()
        if monitor is None:
            return
        alone = not distributed.is_initialized() or distributed.get_world_size() == 1
        if self._is_open and alone:  # other processes may be gone, or be slower
            self._count(monitor)
        self._keep_by(None)
        is_unseen = monitor.global_step < 0 and monitor.last_sample is None
        if is_unseen and not _is_same(self._at_attach, _content(monitor.model)):
            warn(
                "attnmonitor: the model has changed since attach, but no step of a torch.optim.Optimizer with its "
                "parameters was seen, so no samples were taken; where another kind of optimizer trains it, call "
                "monitor.on_step(step) with the number of optimizer steps done, 0 before the first and after each"
            )

    def _keep_by(self, owner: Any) -> None:
        """Let ``owner`` keep the monitor alive, also where the program has not kept what `attach` returned."""
        keeper, monitor = None if self._keeper is None else self._keeper(), self._monitor()
        if monitor is None or (keeper is owner and owner is not None):
            return
        if keeper is not None and (kept := vars(keeper).get(_KEPT)):
            kept.discard(monitor)
            if not kept:
                del vars(keeper)[_KEPT]
        self._keeper = None
        if owner is not None:
            kept = vars(owner)[_KEPT] = vars(owner).get(_KEPT) or _Kept()  # a copy of a model has False
            kept.add(monitor)
            self._keeper = weakref.ref(owner, self._keep_by_model)

    def _keep_by_model(self, _: object) -> None:
        if (monitor := self._monitor()) is not None:
            self._keep_by(monitor.model)


_KEPT = "_attnmonitor"


class _Kept(set[AttentionMonitor]):
    """Monitors that an optimizer or a model keeps alive; a copy or pickle of it has False in their place."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, ()


def _parameters(optimizer: Optimizer) -> frozenset[int]:
    with suppress(Exception):  # a class of the user's own
        return frozenset(id(each) for group in optimizer.param_groups for each in group["params"])
    return frozenset()


def _holds_copies(optimizer: Optimizer, model: nn.Module) -> bool:
    """Return whether its parameters have the shapes of the model's, or are that many numbers in one piece per group."""
    with suppress(Exception):
        own = [each.shape for group in optimizer.param_groups for each in group["params"]]
        shapes = [each.shape for each in model.parameters() if each.requires_grad]
        if Counter(own) == Counter(shapes):
            return True
        total, num_processes = sum(map(torch.Size.numel, shapes)), 1
        if distributed.is_initialized():
            num_processes = distributed.get_world_size()
        share = sum(map(torch.Size.numel, own)) * num_processes
        return all(len(shape) == 1 for shape in own) and total <= share <= 1.1 * total  # with padding
    return False


def _content(model: nn.Module) -> Tensor | None:
    """Return some values of some trainable parameters, on the CPU; None where they cannot be read alone."""
    with suppress(Exception):
        if is_sharded(model):
            return None
        trained = [each.detach() for each in model.parameters() if each.requires_grad]
        some = trained[:: max(1, len(trained) // _NUM_PARAMETERS)]
        with torch.inference_mode(False), torch.no_grad():
            middles = (each.flatten()[each.numel() // 2 :][:_NUM_VALUES] for each in some)
            return torch.cat([values.float().cpu() for values in middles])
    return None


def _is_same(before: Tensor | None, now: Tensor | None) -> bool:
    """Return whether nothing has changed, or nothing is known."""
    if before is None or now is None:
        return True
    with suppress(Exception):
        return bool(torch.equal(before.nan_to_num(), now.nan_to_num()))
    return True


def _is_in_backward() -> bool:
    """Return whether this thread is inside of a backward."""
    return bool(torch._C._current_graph_task_id() != -1)
