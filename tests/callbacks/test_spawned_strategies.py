"""Lightning's strategies that start their processes inside ``fit``: spawned, forked, and forked in a notebook."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from models import TinyGPT, language_loss, token_batch
from torch import Tensor
from torch.utils.data import DataLoader

from attnmonitor.callbacks.lightning import AttentionMonitorCallback
from attnmonitor.record import RunRecord


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.gpt = TinyGPT(dropout=0.1)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.gpt(token_ids)

    def training_step(self, token_ids: Tensor, index: int) -> Tensor:
        return language_loss(self(token_ids), token_ids)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def fit(strategy: str, folder: str, *callbacks: AttentionMonitorCallback) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(token_batch(batch=24), batch_size=2, shuffle=True))
    return module.state_dict()


def main(strategy: str) -> None:
    torch.set_num_threads(1)
    torch.save([fit(strategy, "bare"), fit(strategy, "watched", AttentionMonitorCallback(every_n_steps=2))], "ends.pt")


@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_started_inside_fit_are_watched(strategy: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error::attnmonitor.messages.AttentionMonitorWarning", __file__, strategy]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-6000:]
    bare, watched = torch.load(tmp_path / "ends.pt")
    assert all(torch.equal(one, watched[name]) for name, one in bare.items())
    assert not torch.equal(next(iter(bare.values())), next(iter(Module().state_dict().values())))
    [record] = (tmp_path / "watched" / "attnmonitor_runs").glob("*.sqlite")
    assert list(RunRecord.open(record).steps) == [0, 2, 4]
    assert "4 heads" in ran.stdout or "8 heads in 2 layers" in ran.stdout


if __name__ == "__main__":
    main(sys.argv[1])
