"""Samples whose eigenproblems the host's cores solve while training goes on: late, in order, and with the same numbers.

The route is that of a GPU; here it is chosen for tensors on the CPU.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_samples import KeptSamples
from models import TinyGPT, everything, token_batch, train
from torch import Tensor

from attnmonitor import AttentionMonitor, Sample
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.functional.routes import RouteChoice
from attnmonitor.monitor.late import LATE_STEPS, with_requests_of
from attnmonitor.record import RunRecord

CHOICE = RouteChoice("host", (("device", 0.9), ("host", 0.01)), 24, 8)


@pytest.fixture
def host_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every monitor that is attached takes the host's route."""
    monkeypatch.setattr("attnmonitor.measurement.measurement.choose_route", lambda *_: CHOICE)


def same(one: Sample, other: Sample) -> bool:
    return all(
        torch.equal(heads, getattr(other, table)[metric][layer])
        for table in ("values", "spread")
        for metric, layers in getattr(one, table).items()
        for layer, heads in layers.items()
    )


def run(steps: int = 14, **settings: Any) -> tuple[list[Sample], list[Tensor], AttentionMonitor]:
    """Train with a sample every 6 steps; the samples, what the run leaves behind, and the closed monitor."""
    torch.manual_seed(0)
    model = TinyGPT(dropout=0.1, num_kv_heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    kept = KeptSamples()
    monitor = attach(model, optimizer, token_batch(), every_n_steps=6, strict=True, loggers=[kept], **settings)
    train(model, optimizer, steps)
    monitor.close()
    return kept.samples, everything(model, optimizer), monitor


def test_late_samples_are_bit_identical_and_so_is_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, end, _ = run(record=None)
    monkeypatch.setattr("attnmonitor.measurement.measurement.choose_route", lambda *_: CHOICE)
    late, late_end, monitor = run(record=tmp_path / "run.sqlite")
    assert [sample.global_step for sample in late] == [sample.global_step for sample in bare] == [0, 6, 12]
    assert all(map(same, bare, late))
    assert all(map(torch.equal, end, late_end))
    assert {sample.diagnostics["route"] for sample in bare} == {"cpu"}
    assert {sample.diagnostics["route"] for sample in late} == {"host"}
    assert monitor.history.steps == RunRecord.open(tmp_path / "run.sqlite").steps.tolist() == [0, 6, 12]


def test_late_sample_is_delivered_by_steps_not_by_time(host_route: None) -> None:
    monitor = AttentionMonitor(TinyGPT(), token_batch(), 100, record=None, strict=True)
    found = {step: monitor.on_step(step) for step in range(LATE_STEPS + 3)}
    assert {step: sample.global_step for step, sample in found.items() if sample} == {LATE_STEPS: 0}
    assert monitor.on_step(100) is None
    jumped = monitor.on_step(190)
    assert jumped is not None
    assert jumped.global_step == 100
    assert "\neigenproblems: host (24 of 8 × 8: device 900 ms, host 10 ms)" in str(monitor)


def test_next_sample_delivers_the_late_one_first(host_route: None) -> None:
    kept = KeptSamples()
    monitor = AttentionMonitor(TinyGPT(), token_batch(), 2, record=None, strict=True, loggers=[kept])
    returned = [monitor.on_step(step) for step in range(5)]
    assert [sample and sample.global_step for sample in returned] == [None, None, 0, None, 2]
    on_demand = monitor.sample(5)
    assert on_demand.global_step == 5
    assert on_demand.values
    assert [sample.global_step for sample in kept.samples] == monitor.history.steps == [0, 2, 4, 5]


ENDS: dict[str, Callable[[AttentionMonitor], object]] = {
    "close": AttentionMonitor.close,
    "state_dict": AttentionMonitor.state_dict,
    "another state": lambda monitor: monitor.load_state_dict(
        AttentionMonitor(monitor.model, token_batch(), record=None).state_dict()
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_lost_at(end: str, host_route: None) -> None:
    kept = KeptSamples()
    monitor = AttentionMonitor(TinyGPT(), token_batch(), 100, record=None, strict=True, loggers=[kept])
    assert monitor.on_step(0) is None
    ENDS[end](monitor)
    ENDS[end](monitor)
    assert [sample.global_step for sample in kept.samples] == [0]


def test_resumed_run_continues_like_one_that_was_not_stopped(host_route: None) -> None:
    model = TinyGPT()
    whole = AttentionMonitor(model, token_batch(), 3, record=None, strict=True)
    first = AttentionMonitor(model, token_batch(), 3, record=None, strict=True)
    for step in range(8):
        whole.on_step(step)
        first.on_step(step)
    state = first.state_dict()
    second = AttentionMonitor(model, token_batch(), 3, record=None, strict=True)
    second.load_state_dict(state)
    for step in range(8, 12):
        whole.on_step(step)
        second.on_step(step)
    whole.close()
    second.close()
    assert second.history.steps == whole.history.steps == [0, 3, 6, 9]
    for metric in whole.history:
        for layer, trajectory in whole.history[metric].items():
            assert torch.equal(trajectory, second.history[metric][layer])


def test_sample_of_weights_is_finished_at_once(host_route: None) -> None:
    metrics = ["interaction_effective_rank", "key_rank"]
    monitor = AttentionMonitor(TinyGPT(), token_batch(), 100, record=None, strict=True, metrics=metrics)
    sample = monitor.on_step(0)
    assert sample is not None
    assert set(sample.values) == set(metrics)


def test_requests_of_both_samples_of_a_step_are_returned() -> None:
    earlier, later = Sample(0, {}, requests=("stop",)), Sample(4, {}, requests=("checkpoint", "stop"))
    both = with_requests_of(earlier, later)
    assert both is not None
    assert (both.global_step, both.requests) == (4, ("stop", "checkpoint"))
    assert with_requests_of(earlier, None) is earlier
    assert with_requests_of(None, later) is later


def test_copy_of_a_monitor_has_no_late_sample(host_route: None) -> None:
    monitor = AttentionMonitor(TinyGPT(), token_batch(), 100, record=None, strict=True)
    monitor.on_step(0)
    twin = copy.deepcopy(monitor)
    twin.close()
    assert twin.history.steps == []
    monitor.close()
    assert monitor.history.steps == [0]


@pytest.mark.filterwarnings("ignore::attnmonitor.messages.AttentionMonitorWarning")
def test_failure_of_a_late_sample_is_nan_with_its_reason(host_route: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptSamples()
    monitor = AttentionMonitor(TinyGPT(), token_batch(), 100, record=None, loggers=[kept])
    monitor.on_step(0)
    monkeypatch.setattr("attnmonitor.measurement.unfinished.Transfer.result", lambda self: 1 / 0)
    sample = monitor.on_step(50)
    assert sample is kept.samples[0]
    assert "ZeroDivisionError" in str(sample.failure)
    assert all(heads.isnan().all() for layers in sample.values.values() for heads in layers.values())
    monkeypatch.undo()
    assert monitor.sample(51).failure is None


def test_threads_end_with_their_work(host_route: None) -> None:
    before = threading.active_count()
    monitor = AttentionMonitor(TinyGPT(), token_batch(), 1, record=None, strict=True)
    for step in range(3):
        monitor.on_step(step)
    monitor.close()
    for thread in threading.enumerate():
        if thread.name.startswith("attnmonitor"):
            thread.join(5)
    assert threading.active_count() <= before
