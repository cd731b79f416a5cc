"""A PyTorch loop with mixed precision, gradient accumulation and torch.compile, logged to Weights & Biases."""

from __future__ import annotations

import argparse
import os

import torch
import wandb

from attnmonitor.callbacks.pytorch import attach
from attnmonitor.cli.demo import SmallGPT, english, next_token_loss, windows


def main(arguments: list[str] | None = None) -> None:
    """Train with the monitor attached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--compile", action="store_true", help="compile the model (needs a C++ compiler on CPU)")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    text, vocabulary = english()
    examples = windows(text, 128)
    probe, train = examples[:8], examples[8:]
    model = SmallGPT(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    if options.compile:
        model.compile()  # the probe runs the uncompiled module: no new graph, no recompilation

    with wandb.init(project="attnmonitor-demo", mode=None if "WANDB_API_KEY" in os.environ else "offline") as run:
        with attach(model, optimizer, probe, every_n_steps=10, loggers=run) as monitor:
            for step in range(options.steps):
                optimizer.zero_grad()
                for _ in range(2):  # two half batches make one optimizer step, and count as one
                    batch = train[torch.randint(len(train), (4,))]
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = next_token_loss(model, batch) / 2
                    loss.backward()
                optimizer.step()
                run.log({"loss": 2 * loss.item()}, step=step)
        logit_size = monitor.history["energy_rms"]["blocks.0.attention"]  # (num_samples, num_heads)
        print(f"{len(logit_size)} samples; first-layer logits grew up to {(logit_size[-1] / logit_size[0]).max():.1f}x")


if __name__ == "__main__":
    main()
