"""What holds a monitor can be copied and pickled: the copy of the monitor is closed, and the original goes on."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_case import hooks
from kept_samples import KeptSamples
from models import TinyGPT, token_batch, train

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.lightning import AttentionMonitorCallback as LightningCallback
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.callbacks.transformers import AttentionMonitorCallback as TransformersCallback
from attnmonitor.monitor.schedules import at_steps, every, logarithmic


def saved_whole(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: torch.nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_whole,
    "EMA": lambda module: torch.optim.swa_utils.AveragedModel(module).module,
}


@pytest.mark.parametrize("when", ["before training", "after it"])
@pytest.mark.parametrize("how", COPIES)
def test_copy_of_a_monitor_is_closed_and_has_its_results(how: str, when: str, tmp_path: Path) -> None:
    model = TinyGPT()
    optimizer, logger = torch.optim.SGD(model.parameters(), 0.1), KeptSamples()
    model.monitor = monitor = attach(
        model,
        optimizer,
        token_batch(),
        every_n_steps=1,
        record=tmp_path,
        loggers=[logger],
        forward=lambda model, batch: model(batch),
        actions={"critical": lambda event, sample: None},
    )
    if when == "after it":
        train(model, optimizer, 2)
    before = hooks(model, optimizer), monitor.history.steps
    copied = COPIES[how](model).monitor
    assert type(copied) is AttentionMonitor
    assert copied is not monitor
    assert copied.history.steps == monitor.history.steps
    assert str(copied) == str(monitor)
    assert copied.record_path is None
    assert not hasattr(copied, "model")
    for step in (0, 5, 6):
        assert copied.on_step(step) is None
    assert copied.sample(7).values == {}
    copied.close()
    train(model, optimizer, 1)
    assert before[0] == hooks(model, optimizer)
    assert copied.history.steps == before[1]
    assert monitor.history.steps == [*(before[1] or [0]), len(before[1] or [0])]
    assert len(logger.samples) == len(monitor.history.steps)
    monitor.close()


def test_training_with_an_averaged_copy_is_bit_identical() -> None:
    results = []
    for monitored in (False, True):
        torch.manual_seed(0)
        model = TinyGPT(dropout=0.1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if monitored:
            model.monitor = attach(model, optimizer, token_batch(), every_n_steps=1, record=None)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for step in range(3):
            train(model, optimizer, 1, seed=step)
            averaged.update_parameters(model)
        results.append([*model.state_dict().values(), *averaged.state_dict().values()])
        if monitored:
            model.monitor.close()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


SCHEDULES = {"every": every(3), "steps": at_steps([1, 5]), "logarithmic": logarithmic(4)}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_can_be_pickled(schedule: Any) -> None:
    loaded = pickle.loads(pickle.dumps(schedule))
    assert repr(loaded) == repr(schedule)
    assert [loaded(step) for step in range(50)] == [schedule(step) for step in range(50)]


@pytest.mark.parametrize("kind", [LightningCallback, TransformersCallback])
@pytest.mark.parametrize(
    "settings", [{"every_n_steps": 10}, {"schedule": [1, 2]}, {"schedule": 5, "metrics": ["energy_rms"]}]
)
def test_callback_can_be_pickled_before_training(kind: Any, settings: dict[str, Any]) -> None:
    loaded = pickle.loads(pickle.dumps(kind(token_batch(), **settings)))
    assert type(loaded) is kind
    assert loaded.monitor is None


def test_callback_can_be_copied_during_training(tmp_path: Path) -> None:
    callback = LightningCallback(token_batch(), every_n_steps=1, record=None, loggers=[])
    model = TinyGPT()
    callback.monitor = AttentionMonitor(model, token_batch(), 1, record=None)
    callback.monitor.on_step(0)
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.monitor.history.steps == [0]
        assert copied.state_dict()["global_step"] == 0
