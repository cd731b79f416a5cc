"""`on_step` takes any step number and any answer of a schedule, and never raises into the training step."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from fault_case import collected_warnings
from models import TinyGPT, token_batch

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import Rule, Threshold

MODEL, PROBE = TinyGPT(), token_batch()


def monitor_with(schedule: Any = 1, **settings: Any) -> AttentionMonitor:
    return AttentionMonitor(
        MODEL, PROBE, schedule, **{"record": None, "metrics": ["energy_rms"], "alerts": False, **settings}
    )


@pytest.mark.parametrize(
    "kind", [int, np.int64, np.int32, float, np.float32, torch.tensor, np.array], ids=lambda kind: kind.__name__
)
def test_whole_numbers_of_any_type_are_steps(kind: Any) -> None:
    monitor = monitor_with(strict=True)
    for step in range(3):
        sample = monitor.on_step(kind(step))
        assert sample is not None
        assert type(sample.global_step) is int
    assert type(monitor.global_step) is int
    assert monitor.history.steps == [0, 1, 2]


NO_STEPS = {
    "None": None,
    "text": "3",
    "half": 2.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "tensor": torch.ones(2),
    "object": object(),
    "list": [1],
}


@pytest.mark.parametrize(
    "step", NO_STEPS, ids=lambda step: f"{type(step).__name__} {step}".split(" object")[0].split("<")[0]
)
def test_other_values_are_one_warning_and_no_step(step: Any) -> None:
    monitor = monitor_with()
    monitor.on_step(0)
    with collected_warnings() as messages:
        assert monitor.on_step(step) is None
        assert monitor.on_step(step) is None
        assert monitor.sample(step).failure
    assert monitor.on_step(1) is not None
    assert len(messages) == 2, messages
    assert "the schedule failed and was ignored" in messages[0]
    assert monitor.failures == 3
    assert monitor.history.steps == [0, 1]


def test_step_that_repeats_or_goes_back_is_not_sampled_again() -> None:
    monitor = monitor_with(strict=True)
    assert [monitor.on_step(step) is not None for step in (0, 1, 1, 0, -7, 2)] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert monitor.history.steps == [0, 1, 2]


def test_jump_of_the_step_takes_no_time() -> None:
    monitor = monitor_with([0], strict=True)
    monitor.on_step(0)
    started = time.monotonic()
    assert monitor.on_step(10**15) is None
    assert time.monotonic() - started < 5
    monitor = monitor_with(100, strict=True)
    monitor.on_step(0)
    assert monitor.on_step(10**15 + 1) is not None


ANSWERS = {
    "numpy": (np.bool_(True), np.bool_(False)),
    "torch": (torch.tensor(True), torch.tensor(False)),
    "None": (1, None),
    "numbers": (2, 0),
    "text": ("yes", ""),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answer_of_a_schedule_may_be_of_any_type(kind: str) -> None:
    yes, no = ANSWERS[kind]
    monitor = monitor_with(lambda step: yes if step % 2 else no, strict=True)
    assert [monitor.on_step(step) is not None for step in range(4)] == [False, True, False, True]


def test_answer_that_is_neither_true_nor_false_is_contained() -> None:
    monitor = monitor_with(lambda step: torch.ones(2))
    with collected_warnings() as messages:
        assert monitor.on_step(0) is None
    assert "the schedule failed and was ignored: RuntimeError: Boolean value" in messages[0]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["schedule", "action", "logger"])
def test_request_to_stop_passes_from_code_of_the_user(where: str, stop: type[BaseException]) -> None:
    def stopping(*_: Any) -> bool:
        raise stop

    class Logger:
        log_sample = stopping

    settings: dict[str, Any] = {"schedule": {"schedule": stopping}, "logger": {"loggers": Logger()}}.get(where, {})
    monitor = monitor_with(**settings)
    if where == "action":
        monitor = action_monitor(stopping)
    with pytest.raises(stop):
        monitor.on_step(0)


def action_monitor(action: Any) -> AttentionMonitor:
    always = Threshold("query_rms", "value", fire_above=-20.0, clear_below=-21.0, quantile=0.5)
    rule = Rule("always", "test", "run", always, patience=1, grace=0)
    return monitor_with(metrics=["query_rms"], alerts=[rule], actions={"always": action})


class Unreadable:
    """An object of the user's whose text and class cannot be read."""

    def __call__(self, event: Any, sample: Any) -> None:
        raise ConnectionError

    def log_sample(self, sample: Any) -> None:
        raise ConnectionError

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    @property
    def __class__(self) -> Any:
        raise RuntimeError("no class")


def test_loggers_and_actions_without_a_text_are_contained() -> None:
    monitor = action_monitor(Unreadable())
    logged = monitor_with(loggers=[Unreadable()])
    with collected_warnings() as messages:
        for step in range(3):
            monitor.on_step(step)
            logged.on_step(step)
    assert len(messages) == 2
    assert all("Unreadable failed and was ignored: ConnectionError" in message for message in messages)


def test_warning_that_cannot_be_shown_does_not_reach_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    monitor = monitor_with(loggers=[Unreadable()])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", broken)
        assert monitor.on_step(0) is not None
    assert monitor.failures == 1
