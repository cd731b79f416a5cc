"""The metrics as ordinary torchmetrics in your own LightningModule, without the monitor."""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from attnmonitor.capture import AttentionCall, capture_attention
from attnmonitor.cli.demo import SmallGPT, english, next_token_loss, windows
from attnmonitor.metrics import EnergyEffectiveRank, KeyIncoherence

NUM_HEADS = 4


class LanguageModel(lightning.LightningModule):
    """A GPT that measures the heads of its last layer over the whole validation set."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.gpt = SmallGPT(vocabulary, width=64, num_layers=2, num_heads=NUM_HEADS, max_length=64)
        self.energy_rank = EnergyEffectiveRank(num_heads=NUM_HEADS)
        self.incoherence = KeyIncoherence(num_heads=NUM_HEADS)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """Return the loss of one batch."""
        return next_token_loss(self.gpt, batch[0])

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        """Log the loss, and update the metrics with the queries and keys of the last layer."""

        def measure(call: AttentionCall) -> None:
            if call.layer == "blocks.1.attention":
                self.energy_rank.update(call.query, call.key, call.key_mask)
                self.incoherence.update(call.key, call.key_mask)

        with capture_attention(self.gpt, measure):
            self.log("val_loss", next_token_loss(self.gpt, batch[0]))

    def on_validation_epoch_end(self) -> None:
        """Log one value per head: the mean over all validation sequences of all processes."""
        for name, metric in (("energy_rank", self.energy_rank), ("key_incoherence", self.incoherence)):
            self.log_dict({f"{name}/head_{head}": value for head, value in enumerate(metric.compute())})
            metric.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(arguments: list[str] | None = None) -> None:
    """Train for a few steps and print the metrics of the validation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    options = parser.parse_args(arguments)

    text, vocabulary = english()
    examples = windows(text, 64)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        limit_val_batches=4,
        num_sanity_val_steps=0,
        val_check_interval=options.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        LanguageModel(vocabulary),
        DataLoader(TensorDataset(examples[64:]), batch_size=8),
        DataLoader(TensorDataset(examples[:64]), batch_size=8),
    )
    for name, value in trainer.callback_metrics.items():
        print(f"{name:24s} {value:.2f}")


if __name__ == "__main__":
    main()
