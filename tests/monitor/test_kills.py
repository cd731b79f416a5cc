"""A run killed by ``kill -9`` at random moments and resumed ends like one that was never killed.

A training process is killed some milliseconds after one of its steps: while it samples, logs, writes its checkpoint or
trains. The next process resumes from the last complete checkpoint, until the run has ended. History, alerts, record
and W&B curves are then compared with those of an unkilled run, bit for bit.

The W&B client is a separate process that writes offline rows in blocks of 32 KiB. What it has not written when its
parent dies is lost, the user's rows as well as ours. The models have enough heads for one sample to fill a block.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger as LightningWandb
from models import TinyGPT, language_loss, token_batch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from wandb_files import curve, offline_run

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.callbacks.lightning import AttentionMonitorCallback as LightningCallback
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.callbacks.transformers import AttentionMonitorCallback as TrainerMonitorCallback
from attnmonitor.loggers import WandbLogger
from attnmonitor.messages import AttentionMonitorWarning
from attnmonitor.record import RunRecord

EVERY, SAVE_EVERY = 2, 3
PROBE = token_batch(seed=7, batch=2, length=12)
# Fires with the eighth sample, if none of the seven before is lost or counted twice.
ALWAYS = Threshold("query_rms", "value", fire_above=-20.0, clear_below=-21.0, quantile=0.5)
RULE = Rule("always", "test", "run", ALWAYS, patience=8, grace=0)
SETTINGS: dict[str, Any] = {"every_n_steps": EVERY, "alerts": [RULE], "record": "run.sqlite"}

Report = Callable[[int], None]
"""Tells the test that a step is done."""


def small_gpt() -> TinyGPT:
    return TinyGPT(num_layers=6, num_query_heads=8)


def curves_in(run: Any) -> WandbLogger:
    return WandbLogger(run, image_share=0)  # drawing images takes longer than training


def raw_loop(num_steps: int, folder: str, report: Report) -> AttentionMonitor:
    torch.manual_seed(0)
    model = small_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    saved = Path("checkpoint.pt")
    with wandb.init(project="test", id="run", resume="allow", dir=folder) as run:
        monitor, step = attach(model, optimizer, PROBE, loggers=curves_in(run), **SETTINGS), 0
        if saved.exists():
            state = torch.load(saved, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            monitor.load_state_dict(state["monitor"])
            step = state["step"]
        while step < num_steps:
            token_ids = token_batch(seed=step)
            loss = language_loss(model(token_ids), token_ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            run.log({"loss": loss.item()})
            report(step)
            if step % SAVE_EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save({**state, "monitor": monitor.state_dict()}, "unfinished.pt")
                os.replace("unfinished.pt", saved)
        monitor.close()
    return monitor


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.gpt = small_gpt()

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.gpt(token_ids)

    def training_step(self, batch: Any, index: int) -> Tensor:
        token_ids = token_batch(seed=self.global_step)  # by step: Lightning restarts the epoch when it resumes
        loss = language_loss(self(token_ids), token_ids)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def in_lightning(num_steps: int, folder: str, report: Report) -> AttentionMonitor:
    class Reporting(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            report(trainer.global_step)

    torch.manual_seed(0)
    logger = LightningWandb(save_dir=folder, id="run", offline=True)
    watcher = LightningCallback(PROBE, loggers=curves_in(logger.experiment), **SETTINGS)
    saving = ModelCheckpoint("checkpoints", "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=num_steps, max_epochs=-1, accelerator="cpu", log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[watcher, Reporting(), saving], logger=logger,
    )  # fmt: skip
    saved = last(Path("checkpoints").glob("*.ckpt"), num_steps, readable)
    trainer.fit(Module(), DataLoader(torch.zeros(9, 1)), ckpt_path=saved)
    wandb.finish()
    assert watcher.monitor is not None
    return watcher.monitor


def in_trainer(num_steps: int, folder: str, report: Report) -> AttentionMonitor:
    class Reporting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report(state.global_step)

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=6, n_head=8, n_positions=32))
    rows = [{"input_ids": row, "labels": row} for row in token_batch(batch=40, length=16)]
    with wandb.init(project="test", id="run", resume="allow", dir=folder) as run:
        callback = TrainerMonitorCallback(PROBE, loggers=curves_in(run), **SETTINGS)
        arguments = TrainingArguments(
            output_dir="checkpoints", max_steps=num_steps, save_steps=SAVE_EVERY, logging_steps=1, use_cpu=True,
            report_to="wandb", disable_tqdm=True, lr_scheduler_type="constant", per_device_train_batch_size=2,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback, Reporting()])
        # The monitor's state is written last.
        saved = last(Path("checkpoints").glob("*-*"), num_steps, lambda at: readable(at / "attnmonitor.pt"))
        trainer.train(resume_from_checkpoint=saved)
    assert callback.monitor is not None
    return callback.monitor


def last(checkpoints: Any, num_steps: int, is_whole: Callable[[Path], bool]) -> str | None:
    """The newest complete checkpoint before the last step.

    From a checkpoint of the last step Lightning resumes nothing, and the Trainer takes one step too many.
    """

    def step_of(path: Path) -> int:
        return int(re.findall(r"\d+", path.name)[0])

    unfinished = [path for path in checkpoints if step_of(path) < num_steps]
    newest_first = sorted(unfinished, key=step_of, reverse=True)
    return next((str(path) for path in newest_first if is_whole(path)), None)


def readable(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


def process(
    target: Callable[..., AttentionMonitor], num_steps: int, folder: str, send: Connection, *, is_killed: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = target(num_steps, folder, send.send)
    messages = [str(warning.message) for warning in caught if warning.category is AttentionMonitorWarning]
    torch.save({"state": monitor.state_dict(), "firing": len(monitor.firing), "messages": messages}, "end.pt")
    if is_killed:
        signal.pause()  # the kill may come after the run has ended


def start(
    target: Callable[..., AttentionMonitor], num_steps: int, folder: str, *, is_killed: bool
) -> tuple[Any, Connection]:
    """Fork a process: importing everything again would take longer than the run."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    started = context.Process(target=process, args=(target, num_steps, folder, send), kwargs={"is_killed": is_killed})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads in forked children
        started.start()
    send.close()
    return started, receive


