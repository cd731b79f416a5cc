"""Whatever goes wrong while sampling, training goes on to the same weights, and nothing is left behind.

Each fault is put in under a run that trains and samples at every step, stays for three samples and is taken out again.
A fault is real where one can be provoked (a file in the place of a folder, weights that are NaN, a finished W&B run);
where it cannot (out of memory on a CPU), the exception is raised where the real one would be.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from models import TinyGPT, everything, token_batch, train
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.data import DataLoader, Dataset
from wandb_files import curve, offline_run

from attnmonitor import AttentionMonitor, Sample
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.capture import AttentionCall
from attnmonitor.capture.mode import AttentionMode
from attnmonitor.loggers import WandbLogger
from attnmonitor.measurement.reduction import Reduction
from attnmonitor.messages import AttentionMonitorWarning
from attnmonitor.record import RunRecord
from attnmonitor.record.writer import RecordWriter

ALWAYS = Threshold("query_rms", "value", fire_above=-20.0, clear_below=-21.0, quantile=0.5)
ALWAYS_FIRING = Rule("always", "test", "run", ALWAYS, patience=1, grace=0)
BOTH_LAYERS = {"blocks.0.attn", "blocks.1.attn"}


@dataclass
class Fault:
    """What breaks, what is said of it, and what it costs.

    Attributes:
        breaks: Given the monitor, its model and a patch that is undone after three samples.
        says: What the one warning matches; "" where the numbers say it, and nothing has failed.
        lost: Layers that are NaN meanwhile.
        failures: How many failures are counted over the three samples.
        settings: Of the monitor.
    """

    breaks: Callable[[AttentionMonitor, nn.Module, pytest.MonkeyPatch], object]
    says: str
    lost: set[str] = field(default_factory=lambda: BOTH_LAYERS)
    failures: int = 3
    settings: dict[str, Any] = field(default_factory=dict)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def in_module(name: str, error: BaseException | None = None) -> Callable[..., object]:
    """The module's forward fails in the probe; training does not see it."""

    def breaks(monitor: AttentionMonitor, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        module = model.get_submodule(name)
        forward = module.forward

        def stumbling(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                raise error or RuntimeError(f"no luck in {name or 'the model'}")
            return forward(*args)

        patch.setattr(module, "forward", stumbling)

    return breaks


def in_function(where: str, error: BaseException) -> Callable[..., object]:
    return lambda monitor, model, patch: patch.setattr(where, raising(error))


def in_nth_layer(index: int, error: BaseException) -> Callable[..., object]:
    """The reduction of one layer fails."""

    def breaks(monitor: AttentionMonitor, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        reduced = Reduction._reduced
        layer = f"blocks.{index}.attn"
        patch.setattr(
            Reduction, "_reduced", lambda self, call: raising(error)() if call.layer == layer else reduced(self, call)
        )

    return breaks


def in_the_cores_of(layer: str, error: BaseException) -> Callable[..., object]:
    """What waits of one layer cannot be finished."""

    def breaks(monitor: AttentionMonitor, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        waits = Reduction._waits

        def broken(self: Reduction, call: AttentionCall) -> object:
            found = waits(self, call)
            return replace(found, cores=raising(error)) if call.layer == layer else found

        patch.setattr(Reduction, "_waits", broken)

    return breaks


def swapped(name: str, other: Callable[[nn.Module], nn.Module]) -> Callable[..., object]:
    """A module is another one during samples, as a user's own code under ``if not self.training`` may have it."""

    def breaks(monitor: AttentionMonitor, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        module = model.get_submodule(name)
        forward, replacement = module.forward, other(module)
        patch.setattr(module, "forward", lambda x: forward(x) if torch.is_grad_enabled() else replacement(x))

    return breaks


def with_weights(name: str, value: float) -> Callable[..., object]:
    """Weights are NaN or infinite while the probe runs."""

    def breaks(monitor: AttentionMonitor, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        run, weight = monitor._probe.run, model.get_parameter(name)

        def run_on_broken(module: nn.Module) -> None:
            kept = weight.detach().clone()
            weight.data.fill_(value)
            try:
                run(module)
            finally:
                weight.data.copy_(kept)

        patch.setattr(monitor._probe, "run", run_on_broken)

    return breaks


class Logger:
    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def log_sample(self, sample: Sample) -> None:
        self.samples.append(sample)


class Tracker:
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        pass


def logger_breaks(method: str, error: BaseException) -> Callable[..., object]:
    return lambda monitor, model, patch: patch.setattr(monitor._loggers[0], method, raising(error))


def interrupted_schedule(global_step: int) -> bool:
    if 3 <= global_step <= 5:
        raise ZeroDivisionError("schedule")
    return True


def stumbling_action(event: Any, sample: Sample) -> None:
    raise ConnectionError("pager is down")


LINALG = torch.linalg.LinAlgError("eigh: the algorithm failed to converge")
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
WHOLE = r"the sample at step 3 failed and its values are NaN: "
SOME = r"not measured at step 3, and NaN: "
NO_LAYER: set[str] = set()

FAULTS: dict[str, Fault] = {
    # The probe and its forward
    "the forward the user gave": Fault(
        lambda monitor, model, patch: patch.setattr(monitor._probe, "_forward", raising(TypeError("forward"))),
        WHOLE + "TypeError: forward",
    ),
    "the probe on a device that is gone": Fault(
        lambda monitor, model, patch: patch.setattr(monitor._probe, "batch", monitor._probe.batch.to("meta")),
        WHOLE + "(NotImplementedError|RuntimeError)",
    ),
    "a probe of token ids the model has not": Fault(
        lambda monitor, model, patch: patch.setattr(monitor._probe, "batch", monitor._probe.batch + 1000),
        WHOLE + "IndexError: index out of range",
    ),
    "a probe longer than the model": Fault(
        lambda monitor, model, patch: patch.setattr(monitor._probe, "batch", token_batch(length=40)),
        WHOLE + "IndexError: index out of range",
    ),
    "the model's eval": Fault(
        lambda monitor, model, patch: patch.setattr(model, "eval", raising(RuntimeError("no eval"))),
        WHOLE + "RuntimeError: no eval",
    ),
    **{
        f"the forward of {name or 'the model'}": Fault(in_module(name), WHOLE + "RuntimeError: no luck in")
        for name in (
            "", "tokens", "blocks.0", "blocks.0.attn", "blocks.0.attn.q_proj", "blocks.0.attn.o_proj", "blocks.0.mlp.1",
            "blocks.1.attn.k_proj", "blocks.1.norm2", "batch_norm", "head",
        )
    },
    "a MemoryError in the forward": Fault(in_module("blocks.1", MemoryError("host")), WHOLE + "MemoryError: host"),
    "a StopIteration in the forward": Fault(in_module("blocks.1", StopIteration()), WHOLE + "StopIteration"),
    "a RecursionError in the forward": Fault(in_module("head", RecursionError("deep")), WHOLE + "RecursionError: deep"),
    "a warning that is an error in the forward": Fault(
        in_module("head", DeprecationWarning("old")), WHOLE + "DeprecationWarning: old"
    ),
    "a hook of the user": Fault(
        lambda monitor, model, patch: patch.setattr(
            model.head, "_forward_hooks", OrderedDict({0: lambda *_: None if torch.is_grad_enabled() else 1 / 0})
        ),
        WHOLE + "ZeroDivisionError",
    ),
    "out of memory, with the whole probe and with half": Fault(in_module("blocks.1.mlp", OOM), WHOLE + "OutOfMemory"),
    # One layer
    **{
        f"the reduction of layer {index}": Fault(
            in_nth_layer(index, RuntimeError("reduction")),
            SOME + rf"blocks\.{index}\.attn \(measuring failed: RuntimeError: reduction",
            {f"blocks.{index}.attn"},
        )
        for index in (0, 1)
    },
    "out of memory in the reduction of a layer": Fault(in_nth_layer(1, OOM), WHOLE + "OutOfMemoryError"),
    "the cores of one layer": Fault(
        in_the_cores_of("blocks.0.attn", LINALG),
        SOME + r"blocks\.0\.attn \(measuring failed: .*LinAlg",
        {"blocks.0.attn"},
    ),
    "out of memory in the cores of a layer": Fault(in_the_cores_of("blocks.0.attn", OOM), WHOLE + "OutOfMemoryError"),
    "the leverage's eigenvectors do not converge": Fault(
        in_function("torch.linalg.eigh", LINALG), SOME + r"blocks\.0\.attn, blocks\.1\.attn \(.*LinAlg"
    ),
    "the capture itself": Fault(
        lambda monitor, model, patch: patch.setattr(AttentionMode, "_verified", raising(KeyError("rebuild"))),
        SOME + r"blocks\.0\.attn, blocks\.1\.attn \(its attention could not be rebuilt: 'rebuild'",
    ),
    "the watching of fused attention": Fault(
        in_function("attnmonitor.capture.mode.read_sdpa", TypeError("read")),
        SOME + r"blocks\.0\.attn, blocks\.1\.attn \(.*read",
    ),
    "an attention that is gone": Fault(
        swapped("blocks.1.attn", lambda module: nn.Identity()), SOME + r"blocks\.1\.attn \(", {"blocks.1.attn"}
    ),
    # The numbers
    "the eigenvalues do not converge": Fault(in_function("torch.linalg.eigvalsh", LINALG), WHOLE + ".*LinAlg"),
    "the statistics": Fault(
        in_function("attnmonitor.measurement.reduction.head_statistics", ArithmeticError("statistics")),
        WHOLE + "ArithmeticError",
    ),
    "the mean over sequences": Fault(
        in_function("attnmonitor.metrics.base.HeadMetric.accumulate", RuntimeError("sum")), WHOLE + "RuntimeError: sum"
    ),
    "the transfer to the host": Fault(
        in_function("attnmonitor.measurement.measurement.to_host", torch.AcceleratorError("device lost", 1)
        if hasattr(torch, "AcceleratorError") else RuntimeError("device lost")),
        WHOLE + ".*device lost",
    ),
    "the metrics of the weights": Fault(
        in_function("attnmonitor.measurement.weights.LearnedSide.take", LINALG),
        WHOLE + ".*LinAlg",
        settings={"metrics": ["energy_effective_rank", "interaction_effective_rank"], "weights_every": 1},
    ),
    "the metrics of attention rows": Fault(
        in_function("attnmonitor.measurement.reduction.attention_row_statistics", RuntimeError("rows")),
        SOME + r"blocks\.0\.attn, blocks\.1\.attn \(measuring failed: RuntimeError: rows",
        settings={"metrics": ["energy_effective_rank", "attention_entropy"], "alerts": False},
    ),
    "NaN in the weights of a key projection": Fault(
        with_weights("blocks.1.attn.k_proj.weight", torch.nan), "", {"blocks.1.attn"}, failures=0
    ),
    "infinite weights of a query projection": Fault(
        with_weights("blocks.1.attn.q_proj.weight", torch.inf), "", {"blocks.1.attn"}, failures=0
    ),
    "NaN in the embedding": Fault(with_weights("tokens.weight", torch.nan), "", failures=0),
    # What is done with a sample
    "the schedule": Fault(
        lambda *_: None, "the schedule failed", NO_LAYER, settings={"schedule": interrupted_schedule}
    ),
    "the alerts": Fault(
        lambda monitor, model, patch: patch.setattr(monitor._alerts, "observe", raising(ValueError("rule"))),
        "alerts failed and was ignored: ValueError: rule",
        NO_LAYER,
    ),
    "an action": Fault(
        lambda *_: None,
        "action stumbling_action failed and was ignored: ConnectionError: pager is down",
        NO_LAYER,
        failures=1,
        settings={"alerts": [ALWAYS_FIRING], "actions": {"always": stumbling_action}},
    ),
    "a logger": Fault(
        logger_breaks("log_sample", OSError("tracker is gone")),
        "Logger failed and was ignored: OSError",
        NO_LAYER,
        settings={"loggers": [Logger()]},
    ),
    "a logger of scalars": Fault(
        lambda monitor, model, patch: patch.setattr(Tracker, "log_metrics", raising(TimeoutError("no answer"))),
        "MetricsLogger failed and was ignored: TimeoutError",
        NO_LAYER,
        settings={"loggers": [Tracker()]},
    ),
    "the writing of the record": Fault(
        lambda monitor, model, patch: patch.setattr(RecordWriter, "append", raising(MemoryError("row"))),
        "record failed and was ignored: MemoryError: row",
        NO_LAYER,
        settings={"record": True},
    ),
}  # fmt: skip


@contextmanager
def everything_put_back() -> Iterator[None]:
    """Fails where a mode, stance, flag, file or thread is there afterwards that was not before."""
    before = surroundings()
    yield
    assert surroundings() == before


def surroundings() -> dict[str, Any]:
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
        "files": sorted(open_files()),
        "threads": threading.active_count(),
    }


def open_files() -> list[str]:
    paths = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    return [path for path in paths if path.startswith("/") and not path.startswith(("/dev", "/proc"))]


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    names = [name for name in vars(model) if name.endswith("hooks")]
    on_modules = [len(getattr(module, name)) for module in model.modules() for name in names]
    return [*on_modules, len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]


def new_run() -> tuple[TinyGPT, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TinyGPT(dropout=0.1, batch_norm=True)
    model.blocks[0].norm1.eval()
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def train_in_three_parts(
    model: nn.Module, optimizer: torch.optim.Optimizer, between: tuple[Callable[[], object], Callable[[], object]]
) -> tuple[list[float], list[Tensor]]:
    losses = train(model, optimizer, 2)
    between[0]()
    losses += train(model, optimizer, 3, seed=2)
    between[1]()
    losses += train(model, optimizer, 2, seed=3)
    return losses, everything(model, optimizer)


@pytest.fixture(scope="module")
def unwatched() -> tuple[list[float], list[Tensor]]:
    return train_in_three_parts(*new_run(), (lambda: None, lambda: None))


def same(one: tuple[list[float], list[Tensor]], other: tuple[list[float], list[Tensor]]) -> bool:
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if issubclass(warning.category, AttentionMonitorWarning)]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_its_numbers_and_one_warning_and_nothing_else(
    name: str, unwatched: tuple[list[float], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULTS[name]
    settings = {"record": None, "schedule": 1, **fault.settings}
    model, optimizer = new_run()
    hooks_before = hooks(model, optimizer)
    with everything_put_back(), warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always", AttentionMonitorWarning)
        monitor = attach(model, optimizer, token_batch(), **settings)
        end = train_in_three_parts(model, optimizer, (lambda: fault.breaks(monitor, model, patch), patch.undo))
        monitor.close()

    assert same(end, unwatched)
    assert hooks(model, optimizer) == hooks_before
    messages = told(caught)
    assert len(messages) == bool(fault.says)
    assert all(re.search(fault.says, message, re.DOTALL) for message in messages), messages
    assert monitor.failures == fault.failures
    sampled = [0, 1, 2, 6, 7] if name == "the schedule" else list(range(8))
    assert monitor.history.steps == sampled
    for layer, trajectory in monitor.history["energy_effective_rank"].items():
        missing = [step for step, row in zip(sampled, trajectory, strict=True) if row.isnan().any()]
        assert missing == ([3, 4, 5] if layer in fault.lost else [])


@pytest.mark.parametrize(
    "name",
    [
        "the forward the user gave",
        "the model's eval",
        "the forward of blocks.0.attn.o_proj",
        "out of memory, with the whole probe and with half",
        "the reduction of layer 1",
        "the leverage's eigenvectors do not converge",
        "the statistics",
        "the transfer to the host",
        "the metrics of the weights",
        "the schedule",
        "the alerts",
        "a logger",
        "the writing of the record",
    ],
)
def test_strict_raises_it_and_leaves_nothing_behind_either(name: str) -> None:
    fault = FAULTS[name]
    model, optimizer = new_run()
    settings = {"record": None, "schedule": 1, **fault.settings, "strict": True}
    with everything_put_back(), pytest.MonkeyPatch.context() as patch:
        monitor = attach(model, optimizer, token_batch(), **settings)
        train(model, optimizer, 2)
        before = everything(model, optimizer)
        fault.breaks(monitor, model, patch)
        with pytest.raises(Exception) as raised:  # noqa: PT011
            monitor.on_step(3)
        assert not isinstance(raised.value, AttentionMonitorWarning)
        patch.undo()
        monitor.close()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))


def test_strict_raises_what_an_action_raises() -> None:
    settings = FAULTS["an action"].settings
    monitor = AttentionMonitor(TinyGPT(), token_batch(), 1, record=None, strict=True, **settings)
    with pytest.raises(ConnectionError, match="pager is down"):
        list(map(monitor.on_step, range(8)))


@pytest.mark.parametrize("where", ["tokens", "blocks.0.attn.o_proj", "blocks.1.attn", "head"])
@pytest.mark.parametrize("strict", [False, True])
def test_an_interrupt_in_the_middle_of_a_sample_goes_through_and_leaves_nothing_behind(
    where: str, strict: bool
) -> None:
    model, optimizer = new_run()
    with everything_put_back(), pytest.MonkeyPatch.context() as patch:
        monitor = attach(model, optimizer, token_batch(), schedule=1, strict=strict)
        train(model, optimizer, 2)
        before, hooks_before = everything(model, optimizer), hooks(model, optimizer)
        in_module(where, KeyboardInterrupt())(monitor, model, patch)
        with pytest.raises(KeyboardInterrupt):
            monitor.on_step(3)
        patch.undo()
        assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))
        assert hooks(model, optimizer) == hooks_before
        assert monitor.on_step(4) is not None  # whoever goes on, in a notebook say, can
        monitor.close()
    assert monitor.history.steps == [0, 1, 2, 4]
    assert list(RunRecord.open(monitor.record_path).steps) == [0, 1, 2, 4]


# Memory


def out_of_memory_above(model: nn.Module, num_sequences: int) -> Callable[[], None]:
    """The model has memory for so many sequences at once, when it is not trained."""

    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled() and len(args[0]) > num_sequences:
            raise OOM

    return model.blocks[1].register_forward_pre_hook(check).remove


def test_out_of_memory_is_tried_again_with_half_of_the_sequences() -> None:
    model, _ = new_run()
    monitor = AttentionMonitor(model, token_batch(batch=4), record=None)
    expected = AttentionMonitor(model, token_batch(batch=4)[:2], record=None).sample(0)
    remove = out_of_memory_above(model, 2)
    with pytest.warns(AttentionMonitorWarning, match="step 1 ran out of memory and measured the first half") as caught:
        samples = [monitor.sample(1), monitor.sample(2)]
    assert len(caught) == 1
    for sample in samples:
        assert sample.failure is None
        assert sample.failures == 0
        assert sample.diagnostics["halved_probe"] == 1
        for metric, layers in expected.values.items():
            for layer, values in layers.items():
                assert torch.equal(sample.values[metric][layer], values)
    remove()
    assert "halved_probe" not in monitor.sample(3).diagnostics


def test_a_probe_that_cannot_be_halved_or_is_still_too_large_fails_once_per_sample() -> None:
    for batch in (1, 3):
        model, _ = new_run()
        monitor = AttentionMonitor(model, token_batch(batch=batch), record=None)
        out_of_memory_above(model, 0)
        with pytest.warns(AttentionMonitorWarning, match="failed and its values are NaN: OutOfMemoryError"):
            assert monitor.sample(0).failures == 1


def test_every_tensor_of_a_mapping_is_halved_along_its_sequences_and_what_has_none_is_shared() -> None:
    class TakesMasks(TinyGPT):
        seen: list[tuple[int, ...]]

        def forward(self, token_ids: Tensor, mask: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
            self.seen = [tuple(x.shape) for x in (token_ids, mask, positions, temperature)]
            return super().forward(token_ids)

    model = TakesMasks()
    probe = {
        "token_ids": token_batch(batch=5),
        "mask": torch.ones(5, 24),
        "positions": torch.arange(24),
        "temperature": torch.tensor(1.0),
    }
    monitor = AttentionMonitor(model, probe, record=None)
    out_of_memory_above(model, 2)
    with pytest.warns(AttentionMonitorWarning, match="ran out of memory"):
        monitor.sample(0)
    assert model.seen == [(2, 24), (2, 24), (24,), ()]


# The pause


def test_five_samples_in_a_row_without_a_number_pause_the_monitor_until_it_is_resumed() -> None:
    model, optimizer = new_run()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AttentionMonitorWarning)
        monitor = attach(model, optimizer, token_batch(), schedule=1, record=None)
        train(model, optimizer, 2)
        in_module("head")(monitor, model, patch)
        train(model, optimizer, 4)
        assert not monitor.paused
        train(model, optimizer, 4)
        assert monitor.paused
        patch.undo()
        train(model, optimizer, 2)
        assert monitor.on_step(13) is None
        monitor.resume()
        assert monitor.on_step(14) is not None
    assert not monitor.paused
    assert monitor.failures == 5
    assert monitor.history.steps == [*range(8), 14]
    failed, paused = told(caught)
    assert "the sample at step 3 failed" in failed
    assert re.search(r"nothing was measured in 5 samples in a row, the last at step 7.*monitor\.resume\(\)", paused)
    monitor.close()


def test_failures_that_are_not_in_a_row_or_cost_only_some_layers_do_not_pause() -> None:
    model, _ = new_run()
    monitor = AttentionMonitor(model, token_batch(), 1, record=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttentionMonitorWarning)
        for step in range(12):
            with pytest.MonkeyPatch.context() as patch:
                if step % 4:
                    in_module("head")(monitor, model, patch)
                monitor.on_step(step)
        with pytest.MonkeyPatch.context() as patch:
            in_nth_layer(0, RuntimeError("reduction"))(monitor, model, patch)
            for step in range(12, 20):
                monitor.on_step(step)
    assert not monitor.paused
    assert monitor.failures == 9 + 8


def test_a_sample_asked_for_outright_is_tried_during_a_pause_and_ends_it_when_it_works() -> None:
    model, _ = new_run()
    monitor = AttentionMonitor(model, token_batch(), 1, record=None)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore", AttentionMonitorWarning)
        in_module("head")(monitor, model, patch)
        for step in range(8):
            monitor.on_step(step)
    assert monitor.paused
    assert not monitor.sample(8).values["energy_rms"]["blocks.0.attn"].isnan().any()
    assert not monitor.paused
    assert monitor.on_step(9) is not None


# Real faults of what is done with samples


def test_a_folder_that_cannot_be_made_costs_the_record_until_it_can(
    tmp_path: Path, unwatched: tuple[list[float], list[Tensor]]
) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    model, optimizer = new_run()
    with everything_put_back(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AttentionMonitorWarning)
        monitor = attach(model, optimizer, token_batch(), schedule=1, record=tmp_path / "runs" / "run.sqlite")
        end = train_in_three_parts(model, optimizer, (lambda: None, (tmp_path / "runs").unlink))
        monitor.close()
    assert same(end, unwatched)
    assert len(told(caught)) == 1
    assert list(RunRecord.open(tmp_path / "runs" / "run.sqlite").steps) == list(range(8))


def test_a_wandb_run_that_ends_before_training_does_costs_its_curves_only(
    in_own_folder: Path, unwatched: tuple[list[float], list[Tensor]]
) -> None:
    run = wandb.init(project="test", dir=in_own_folder)
    model, optimizer = new_run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AttentionMonitorWarning)
        kept = Logger()
        monitor = attach(
            model, optimizer, token_batch(), schedule=1, loggers=[WandbLogger(run, image_share=0), kept], record=None
        )
        end = train_in_three_parts(model, optimizer, (run.finish, lambda: None))
        monitor.close()
    assert same(end, unwatched)
    assert len(told(caught)) == 1
    assert "WandbLogger failed and was ignored" in told(caught)[0]
    assert [sample.global_step for sample in kept.samples] == list(range(8))
    assert list(curve(offline_run(in_own_folder), "attention/energy_rms/median")) == [0, 1, 2]


def test_a_logger_that_fails_to_close_does_not_keep_the_record_open() -> None:
    class Sticky(Logger):
        def close(self) -> None:
            raise BrokenPipeError("gone")

    model, optimizer = new_run()
    with everything_put_back():
        monitor = attach(model, optimizer, token_batch(), schedule=1, loggers=[Sticky()])
        train(model, optimizer, 2)
        with pytest.warns(AttentionMonitorWarning, match=r"close failed.*BrokenPipeError"):
            monitor.close()
    assert list(RunRecord.open(monitor.record_path).steps) == [0, 1, 2]


# Attach


class BrokenData(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        raise OSError("disk unplugged")


def test_an_attach_that_is_refused_leaves_the_model_as_it_was() -> None:
    refused: dict[str, tuple[Callable[[nn.Module, Any], Any], type[Exception]]] = {
        "probe fetch": (lambda model, _: AttentionMonitor(model, DataLoader(BrokenData())), OSError),
        "probe forward": (lambda model, _: AttentionMonitor(model, token_batch() + 1000), ValueError),
        "unknown metric": (lambda model, o: attach(model, o, token_batch(), metrics=["rank"]), ValueError),
        "forward": (
            lambda model, o: attach(model, o, token_batch(), forward=raising(RuntimeError("forward"))),
            ValueError,
        ),
        "interrupt": (
            lambda model, o: attach(model, o, token_batch(), forward=raising(KeyboardInterrupt())),
            Exception,
        ),
    }
    for make, error in refused.values():
        model, optimizer = new_run()
        before, hooks_before = everything(model, optimizer), hooks(model, optimizer)
        with everything_put_back(), pytest.raises((error, KeyboardInterrupt)):
            make(model, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))
        assert hooks(model, optimizer) == hooks_before
