"""A small Lightning module and a quiet Trainer, for the tests that train in Lightning."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from models import TinyGPT, language_loss, token_batch
from torch import Tensor
from torch.utils.data import DataLoader

# Lightning warns about itself and about tiny runs; for `pytestmark`, so that our own warnings stay errors.
LIGHTNING_WARNINGS = [
    pytest.mark.filterwarnings("ignore:::lightning.*"),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|does not have many workers|log_every_n_steps).*"),
]


class Module(lightning.LightningModule):
    def __init__(self, **size: Any) -> None:
        super().__init__()
        self.gpt = TinyGPT(**size)
        self.losses: list[float] = []
        self.seen: list[int] = []

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.gpt(token_ids)

    def training_step(self, token_ids: Tensor, index: int) -> Tensor:
        loss = language_loss(self(token_ids), token_ids)
        self.losses.append(loss.item())
        self.seen.append(int(token_ids.sum()))
        return loss

    def validation_step(self, token_ids: Tensor, index: int) -> None:
        self.log("val_loss", language_loss(self(token_ids), token_ids))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


TRAIN, HELD_OUT = token_batch(batch=24), token_batch(seed=1, batch=6)


def fit(
    module: Module,
    *callbacks: Callback,
    train: Any = None,
    val: Any = None,
    ckpt_path: Any = None,
    **settings: Any,
) -> lightning.Trainer:
    settings = {
        "max_steps": 6,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        **settings,
    }
    trainer = lightning.Trainer(callbacks=list(callbacks), **settings)
    train = DataLoader(TRAIN, batch_size=4, shuffle=True) if train is None else train
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return trainer