def run_and_kill(target: Callable[..., AttentionMonitor], num_steps: int, kill_at: list[int]) -> list[str]:
    """Train in the working directory through the kills; return the folder of each process."""
    folders = []
    for step in [*kill_at, None]:
        folders.append(f"process{len(folders)}")
        Path(folders[-1]).mkdir()
        running, pipe = start(target, num_steps, folders[-1], is_killed=step is not None)
        reached = 0
        while step is not None and reached < step:
            reached = pipe.recv()
        if step is not None:
            time.sleep(random.uniform(0, 0.1))
            running.kill()
        running.join()
        pipe.close()
        assert running.exitcode == (0 if step is None else -9)
    return folders


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (one != one and other != other)


@pytest.mark.parametrize("num_kills", [1, pytest.param(17, marks=pytest.mark.soak)])
@pytest.mark.parametrize("target", [raw_loop, in_lightning, in_trainer])
def test_killed_and_resumed_run_ends_like_an_unkilled_one(
    target: Callable[..., AttentionMonitor], num_kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.teardown()  # the killed processes must not share the client's process
    num_steps = 12 + 3 * num_kills
    kill_at = sorted(random.sample(range(1, num_steps), num_kills))
    print("killed after steps", kill_at)
    ends, records, folders = {}, {}, {}
    for name, kills in (("whole", []), ("killed", kill_at)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        folders[name] = [tmp_path / name / folder for folder in run_and_kill(target, num_steps, kills)]
        ends[name] = torch.load("end.pt", weights_only=True)
        assert ends[name]["state"].pop("record") == str(tmp_path / name / "run.sqlite")
        records[name] = RunRecord.open(tmp_path / name / "run.sqlite")
    steps = list(range(0, num_steps + 1, EVERY))
    assert ends["whole"]["messages"] == ends["killed"]["messages"] == []
    assert ends["whole"]["state"]["history"]["steps"] == records["whole"].steps.tolist() == steps
    assert records["whole"].events[0].global_step == steps[7]
    assert ends["whole"]["firing"] == 1
    # A framework may log a step after its checkpoint is written: a curve then lacks that step of a killed run.
    curves = [
        ends[name]["state"].pop("logged").get("loss", {"steps": [], "values": []}) for name in ("killed", "whole")
    ]
    killed, whole = (dict(zip(list(curve["steps"]), list(curve["values"]), strict=True)) for curve in curves)
    killed, whole = ({int(step): float(value) for step, value in curve.items()} for curve in (killed, whole))
    assert killed.items() <= whole.items()
    assert len(killed) >= len(whole) - num_kills
    assert same(ends["killed"], ends["whole"])
    assert records["killed"].steps.tolist() == steps
    assert records["killed"].events == records["whole"].events
    for metric in records["whole"].metrics:
        whole, killed = (records[name].trajectories(metric) for name in ("whole", "killed"))
        assert same(
            {k: torch.from_numpy(v) for k, v in killed.items()}, {k: torch.from_numpy(v) for k, v in whole.items()}
        )
    [whole] = (offline_run(folder) for folder in folders["whole"])
    parts = [offline_run(folder, killed=folder != folders["killed"][-1]) for folder in folders["killed"]]
    for key in (f"attention/{metric}/layer_05/head_07" for metric in records["whole"].metrics):
        expected = curve(whole, key)
        assert list(expected) == steps
        drawn = [curve(part, key) for part in parts]
        for points in drawn:
            assert points.items() <= expected.items()  # a point drawn twice is the same point
            # Only the newest points of a killed process may be missing, never one between others.
            assert not points or list(points) == list(range(min(points), max(points) + 1, EVERY))
        assert max(drawn[-1]) == steps[-1]
        # Steps take milliseconds here, so the client may be a few steps behind on a busy machine.
        assert len(expected.keys() - set().union(*drawn)) <= 3 * num_kills
