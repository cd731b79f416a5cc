"""Every Python snippet of the README and the quick start runs as written; the examples run at small size."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
import wandb
from checkpoints import save_llama, save_tokenizer
from lightning.pytorch.loggers import WandbLogger
from lightning_run import HELD_OUT, LIGHTNING_WARNINGS, TRAIN, Module
from models import TinyGPT, train
from processes import FSDP2
from torch.utils.data import DataLoader

pytestmark = LIGHTNING_WARNINGS

README = Path(__file__).parents[2] / "README.md"
QUICK_START = README.parent / "docs" / "quick-start.md"
EXAMPLES = README.parent / "examples"
BOTH_PAGES = pytest.mark.parametrize("page", [README, QUICK_START], ids=lambda page: page.stem)


def snippets(page: Path) -> list[str]:
    found = re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(text) for _, text in found]


def snippet(page: Path, containing: str) -> str:
    [found] = [text for text in snippets(page) if containing in text]
    return found


def test_no_snippet_is_left_out() -> None:
    assert len(snippets(README)) == 6
    assert len(snippets(QUICK_START)) == 4


@BOTH_PAGES
def test_lightning_snippet_runs(page: Path, in_own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lightning.Trainer
    small = {"max_steps": 2, "enable_checkpointing": False, "accelerator": "cpu", "enable_progress_bar": False}
    monkeypatch.setattr(lightning, "Trainer", lambda **settings: real(**{**settings, **small}))
    names: dict[str, Any] = {
        "lightning": lightning,
        "WandbLogger": WandbLogger,
        "module": Module(),
        "train_loader": DataLoader(TRAIN, batch_size=4),
        "val_loader": DataLoader(HELD_OUT, batch_size=2),
    }
    exec(snippet(page, "attnmonitor.callbacks.lightning"), names)
    wandb.finish()
    [callback] = [one for one in names["trainer"].callbacks if type(one).__name__ == "AttentionMonitorCallback"]
    assert callback.monitor.history.steps == [0]


@BOTH_PAGES
def test_transformers_snippet_runs(page: Path, in_own_folder: Path) -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50, n_positions=32)
    names: dict[str, Any] = {
        "transformers": transformers,
        "model": transformers.GPT2LMHeadModel(config),
        "args": transformers.TrainingArguments(
            str(in_own_folder),
            max_steps=2,
            report_to=[],
            use_cpu=True,
            per_device_train_batch_size=2,
            disable_tqdm=True,
        ),
        "data": [{"input_ids": row, "labels": row} for row in TRAIN],
    }
    exec(snippet(page, "attnmonitor.callbacks.transformers"), names)
    if page is README:
        names["trainer"].train()
    assert any("attention/energy_rms/median" in row for row in names["trainer"].state.log_history)


def test_raw_snippets_of_readme_run(in_own_folder: Path) -> None:
    model = TinyGPT(num_layers=4)
    names: dict[str, Any] = {"model": model, "probe": HELD_OUT, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    exec(snippet(README, "attach(model, probe"), names)
    train(model, names["optimizer"], 2)
    exec(snippet(README, "monitor.load_state_dict"), names)
    assert names["monitor"].global_step == 2
    exec(snippet(README, "monitor.history"), names)
    names["monitor"].close()
    exec(snippet(README, "RunRecord.open(monitor"), names)
    assert Path("heads.png").stat().st_size > 10_000


def test_quick_start_loop_runs_to_a_verdict(in_own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(snippet(QUICK_START, "attach(model, probe"), names)
    assert "8 heads in 2 layers watched over 31 samples: healthy" in capsys.readouterr().out
    exec(snippet(QUICK_START, "monitor.history"), names)
    assert names["monitor"].firing == []


@pytest.mark.parametrize(
    ("module", "arguments", "printed"),
    [
        ("two_lines", ["10"], "step  10"),
        ("raw_pytorch", ["--steps", "10"], "2 samples; first-layer logits grew up to"),
        ("metrics_alone", ["--steps", "5"], "key_incoherence/head_3"),
        ("own_alert", [], "action: blocks.1.attention head 2 at step"),
        (
            "finetune_trainer",
            ["model", "--steps", "10", "--length", "32"],
            "8 heads in 2 layers watched over 2 samples",
        ),
        ("audit", ["model", "--length", "64"], "model: 8 heads, 0 layers not seen"),
    ],
)
def test_example_runs(
    module: str, arguments: list[str], printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "model" in arguments:
        save_llama(Path("model")), save_tokenizer(Path("model"))
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    runpy.run_path(str(EXAMPLES / f"{module}.py"), run_name="__main__")
    wandb.finish()
    assert printed in capsys.readouterr().out


def test_demo_writes_picture_report_and_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnmonitor.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    assert main(["demo", "--steps", "10", "--out", "out"]) == 0
    wandb.finish()
    assert "64 heads" in capsys.readouterr().out
    assert {"heads.png", "report.html", "wandb", "attnmonitor_runs"} <= {path.name for path in Path("out").iterdir()}


def test_distributed_example_runs_under_torchrun() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    strategy = "fsdp" if FSDP2 else "ddp"
    example = [str(EXAMPLES / "distributed.py"), "--strategy", strategy, "--steps", "10"]
    done = subprocess.run([*torchrun, *example], capture_output=True, text=True, timeout=240, check=False)
    assert "2 samples of a model on 2 processes" in done.stdout, done.stderr


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_workspace_example_prints_what_it_would_send(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setattr(sys, "argv", ["wandb_workspace", "team", "project", "--loss", "train/loss"])
    runpy.run_path(str(EXAMPLES / "wandb_workspace.py"), run_name="__main__")
    sent = capsys.readouterr().out
    assert all(key in sent for key in ("attention/verdict", "attention/alerts/firing", "train/loss"))
    assert all(f"attention/{metric}/heads" in sent for metric in ("energy_rms", "key_incoherence"))


def test_every_example_is_tested_and_in_the_readme() -> None:
    examples = {path.stem for path in EXAMPLES.glob("*.py")}
    run = Path(__file__).read_text()
    assert [name for name in examples if f'"{name}",' not in run and f"{name}.py" not in run] == []
    assert [name for name in examples if f"examples/{name}.py" not in README.read_text()] == []
