"""What training logs beside the heads: kept in memory, in checkpoints and in the record, within bounds."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TinyGPT, token_batch
from torch.utils._python_dispatch import TorchDispatchMode

from attnmonitor import AttentionMonitor
from attnmonitor.messages import AttentionMonitorWarning
from attnmonitor.record import RecordWriter, RunRecord
from attnmonitor.record.training_log import TrainingLog
from attnmonitor.sample import Sample


def watched(path: Path | None) -> AttentionMonitor:
    return AttentionMonitor(TinyGPT(num_layers=1), token_batch(), 2, record=path)


def test_logged_values_are_in_monitor_state_and_record(tmp_path: Path) -> None:
    path, buffer = tmp_path / "run.sqlite", io.BytesIO()
    monitor = watched(path)
    loss = torch.tensor([0.0], requires_grad=True)
    for step in range(4):
        monitor.on_step(step)
        monitor.log(loss=loss + step, lr=0.5)
        monitor.log(step=10 * step, accuracy=math.inf if step else math.nan)
    expected = [(step, float(step)) for step in range(4)]
    assert monitor.logged["loss"] == expected
    assert monitor.logged["lr"] == [(step, 0.5) for step in range(4)]
    assert RunRecord.open(path).logged["loss"] == expected[:2], "with the sample that follows"
    torch.save(monitor.state_dict(), buffer)
    monitor.close()
    logged = RunRecord.open(path).logged
    assert logged.keys() == monitor.logged.keys()
    assert logged["loss"] == expected
    assert math.isnan(logged["accuracy"][0][1])
    assert logged["accuracy"][1:] == [(10, math.inf), (20, math.inf), (30, math.inf)]

    resumed = watched(tmp_path / "run.sqlite")
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    resumed.log(loss=9.0, step=2)  # from an older checkpoint: what came later did not happen
    resumed.on_step(6)
    resumed.close()
    assert resumed.logged["loss"] == RunRecord.open(path).logged["loss"] == [(0, 0.0), (1, 1.0), (2, 9.0)]


def test_long_curves_are_thinned_and_their_whole_run_kept() -> None:
    log = TrainingLog()
    for step in range(50_000):
        log.add(step, {"loss": float(step)})
    curve, rows = log.curves["loss"], log.take_new()
    steps = [step for step, _ in curve]
    assert 5000 <= len(curve) <= 10_000
    assert steps[0] == 0
    assert steps[-1] > 49_980
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 16
    assert len(rows) < 30_000
    assert log.take_new() == []


class NoRead(TorchDispatchMode):
    """Refuses what makes a program wait for its device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        return func(*args, **(kwargs or {}))


def test_a_logged_tensor_is_copied_and_not_read() -> None:
    monitor, loss = watched(None), torch.ones(())
    with NoRead():
        monitor.log(loss=loss)
        loss += 1
    assert monitor.logged == {"loss": [(0, 1.0)]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "low"}, "loss='low' is not a number"),
        ({"loss": torch.ones(2)}, "loss: a tensor of shape .2,. is not one number"),
        ({"loss": 1.0, "step": -1}, "step=-1 must be 0 or more"),
        ({"loss": 1.0, "step": 1.5}, "1.5 is not a whole number"),
        ({f"name {index}": 1.0 for index in range(101)}, "'name 100' is not logged: 100 other names are"),
    ],
)
def test_wrong_value_is_one_warning_and_no_exception(values: Any, message: str) -> None:
    monitor = watched(None)
    with pytest.warns(AttentionMonitorWarning, match=message) as caught:
        returned = [monitor.log(**values) for _ in range(3)]
    assert returned == [None] * 3
    assert len(caught) == 1
    assert monitor.failures == 3
    strict = AttentionMonitor(TinyGPT(num_layers=1), token_batch(), record=None, strict=True)
    with pytest.raises(ValueError, match=message):
        strict.log(**values)


def test_record_without_the_table_opens_and_continues(tmp_path: Path) -> None:
    path = tmp_path / "older.sqlite"
    with RecordWriter(path, run={}) as record:
        record.append(Sample(0, {"key_rms": {"h": torch.ones(2)}}))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TABLE logged")
    db.close()
    assert RunRecord.open(path).logged == {}
    with RecordWriter(path, run={}) as record:
        record.log([(1, "loss", 2.5)])
        record.append(Sample(1, {"key_rms": {"h": torch.ones(2)}}))
    assert RunRecord.open(path).logged == {"loss": [(1, 2.5)]}
    assert list(RunRecord.open(path).steps) == [0, 1]
