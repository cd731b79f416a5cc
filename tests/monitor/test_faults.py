"""Whatever fails while sampling, training goes on to the same weights and nothing is left behind."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from fault_case import (
    PROPERTIES,
    FaultCase,
    FaultRun,
    Trained,
    check_strict,
    collected_warnings,
    hooks,
    in_capture,
    in_function,
    in_module,
    in_pending,
    in_reduction,
    new_run,
    raising,
    replaced,
    run_with_fault,
    same_training,
    train_in_three_parts,
    unchanged_process,
    with_batch,
    with_weights,
)
from kept_samples import KeptSamples
from models import TinyGPT, everything, token_batch, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from wandb_files import curve, offline_run

from attnmonitor import AttentionMonitor, Sample
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.loggers import WandbLogger
from attnmonitor.measurement.probe import default_forward
from attnmonitor.messages import AttentionMonitorWarning
from attnmonitor.record import RunRecord

ALWAYS = Threshold("query_rms", "value", fire_above=-20.0, clear_below=-21.0, quantile=0.5)
FIRES_AT_STEP_3 = Rule("always", "test", "run", ALWAYS, patience=4, grace=0)


class Tracker:
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        pass


class WithoutTextError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Forward:
    """A forward that the user gives, and that can be broken."""

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return self.call(model, batch)

    def call(self, model: nn.Module, batch: Any) -> Any:
        return default_forward(model, batch)


def failing_schedule(global_step: int) -> bool:
    if 3 <= global_step <= 5:
        raise ZeroDivisionError("schedule")
    return True


def failing_action(event: Any, sample: Sample) -> None:
    raise ConnectionError("pager is down")


def failing_hook(*_: Any) -> None:
    if not torch.is_grad_enabled():
        raise ZeroDivisionError


LINALG = torch.linalg.LinAlgError("eigh: the algorithm failed to converge")
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
BAD = RuntimeError("bad forward")
LOST_DEVICE = getattr(torch, "AcceleratorError", lambda text, code: RuntimeError(text))("device lost", 1)
WHOLE = r"the sample at step 3 failed and its values are NaN: "
SOME = r"not measured at step 3, and NaN: "
BOTH = SOME + r"blocks\.0\.attn, blocks\.1\.attn \("
FIRST, SECOND, NONE = frozenset({"blocks.0.attn"}), frozenset({"blocks.1.attn"}), frozenset[str]()

FAULTS: dict[str, FaultCase] = {
    # The probe and its forward
    "the user's forward": FaultCase(
        lambda monitor, model, patch: patch.setattr(Forward, "call", raising(TypeError("forward"))),
        WHOLE + "TypeError: forward",
        settings={"forward": Forward()},
    ),
    "a probe on another device": FaultCase(
        with_batch(lambda batch: batch.to("meta")), WHOLE + "(NotImplementedError|RuntimeError)"
    ),
    "unknown token ids": FaultCase(with_batch(lambda batch: batch + 1000), WHOLE + "IndexError: index out of range"),
    "a probe longer than the model": FaultCase(
        with_batch(lambda batch: token_batch(length=40)), WHOLE + "IndexError: index out of range"
    ),
    "the model's eval": FaultCase(
        lambda monitor, model, patch: patch.setattr(model, "eval", raising(RuntimeError("no eval"))),
        WHOLE + "RuntimeError: no eval",
    ),
    **{
        f"the forward of {name or 'the model'}": FaultCase(in_module(name, BAD), WHOLE + "RuntimeError: bad forward")
        for name in (
            "", "tokens", "blocks.0", "blocks.0.attn", "blocks.0.attn.q_proj", "blocks.0.attn.o_proj", "blocks.0.mlp.1",
            "blocks.1.attn.k_proj", "blocks.1.norm2", "batch_norm", "head",
        )
    },
    "a MemoryError": FaultCase(in_module("blocks.1", MemoryError("host")), WHOLE + "MemoryError: host"),
    "a StopIteration": FaultCase(in_module("blocks.1", StopIteration()), WHOLE + "StopIteration"),
    "a RecursionError": FaultCase(in_module("head", RecursionError("deep")), WHOLE + "RecursionError: deep"),
    "a warning that is an error": FaultCase(
        in_module("head", DeprecationWarning("old")), WHOLE + "DeprecationWarning: old"
    ),
    "a hook of the user": FaultCase(
        lambda monitor, model, patch: patch.setattr(model.head, "_forward_hooks", OrderedDict({0: failing_hook})),
        WHOLE + "ZeroDivisionError",
    ),
    "out of memory, with half of the probe too": FaultCase(in_module("blocks.1.mlp", OOM), WHOLE + "OutOfMemory"),
    # One layer
    **{
        f"the reduction of layer {index}": FaultCase(
            in_reduction(f"blocks.{index}.attn", RuntimeError("reduction")),
            SOME + rf"blocks\.{index}\.attn \(measuring failed: RuntimeError: reduction",
            frozenset({f"blocks.{index}.attn"}),
        )
        for index in (0, 1)
    },
    "out of memory in a reduction": FaultCase(in_reduction("blocks.1.attn", OOM), WHOLE + "OutOfMemoryError"),
    "a pending layer": FaultCase(
        in_pending("blocks.0.attn", LINALG), SOME + r"blocks\.0\.attn \(measuring failed: .*LinAlg", FIRST
    ),
    "out of memory in a pending layer": FaultCase(in_pending("blocks.0.attn", OOM), WHOLE + "OutOfMemoryError"),
    "eigenvectors that do not converge": FaultCase(in_function("torch.linalg.eigh", LINALG), BOTH + ".*LinAlg"),
    "the verification": FaultCase(
        in_capture(None, KeyError("rebuild")),
        BOTH + "its attention could not be rebuilt: 'rebuild'",
        strict_raises=False,
    ),
    "the reading of fused attention": FaultCase(
        in_function("attnmonitor.capture.mode.read_sdpa", TypeError("read")), BOTH + ".*read", strict_raises=False
    ),
    "an attention that is gone": FaultCase(
        replaced("blocks.1.attn", nn.Identity()), SOME + r"blocks\.1\.attn \(", SECOND, strict_raises=False
    ),
    # The numbers
    "eigenvalues that do not converge": FaultCase(in_function("torch.linalg.eigvalsh", LINALG), BOTH + ".*LinAlg"),
    "the statistics": FaultCase(
        in_function("attnmonitor.metrics.statistics.key_gram", ArithmeticError("statistics")),
        BOTH + "measuring failed: ArithmeticError",
    ),
    "the mean over sequences": FaultCase(
        in_function("attnmonitor.measurement.collected.sequence_sums", RuntimeError("sum")),
        WHOLE + "RuntimeError: sum",
    ),
    "the transfer to the host": FaultCase(
        in_function("attnmonitor.measurement.unfinished.Transfer", LOST_DEVICE), WHOLE + ".*device lost"
    ),
    "weight metrics": FaultCase(
        in_function("attnmonitor.measurement.weights.WeightMeasurement.take", LINALG),
        WHOLE + ".*LinAlg",
        settings={"metrics": ["energy_effective_rank", "interaction_effective_rank"], "weights_every": 1},
    ),
    "metrics of attention rows": FaultCase(
        in_function("attnmonitor.measurement.attention_values.attention_row_statistics", RuntimeError("rows")),
        BOTH + "measuring failed: RuntimeError: rows",
        settings={"metrics": ["energy_effective_rank", "attention_entropy"], "alerts": False},
    ),
    "NaN in a key projection": FaultCase(
        with_weights("blocks.1.attn.k_proj.weight", torch.nan), "", SECOND, num_failures=0
    ),
    "an infinite query projection": FaultCase(
        with_weights("blocks.1.attn.q_proj.weight", torch.inf), "", SECOND, num_failures=0
    ),
    "NaN in the embedding": FaultCase(with_weights("tokens.weight", torch.nan), "", num_failures=0),
    # The clock, which tests of training loops freeze
    **{
        f"a clock that {how}": FaultCase(
            lambda monitor, model, patch, clock=clock: patch.setattr("attnmonitor.monitor.clock.perf_counter", clock),
            "", NONE, num_failures=0,
        )
        for how, clock in {
            "stands still": lambda: 5.0,
            "runs backwards": functools.partial(next, iter(range(0, -1000, -1))),
            "jumps": functools.partial(next, itertools.cycle([1e18, -1e18])),
            "fails": raising(OSError("clock")),
            "is not a number": lambda: float("nan"),
        }.items()
    },
    # What is done with a sample
    "the verdict": FaultCase(
        in_function("attnmonitor.monitor.sampling.verdict", KeyError("verdict")), "the verdict failed and was", NONE
    ),
    "the history": FaultCase(
        in_function("attnmonitor.record.history.History.append", KeyError("history")),
        "history failed and was ignored: KeyError",
        NONE,
        sampled=False,
    ),
    "what follows the measurement": FaultCase(
        in_function("attnmonitor.monitor.run_alerts.requests_of", KeyError("requests")),
        "the sample failed and was ignored: KeyError",
        NONE,
        sampled=False,
    ),
    "an exception without a text": FaultCase(
        lambda monitor, model, patch: patch.setattr(KeptSamples, "log_sample", raising(WithoutTextError())),
        "KeptSamples failed and was ignored: WithoutTextError",
        NONE,
        settings={"loggers": [KeptSamples()]},
    ),
    "the schedule": FaultCase(
        lambda *_: None, "the schedule failed", NONE, settings={"schedule": failing_schedule}, sampled=False
    ),
    "the alerts": FaultCase(
        in_function("attnmonitor.alerts.Alerts.observe", ValueError("rule")),
        "alerts failed and was ignored: ValueError: rule",
        NONE,
    ),
    "an action": FaultCase(
        lambda *_: None,
        "action failing_action failed and was ignored: ConnectionError: pager is down",
        NONE,
        num_failures=1,
        settings={"alerts": [FIRES_AT_STEP_3], "actions": {"always": failing_action}},
    ),
    "a logger": FaultCase(
        lambda monitor, model, patch: patch.setattr(KeptSamples, "log_sample", raising(OSError("tracker is gone"))),
        "KeptSamples failed and was ignored: OSError",
        NONE,
        settings={"loggers": [KeptSamples()]},
    ),
    "a logger of scalars": FaultCase(
        lambda monitor, model, patch: patch.setattr(Tracker, "log_metrics", raising(TimeoutError("no answer"))),
        "MetricsLogger failed and was ignored: TimeoutError",
        NONE,
        settings={"loggers": [Tracker()]},
    ),
    "the record": FaultCase(
        in_function("attnmonitor.record.writer.RecordWriter.append", MemoryError("row")),
        "record failed and was ignored: MemoryError: row",
        NONE,
        settings={"record": True},
    ),
}  # fmt: skip


@functools.cache
def without_monitor() -> Trained:
    return train_in_three_parts(*new_run())


@functools.cache
def run_of(fault: str) -> FaultRun:
    return run_with_fault(FAULTS[fault], without_monitor())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
def test_fault(fault: str, holds: Callable[[FaultRun], None]) -> None:
    holds(run_of(fault))


@pytest.mark.parametrize("fault", [name for name, case in FAULTS.items() if case.num_failures and case.strict_raises])
def test_strict_raises_the_failure(fault: str) -> None:
    check_strict(FAULTS[fault])


@pytest.mark.parametrize("where", ["tokens", "blocks.0.attn.o_proj", "blocks.1.attn", "head"])
@pytest.mark.parametrize("strict", [False, True])
def test_interrupt_passes_and_leaves_nothing_behind(where: str, strict: bool) -> None:
    model, optimizer = new_run()
    with unchanged_process(), pytest.MonkeyPatch.context() as patch:
        monitor = attach(model, optimizer, token_batch(), schedule=1, strict=strict)
        train(model, optimizer, 2)
        before, hooks_before = everything(model, optimizer), hooks(model, optimizer)
        in_module(where, KeyboardInterrupt())(monitor, model, patch)
        with pytest.raises(KeyboardInterrupt):
            monitor.on_step(3)
        patch.undo()
        assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))
        assert hooks(model, optimizer) == hooks_before
        assert monitor.on_step(4) is not None  # a notebook can go on
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


def test_out_of_memory_retries_half_of_the_sequences() -> None:
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


def test_probe_too_large_in_half_fails_once_per_sample() -> None:
    for batch in (1, 3):
        model, _ = new_run()
        monitor = AttentionMonitor(model, token_batch(batch=batch), record=None)
        out_of_memory_above(model, 0)
        with pytest.warns(AttentionMonitorWarning, match="failed and its values are NaN: OutOfMemoryError"):
            assert monitor.sample(0).failures == 1


def test_tensors_of_a_mapping_are_halved_by_sequence() -> None:
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


def test_five_empty_samples_in_a_row_pause_until_resume() -> None:
    model, optimizer = new_run()
    with pytest.MonkeyPatch.context() as patch, collected_warnings() as messages:
        monitor = attach(model, optimizer, token_batch(), schedule=1, record=None)
        train(model, optimizer, 2)
        in_module("head", BAD)(monitor, model, patch)
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
    failed, paused = messages
    assert "the sample at step 3 failed" in failed
    assert re.search(r"nothing was measured in 5 samples in a row, the last at step 7.*monitor\.resume\(\)", paused)
    monitor.close()


def test_partial_or_separate_failures_do_not_pause() -> None:
    model, _ = new_run()
    monitor = AttentionMonitor(model, token_batch(), 1, record=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttentionMonitorWarning)
        for step in range(12):
            with pytest.MonkeyPatch.context() as patch:
                if step % 4:
                    in_module("head", BAD)(monitor, model, patch)
                monitor.on_step(step)
        with pytest.MonkeyPatch.context() as patch:
            in_reduction("blocks.0.attn", RuntimeError("reduction"))(monitor, model, patch)
            for step in range(12, 20):
                monitor.on_step(step)
    assert not monitor.paused
    assert monitor.failures == 9 + 8


def test_explicit_sample_ends_a_pause() -> None:
    model, _ = new_run()
    monitor = AttentionMonitor(model, token_batch(), 1, record=None)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore", AttentionMonitorWarning)
        in_module("head", BAD)(monitor, model, patch)
        for step in range(8):
            monitor.on_step(step)
    assert monitor.paused
    assert not monitor.sample(8).values["energy_rms"]["blocks.0.attn"].isnan().any()
    assert not monitor.paused
    assert monitor.on_step(9) is not None


# Real faults of what is done with samples


def test_record_waits_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    model, optimizer = new_run()
    with unchanged_process(), collected_warnings() as messages:
        monitor = attach(model, optimizer, token_batch(), schedule=1, record=tmp_path / "runs" / "run.sqlite")
        end = train_in_three_parts(model, optimizer, remove=(tmp_path / "runs").unlink)
        monitor.close()
    assert same_training(end, without_monitor())
    assert len(messages) == 1
    assert list(RunRecord.open(tmp_path / "runs" / "run.sqlite").steps) == list(range(8))


def test_finished_wandb_run_costs_only_its_curves(in_own_folder: Path) -> None:
    run = wandb.init(project="test", dir=in_own_folder)
    model, optimizer = new_run()
    with collected_warnings() as messages:
        kept = KeptSamples()
        monitor = attach(
            model, optimizer, token_batch(), schedule=1, loggers=[WandbLogger(run, image_share=0), kept], record=None
        )
        end = train_in_three_parts(model, optimizer, run.finish)
        monitor.close()
    assert same_training(end, without_monitor())
    assert len(messages) == 1
    assert "WandbLogger failed and was ignored" in messages[0]
    assert [sample.global_step for sample in kept.samples] == list(range(8))
    assert list(curve(offline_run(in_own_folder), "attention/energy_rms/median")) == [0, 1, 2]


def test_record_closes_if_a_logger_fails_to_close() -> None:
    class Sticky(KeptSamples):
        def close(self) -> None:
            raise BrokenPipeError("gone")

    model, optimizer = new_run()
    with unchanged_process():
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


def test_data_that_cannot_be_read_raises_in_training_alone() -> None:
    model, optimizer = new_run()
    loader = DataLoader(BrokenData())
    before, hooks_before = everything(model, optimizer), hooks(model, optimizer)
    monitor = attach(model, optimizer, loader, record=None)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))
    with pytest.raises(OSError, match="disk unplugged"):
        next(iter(loader))
    monitor.close()
    assert hooks(model, optimizer) == hooks_before


def test_refused_attach_leaves_the_model_unchanged() -> None:
    refused: dict[str, tuple[Callable[[nn.Module, Any], Any], type[Exception]]] = {
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
        with unchanged_process(), pytest.raises((error, KeyboardInterrupt)):
            make(model, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))
        assert hooks(model, optimizer) == hooks_before
