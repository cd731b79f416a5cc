"""What people get wrong is answered with what arrived and the way out, in one table."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_llama
from models import TinyGPT, token_batch
from synthetic_runs import SyntheticRun

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.cli import main
from attnmonitor.record import RecordWriter
from attnmonitor.scan import scan


def watch(**settings: Any) -> None:
    AttentionMonitor(TinyGPT(), token_batch(), record=None, **settings)


def trainer_with_lightning_callback() -> None:
    from transformers import Trainer, TrainingArguments

    from attnmonitor.callbacks.lightning import AttentionMonitorCallback

    arguments = TrainingArguments("out", report_to="none", use_cpu=True)
    Trainer(torch.nn.Linear(2, 2), arguments, callbacks=[AttentionMonitorCallback()])


def lightning_with_trainer_callback() -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    from attnmonitor.callbacks.transformers import AttentionMonitorCallback

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(callbacks=[AttentionMonitorCallback()], accelerator="cpu", max_steps=1, **quiet).fit(BoringModel())


def lightning_every_0_steps() -> None:
    from attnmonitor.callbacks.lightning import AttentionMonitorCallback

    AttentionMonitorCallback(every_n_steps=0)


def trainer_every_0_steps() -> None:
    from attnmonitor.callbacks.transformers import AttentionMonitorCallback

    AttentionMonitorCallback(every_n_steps=0)


def checkpoint_without_tokenizer() -> None:
    save_llama(Path("model"))
    scan("model", length=16)


def model_without_attention() -> None:
    layers = [torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)]
    AttentionMonitor(torch.nn.Sequential(*layers), torch.randn(2, 4), record=None)


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (
            trainer_with_lightning_callback,
            "lightning.AttentionMonitorCallback is Lightning's .*use .*transformers.A",
        ),
        pytest.param(
            lightning_with_trainer_callback,
            "transformers' Trainer; with Lightning's Trainer use .*lightning.A",
            marks=pytest.mark.skipif(
                version("lightning").startswith("2.5."),
                reason="this Lightning stops before it asks a callback anything",
            ),
        ),
        (lambda: watch(alerts="default"), "alerts='default' is not a list of rules; True turns on the default rules"),
        (lambda: watch(alerts=["enrgy_hot"]), "'enrgy_hot' is a name, not a rule; the default rule 'energy_hot' is"),
        (lambda: watch(actions={"enrgy_hot": "stop"}), "'enrgy_hot' is no rule .* did you mean 'energy_hot'?"),
        (lambda: watch(actions={"critcal": "stop"}), "did you mean 'critical'?"),
        (lambda: watch(actions={"critical": "stp"}), "'stp' is none of .* did you mean 'stop'?"),
        (lambda: watch(schedule=0), r"every\(0\) needs a whole number of optimizer steps, 1 or more"),
        (
            lambda: attach(TinyGPT(), probe=token_batch(), every_n_steps=0, record=None),
            "every_n_steps=0 needs a whole number of optimizer steps, 1 or more",
        ),
        (lightning_every_0_steps, "every_n_steps=0 needs a whole number"),
        (trainer_every_0_steps, "every_n_steps=0 needs a whole number"),
        (checkpoint_without_tokenizer, "no tokenizer in 'model': .*name the folder, id or .gguf file .*--tokenizer"),
        (
            model_without_attention,
            r"no attention was seen .* ran: Linear \(2\), Sequential \(1\), ReLU \(1\)",
        ),
    ],
)
def test_mistake_is_answered_with_the_way_out(mistake: Callable[[], None], says: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        mistake()
    assert re.search(says, " ".join(str(error.value).split()))


def test_report_makes_the_folder_it_is_written_to(tmp_path: Path) -> None:
    run = SyntheticRun(1, 2, 2)
    with RecordWriter(tmp_path / "run.sqlite", run=run.config) as record:
        for sample in run.samples():
            record.append(sample)
    page = tmp_path / "new" / "folder" / "page.html"
    assert main(["report", str(record.path), "--out", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html")
    assert [file.name for file in page.parent.iterdir()] == ["page.html"]
