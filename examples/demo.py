"""The demo: a GPT learns English on your CPU while every one of its 64 attention heads is watched.

Trains with Lightning for about a minute and a half, logs to Weights & Biases (offline unless WANDB_API_KEY is set),
and ends with a verdict, the heads that stand out, and where everything lies. ``raw_pytorch.py`` is the same run
without Lightning.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.lightning import AttentionMonitorCallback
from attnmonitor.examples.small_gpt import SmallGPT, english, next_token_loss, windows
from attnmonitor.plots import overview
from attnmonitor.record import RunRecord
from attnmonitor.report import write_report

WARM_UP_STEPS = 30


class LanguageModel(lightning.LightningModule):
    """A small GPT as a LightningModule: nothing in it knows that it is watched."""

    def __init__(self, vocabulary: int, **size: int) -> None:
        super().__init__()
        self.gpt = SmallGPT(vocabulary, **size)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits of the next token."""
        return self.gpt(token_ids)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """One step of language modelling."""
        loss = next_token_loss(self, batch[0])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        """The same loss on text that is not trained on."""
        self.log("val_loss", next_token_loss(self, batch[0]), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with a short warm-up."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


def run(out: Path, *, num_steps: int, batch: int = 8, length: int = 128, **size: int) -> AttentionMonitor:
    """Train, watched; return the monitor."""
    lightning.seed_everything(0, verbose=False)
    text, vocabulary = english()
    examples = windows(text, length)
    held_out, trained_on = examples[: 4 * batch], examples[4 * batch :]
    watcher = AttentionMonitorCallback(every_n_steps=8)  # 26 samples: every rule has what it waits for
    trainer = lightning.Trainer(
        max_steps=num_steps,
        callbacks=[watcher],
        logger=WandbLogger(project="attnmonitor-demo", save_dir=out, offline="WANDB_API_KEY" not in os.environ),
        default_root_dir=out,
        accelerator="cpu",
        limit_val_batches=2,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(
        LanguageModel(vocabulary, max_length=length, **size),
        DataLoader(TensorDataset(trained_on), batch_size=batch, shuffle=True),
        DataLoader(TensorDataset(held_out), batch_size=batch),
    )
    assert watcher.monitor is not None
    return watcher.monitor


def tell(monitor: AttentionMonitor, out: Path) -> None:
    """Draw what was seen, and print where to look further: what it comes to the callback has said."""
    path = monitor.record_path or out
    picture, report = out / "heads.png", write_report(path, out / "report.html")
    overview(RunRecord.open(path)).savefig(picture, dpi=150)
    for what, where in {
        "picture": picture,
        "report": report,
        "W&B run": max((out / "wandb").glob("*run-*"), key=os.path.getmtime, default="-"),
    }.items():
        print(f"{what:8s} {where}")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for everything that is written")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    options = parser.parse_args(arguments)
    # Two cores are busy enough without data workers; the other one is between Lightning and torch.
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec).*")
    tell(run(options.out, num_steps=options.steps), options.out)


if __name__ == "__main__":
    main()
