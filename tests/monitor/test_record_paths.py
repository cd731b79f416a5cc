"""Where a run's record lies: the same file whatever becomes of the working directory or of the file itself."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TinyGPT, token_batch, train

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.monitor.final_report import print_final_report
from attnmonitor.record import RunRecord


@pytest.mark.parametrize("record", [True, "runs", "mine.sqlite", Path("deep") / "mine.sqlite"])
def test_record_stays_where_it_was_attached(
    record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "first").mkdir(), (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    monitor = AttentionMonitor(TinyGPT(), token_batch(), record=record)
    os.chdir(tmp_path / "second")
    monitor.sample(0)
    monitor.sample(1)
    path = monitor.record_path
    assert path is not None
    assert path.is_absolute()
    print_final_report(monitor)
    assert f"report {path}" in capsys.readouterr().out.replace("'", "")
    os.chdir(tmp_path / "first")
    print_final_report(monitor)
    assert f"report {path.relative_to(tmp_path / 'first')}" in capsys.readouterr().out.replace("'", "")
    os.chdir(tmp_path / "second")
    monitor.sample(2)
    monitor.close()
    [file] = tmp_path.rglob("*.sqlite")
    assert file == path
    assert RunRecord.open(file).steps.tolist() == [0, 1, 2]


def test_resumed_run_finds_its_record_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first").mkdir(), (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    with AttentionMonitor(TinyGPT(), token_batch()) as monitor:
        monitor.sample(0)
    state = monitor.state_dict()
    monkeypatch.chdir(tmp_path / "second")
    with AttentionMonitor(TinyGPT(), token_batch()) as resumed:
        resumed.load_state_dict(state)
        resumed.sample(1)
    [file] = tmp_path.rglob("*.sqlite")
    assert RunRecord.open(file).steps.tolist() == [0, 1]
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    shutil.rmtree(tmp_path / "first")
    monkeypatch.chdir(tmp_path / "copy")
    with AttentionMonitor(TinyGPT(), token_batch()) as resumed:
        resumed.load_state_dict(state)
        resumed.sample(2)
    [file] = tmp_path.rglob("*.sqlite")
    assert RunRecord.open(file).steps.tolist() == [0, 1, 2]


def test_working_directory_that_is_gone_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monitor = AttentionMonitor(TinyGPT(), token_batch())
            monitor.sample(0)
            print_final_report(monitor)
            monitor.close()
    finally:
        os.chdir(tmp_path)
    assert monitor.history.steps == [0]


def test_moved_record_counts_as_a_failure_of_the_monitor(tmp_path: Path) -> None:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(model, optimizer, token_batch(), every_n_steps=1, record=tmp_path / "live.sqlite") as monitor:
        train(model, optimizer, 2)
        (tmp_path / "live.sqlite").rename(tmp_path / "moved.sqlite")
        with pytest.warns(UserWarning, match="the run record was moved"):
            train(model, optimizer, 2)
    assert monitor.failures == 1
    assert RunRecord.open(tmp_path / "moved.sqlite").steps.tolist() == [0, 1, 2]
    assert RunRecord.open(tmp_path / "live.sqlite").steps.tolist() == [3, 4]


def test_path_of_a_closed_record_is_the_one_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.sqlite").mkdir()
    monitor = AttentionMonitor(TinyGPT(), token_batch(), record=tmp_path / "run.sqlite")
    with pytest.warns(UserWarning, match="not a regular file"):
        monitor.sample(0)
    monitor.close()
    print_final_report(monitor)
    assert monitor.record_path == tmp_path / "run-2.sqlite"
    assert "run-2.sqlite" in capsys.readouterr().out
    assert list(RunRecord.open(monitor.record_path).steps) == [0]
