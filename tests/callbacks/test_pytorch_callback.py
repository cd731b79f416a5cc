"""What `attach` adds to a monitor: the optimizer's steps, and a final report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TinyGPT, token_batch, train

from attnmonitor.callbacks.lightning import AttentionMonitorCallback as LightningCallback
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.callbacks.transformers import AttentionMonitorCallback as TransformersCallback
from attnmonitor.messages import AttentionMonitorWarning


def attached(**settings: Any) -> tuple[TinyGPT, torch.optim.Optimizer, Any]:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return model, optimizer, attach(model, optimizer, token_batch(), **{"every_n_steps": 1, **settings})


REPORT = "attnmonitor: unknown: 8 heads in 2 layers watched over 3 samples: no alarm, but"


def test_final_report_is_printed_on_close(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer, monitor = attached(record=tmp_path / "run.sqlite")
    train(model, optimizer, 2)
    assert capsys.readouterr().out == ""
    monitor.close()
    printed = capsys.readouterr().out
    assert REPORT in printed
    assert f"report {tmp_path / 'run.sqlite'}" in printed
    monitor.close()
    assert capsys.readouterr().out == ""


PROGRAM = """
import os, torch
from attnmonitor.callbacks.pytorch import attach
from models import TinyGPT, token_batch, train
model = TinyGPT()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
monitor = attach(model, optimizer, token_batch(), every_n_steps=1)
train(model, optimizer, 2)
if not os.fork():
    raise SystemExit  # a forked child must not end its parent's run
os.wait()
{}
"""


@pytest.mark.parametrize(("end", "code"), [("", 0), ("1 / 0", 1), ("monitor.close()", 0)])
def test_final_report_is_printed_once_at_exit(end: str, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(end)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == code
    assert done.stdout.count("attnmonitor: unknown: 8 heads") == 1
    assert REPORT in done.stdout
    (record,) = (tmp_path / "attnmonitor_runs").glob("*.sqlite")
    assert f"{sys.executable} -m attnmonitor report attnmonitor_runs/{record.name}" in done.stdout
    assert not list(tmp_path.glob("attnmonitor_runs/*-wal"))


@pytest.mark.parametrize("make", [lambda **settings: attached(**settings), LightningCallback, TransformersCallback])
def test_wrong_arguments_are_refused_at_construction(make: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'logger'; did you mean loggers"):
        make(logger=None)
    for name, wrong, message in (
        ("metrics", ["energy_rank"], "unknown metric 'energy_rank'; did you mean 'energy"),
        ("alerts", "default", "alerts='default' is not a list of rules; True turns on"),
        ("actions", ["stop"], r"actions=\['stop'\] is not a mapping; give what to do"),
        ("actions", {"critical": None}, r"actions\['critical'\]: None is none of"),
        ("loggers", object(), "loggers: object has neither log_sample"),
        ("name", "a/b", "name='a/b'"),
        ("forward", "forward", "forward='forward' is not callable"),
        ("skip_hooks", True, "skip_hooks=True is not callable"),
        ("packed", "both", "packed='both'; give"),
        ("processes", "each", "processes='each'; give"),
        ("weights_every", 0, "weights_every=0 must be"),
        ("decode", 7, "decode=7 is neither a function nor a tokenizer"),
        ("every_n_steps", "100", "every_n_steps='100' needs a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**{name: wrong})


def test_optimizer_of_another_model_warns_and_is_followed() -> None:
    model, other = TinyGPT(), TinyGPT()
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    with pytest.warns(AttentionMonitorWarning, match="optimizer=SGD has none of the model's parameters"):
        monitor = attach(model, optimizer, token_batch(), every_n_steps=1, record=None)
    train(other, optimizer, 1)
    assert monitor.history.steps == [0, 1]
    monitor.close()


def test_second_monitor_of_the_same_name_warns() -> None:
    model = TinyGPT()
    optimizer, probe = torch.optim.SGD(model.parameters(), 0.1), token_batch()
    with attach(model, optimizer, probe, record=None):
        attach(model, optimizer, probe, record=None, name="longer").close()
        with pytest.warns(AttentionMonitorWarning, match="a monitor is attached to this optimizer already"):
            attach(model, optimizer, probe, record=None).close()
    attach(model, optimizer, probe, record=None).close()  # warnings are errors here


def test_unknown_layer_name_lists_the_known_ones() -> None:
    _, _, monitor = attached(record=None)
    for asked in (monitor.coverage, monitor.history["energy_rms"]):
        with pytest.raises(KeyError, match=r"no layer 'blocks\.1\.attention'; did you mean 'blocks\.1\.attn' or"):
            asked["blocks.1.attention"]
        with pytest.raises(KeyError, match=r"no layer 'x'; there are blocks\.0\.attn, blocks\.1\.attn"):
            asked["x"]
        assert asked.get("x") is None
