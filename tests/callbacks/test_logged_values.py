"""What a framework logs stands beside the heads: in ``monitor.logged`` and in the record."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning_run import HELD_OUT, LIGHTNING_WARNINGS, TRAIN, Module, fit
from torch import Tensor
from torch.utils.data import DataLoader
from trainer_run import trainer_of

from attnmonitor.callbacks.lightning import AttentionMonitorCallback
from attnmonitor.callbacks.transformers import AttentionMonitorCallback as TrainerCallback
from attnmonitor.record import RunRecord

pytestmark = LIGHTNING_WARNINGS


class Logs(Module):
    def training_step(self, token_ids: Tensor, index: int) -> Tensor:
        loss = super().training_step(token_ids, index)
        self.log("loss", loss)
        return loss


def test_lightning_metrics_stand_beside_the_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = Logs(), AttentionMonitorCallback(every_n_steps=4, record=tmp_path / "run.sqlite", strict=True)
    loaders = {"train": DataLoader(TRAIN, 4), "val": DataLoader(HELD_OUT, 2)}
    trainer = fit(module, callback, **loaders, log_every_n_steps=2, val_check_interval=3)
    logged = callback.monitor.logged
    assert [step for step, _ in logged["loss"]] == [2, 4, 6]
    torch.testing.assert_close([loss for _, loss in logged["loss"]], module.losses[1::2])
    assert logged["lr"] == [(2, 1e-2), (4, 1e-2), (6, 1e-2)]
    assert logged["val_loss"][-1] == (6, trainer.callback_metrics["val_loss"].item())
    assert RunRecord.open(tmp_path / "run.sqlite").logged == logged


def test_logs_of_the_trainer_stand_beside_the_heads(tmp_path: Path) -> None:
    callback = TrainerCallback(every_n_steps=2, strict=True)
    trainer = trainer_of(tmp_path, callback, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logged = callback.monitor.logged
    for name in ("loss", "eval_loss", "learning_rate"):
        rows = [(row["step"], row[name]) for row in trainer.state.log_history if name in row]
        assert logged[name] == rows
    assert not any(name.startswith("attention/") for name in logged)
    [record] = tmp_path.glob("attnmonitor_runs/*.sqlite")
    assert RunRecord.open(record).logged["loss"] == logged["loss"]
