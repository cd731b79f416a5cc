"""Train a small GPT on English on the CPU, with each of its 64 attention heads measured.

It trains with Lightning for about a minute and a half, logs to Weights & Biases (offline unless WANDB_API_KEY is set),
and ends with a verdict, the outlier heads, and the paths of all files. ``examples/raw_pytorch.py`` is the same run
without Lightning. The examples and benchmarks train the same model on the same text: the language reference that Python
ships (``pydoc_data.topics``, about half a million characters), one token per character, so nothing is downloaded.
"""

from __future__ import annotations

import os
import pydoc_data.topics
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attnmonitor import AttentionMonitor
from attnmonitor.parallel.process_state import first_import

WARM_UP_STEPS = 30


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed positions: ``(B, L, width)`` in and out."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention, then the MLP: ``(B, L, width)`` in and out."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class SmallGPT(nn.Module):
    """A GPT-2-like language model; 6.4 million parameters in 64 heads at its default size."""

    def __init__(
        self, vocabulary: int, *, width: int = 256, num_layers: int = 8, num_heads: int = 8, max_length: int = 128
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the logits of the next token: ``(B, L)`` to ``(B, L, vocabulary)``."""
        x = self.tokens(token_ids) + self.positions(torch.arange(token_ids.shape[1], device=token_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def english() -> tuple[Tensor, int]:
    """Return the text as token ids, and the number of different characters in it."""
    text = "\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    characters = sorted(set(text))
    ids = {character: index for index, character in enumerate(characters)}
    return torch.tensor([ids[character] for character in text]), len(characters)


def windows(token_ids: Tensor, length: int) -> Tensor:
    """Return non-overlapping training examples of a text, ``(num_windows, length)``."""
    return token_ids[: len(token_ids) // length * length].view(-1, length)


def next_token_loss(model: nn.Module, token_ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of predicting each token from those before it, in nats."""
    logits = model(token_ids)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())


def as_lightning_module(gpt: SmallGPT) -> Any:
    """Return the model as a LightningModule, which knows nothing of the monitor."""
    with first_import("lightning"):
        import lightning

    class LanguageModel(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = gpt

        def forward(self, token_ids: Tensor) -> Tensor:
            return self.gpt(token_ids)

        def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
            loss = next_token_loss(self, batch[0])
            self.log("loss", loss, prog_bar=True)
            return loss

        def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
            self.log("val_loss", next_token_loss(self, batch[0]), prog_bar=True)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
            warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

    return LanguageModel()


def run(out: Path, *, num_steps: int, batch: int = 8, length: int = 128, **size: int) -> AttentionMonitor:
    """Train with the monitor attached and return the monitor."""
    with first_import("lightning.pytorch.loggers", "attnmonitor.callbacks.lightning"):
        import lightning
        from lightning.pytorch.loggers import WandbLogger

        from attnmonitor.callbacks.lightning import AttentionMonitorCallback

    lightning.seed_everything(0, verbose=False)
    text, vocabulary = english()
    examples = windows(text, length)
    held_out, trained_on = examples[: 4 * batch], examples[4 * batch :]
    callback = AttentionMonitorCallback(every_n_steps=8)  # 26 samples: one more than the longest grace of a rule
    trainer = lightning.Trainer(
        max_steps=num_steps,
        callbacks=[callback],
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
        as_lightning_module(SmallGPT(vocabulary, max_length=length, **size)),
        DataLoader(TensorDataset(trained_on), batch_size=batch, shuffle=True),
        DataLoader(TensorDataset(held_out), batch_size=batch),
    )
    assert callback.monitor is not None
    return callback.monitor


def write_pages(monitor: AttentionMonitor, out: Path) -> None:
    """Write the picture and the report and print their paths; the callback has printed the verdict."""
    with first_import("attnmonitor.plots"):
        from attnmonitor.plots import overview
    from attnmonitor.record import RunRecord
    from attnmonitor.report import write_report

    path = monitor.record_path or out
    picture, report = out / "heads.png", write_report(path, out / "report.html")
    overview(RunRecord.open(path)).savefig(picture, dpi=150)
    for what, where in {
        "picture": picture,
        "report": report,
        "W&B run": max((out / "wandb").glob("*run-*"), key=os.path.getmtime, default="-"),
    }.items():
        print(f"{what:8s} {where}")


def main(out: Path, *, num_steps: int) -> None:
    """Train, write the picture and the report, and print their paths.

    Args:
        out: Folder for all files.
        num_steps: Optimizer steps.
    """
    # Two cores are busy enough without data workers; the other warning is between Lightning and torch.
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec).*")
    write_pages(run(out, num_steps=num_steps), out)
