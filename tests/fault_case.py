"""Faults for a sampled training run, and the properties that hold whatever fails: the tester shared by fault tests.

A fault is put in under a run that trains and samples at every step, stays for three samples and is taken out again. It
is real where it can be provoked; where it cannot (out of memory on a CPU), the exception is raised where the real one
would be. A `FaultCase` is one row of a table of faults; every function in `PROPERTIES` holds for every row.
"""

from __future__ import annotations

import gc
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from models import TinyGPT, everything, token_batch, train
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.capture import AttentionCall
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.reduction import Reduction
from attnmonitor.messages import AttentionMonitorWarning

Inject = Callable[[AttentionMonitor, nn.Module, pytest.MonkeyPatch], object]
"""Puts a fault into a run; undoing the patch takes it out."""

LAYERS = frozenset({"blocks.0.attn", "blocks.1.attn"})
FAULTY_STEPS = [3, 4, 5]


# Ways to inject a fault


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def in_function(where: str, error: BaseException) -> Inject:
    """A function or method fails, given by its import path."""
    return lambda monitor, model, patch: patch.setattr(where, raising(error))


def in_module(name: str, error: BaseException) -> Inject:
    """A module's forward fails in the probe; training does not see it."""

    def inject(monitor: AttentionMonitor, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        module = _named(model.named_modules(), name)
        forward = module.forward

        def failing(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                raise error
            return forward(*args)

        patch.setattr(module, "forward", failing)

    return inject


def in_capture(layer: str | None, error: BaseException) -> Inject:
    """What was captured of one layer, or of all if None, cannot be verified."""

    def made(**fields: Any) -> AttentionCall:
        if layer in (None, fields["layer"]):
            raise error
        return AttentionCall(**fields)

    return lambda monitor, model, patch: patch.setattr("attnmonitor.capture.emitter.AttentionCall", made)


def in_reduction(layer: str, error: BaseException) -> Inject:
    """Any computation on the queries of one layer fails."""
    return _with_call_of(layer, lambda call: replace(call, query=_failing(call.query, error)))


def in_pending(layer: str, error: BaseException) -> Inject:
    """The keys of one layer can be copied, and fail later, when the pending layers are reduced."""
    return _with_call_of(layer, lambda call: replace(call, key=_failing(call.key, error, works=("__get__", "clone"))))


def with_batch(changed: Callable[[Any], Any]) -> Inject:
    """The probe runs on another batch."""

    def inject(monitor: AttentionMonitor, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(monitor.probe, "batch", changed(monitor.probe.batch))

    return inject


def with_weights(name: str, value: float) -> Inject:
    """The weights that this process holds have one value while the probe runs."""

    def inject(monitor: AttentionMonitor, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        run, weight = Probe.run, _named(model.named_parameters(), name)
        local = weight.to_local() if isinstance(weight, DTensor) else weight

        def run_on_broken(self: Probe, module: nn.Module, **settings: Any) -> None:
            kept = local.detach().clone()
            local.data.fill_(value)
            try:
                run(self, module, **settings)
            finally:
                local.data.copy_(kept)

        patch.setattr(Probe, "run", run_on_broken)

    return inject


def replaced(name: str, other: nn.Module) -> Inject:
    """A module is another one during samples, as user code under ``if not self.training`` may do."""

    def inject(monitor: AttentionMonitor, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        module = model.get_submodule(name)
        forward = module.forward
        patch.setattr(module, "forward", lambda x: forward(x) if torch.is_grad_enabled() else other(x))

    return inject


def _named(members: Iterator[tuple[str, Any]], name: str) -> Any:
    """The module or parameter of a name, also under DDP and FSDP1."""
    wrapped = "_fsdp_wrapped_module"
    return next(
        one for path, one in members if path.replace(f"{wrapped}.", "").replace(f".{wrapped}", "").endswith(name)
    )


def _with_call_of(layer: str, changed: Callable[[AttentionCall], AttentionCall]) -> Inject:
    def inject(monitor: AttentionMonitor, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        take = Reduction.take
        patch.setattr(Reduction, "take", lambda self, call: take(self, changed(call) if call.layer == layer else call))

    return inject


def _failing(tensor: Tensor, error: BaseException, *, works: tuple[str, ...] = ()) -> Tensor:
    """The tensor, with every operation failing but those named."""

    class Failing(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.__name__ not in works:
                raise error
            return super().__torch_function__(func, types, args, kwargs)

    return tensor.as_subclass(Failing)


# One run with a fault


@dataclass(frozen=True)
class FaultCase:
    """One row of a table of faults.

    Attributes:
        inject: Puts the fault in.
        warning: What the one warning matches; "" where values become NaN and nothing has failed.
        lost: Layers that are NaN meanwhile.
        num_failures: Failures counted over the three samples.
        settings: Of the monitor.
        sampled: Whether the faulty steps have samples.
        strict_raises: Whether a strict monitor raises it; a layer that is not seen is no exception.
    """

    inject: Inject
    warning: str
    lost: frozenset[str] = LAYERS
    num_failures: int = 3
    settings: dict[str, Any] = field(default_factory=dict)
    sampled: bool = True
    strict_raises: bool = True


Trained = tuple[list[float], list[Tensor]]


@dataclass
class FaultRun:
    """What is known after a run with a fault.

    Attributes:
        case: The fault.
        trained: Losses, and everything that training leaves.
        bare: The same of a run without a monitor.
        warnings: Messages of the monitor.
        monitor: The monitor, closed.
        changes: State of the process and hooks that differ from before, as (before, after).
    """

    case: FaultCase
    trained: Trained
    bare: Trained
    warnings: list[str]
    monitor: AttentionMonitor
    changes: dict[str, tuple[Any, Any]]


def new_run() -> tuple[TinyGPT, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TinyGPT(dropout=0.1, batch_norm=True)
    model.blocks[0].norm1.eval()
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def train_in_three_parts(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inject: Callable[[], object] = lambda: None,
    remove: Callable[[], object] = lambda: None,
) -> Trained:
    """Train for two steps, three with the fault and two without it."""
    losses = train(model, optimizer, 2)
    inject()
    losses += train(model, optimizer, 3, seed=2)
    remove()
    losses += train(model, optimizer, 2, seed=3)
    return losses, everything(model, optimizer)


def run_with_fault(case: FaultCase, bare: Trained) -> FaultRun:
    model, optimizer = new_run()
    gc.collect()  # records of earlier tests that nobody closed are closed now, not during the run
    before = {**process_state(), "hooks": hooks(model, optimizer)}
    with collected_warnings() as messages, pytest.MonkeyPatch.context() as patch:
        settings = {"record": None, "schedule": 1, **case.settings}
        monitor = attach(model, optimizer, token_batch(), **settings)
        trained = train_in_three_parts(model, optimizer, lambda: case.inject(monitor, model, patch), patch.undo)
        monitor.close()
    after = {**process_state(), "hooks": hooks(model, optimizer)}
    changes = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    return FaultRun(case, trained, bare, messages, monitor, changes)


# Properties of every run with a fault


def training_is_bit_identical(run: FaultRun) -> None:
    assert same_training(run.trained, run.bare)


def nothing_is_left_behind(run: FaultRun) -> None:
    assert not run.changes, run.changes


def one_warning_names_the_failure(run: FaultRun) -> None:
    assert len(run.warnings) == bool(run.case.warning), run.warnings
    assert all(re.search(run.case.warning, message, re.DOTALL) for message in run.warnings), run.warnings


def failures_are_counted(run: FaultRun) -> None:
    assert run.monitor.failures == run.case.num_failures


def only_named_layers_are_lost(run: FaultRun) -> None:
    for layer, trajectory in run.monitor.history["energy_effective_rank"].items():
        missing = [step for step, row in zip(run.monitor.history.steps, trajectory, strict=True) if row.isnan().any()]
        assert missing == (FAULTY_STEPS if layer in run.case.lost else [])


def next_sample_is_whole(run: FaultRun) -> None:
    expected = [step for step in range(8) if run.case.sampled or step not in FAULTY_STEPS]
    assert run.monitor.history.steps == expected
    for metric in run.monitor.history:
        for trajectory in run.monitor.history[metric].values():
            assert not trajectory[-2:].isnan().any()


PROPERTIES = (
    training_is_bit_identical,
    nothing_is_left_behind,
    one_warning_names_the_failure,
    failures_are_counted,
    only_named_layers_are_lost,
    next_sample_is_whole,
)


def check_strict(case: FaultCase) -> None:
    """A strict monitor raises the failure itself, and leaves nothing behind either."""
    model, optimizer = new_run()
    settings = {"record": None, "schedule": 1, **case.settings, "strict": True}
    with unchanged_process(), pytest.MonkeyPatch.context() as patch:
        monitor = attach(model, optimizer, token_batch(), **settings)
        train(model, optimizer, 2)
        before = everything(model, optimizer)
        case.inject(monitor, model, patch)
        with pytest.raises(Exception) as raised:  # noqa: PT011
            monitor.on_step(3)
        assert not isinstance(raised.value, AttentionMonitorWarning)
        patch.undo()
        monitor.close()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))


# What is compared


def same_training(one: Trained, other: Trained) -> bool:
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The monitor's warnings, all of them, complete after exit."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AttentionMonitorWarning)
        yield messages
    messages += [str(each.message) for each in caught if issubclass(each.category, AttentionMonitorWarning)]


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Fails where a mode, stance, flag, file or thread is there afterwards that was not before."""
    before = process_state()
    yield
    assert process_state() == before


def process_state() -> dict[str, Any]:
    import torch._dynamo.eval_frame as eval_frame

    return {
        "function modes": _len_torch_function_stack(),
        "dispatch modes": _len_torch_dispatch_stack(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "compile stance": eval_frame._stance.stance,
        "matmul precision": torch.get_float32_matmul_precision(),
        "default device": torch.get_default_device(),
        "files": sorted(_open_files()),
        "threads": threading.active_count(),
    }


def _open_files() -> list[str]:
    opened = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    paths = [os.readlink(link) for link in opened if os.path.lexists(link)]
    # Not fonts: matplotlib keeps those that it used last open.
    return [path for path in paths if path.startswith("/") and not re.match("/dev|/proc|.*[.]ttf$", path)]


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    names = [name for name in vars(model) if name.endswith("hooks")]
    on_modules = [len(getattr(module, name)) for module in model.modules() for name in names]
    return [*on_modules, len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
