"""The smallest change to a training script that adds the monitor: the two marked lines."""

from __future__ import annotations

import sys

import torch

from attnmonitor.callbacks.pytorch import attach  # line 1
from attnmonitor.cli.demo import SmallGPT, english, next_token_loss, windows


def main(num_steps: int = 20) -> None:
    """Train a small GPT for a few steps with the monitor attached."""
    text, vocabulary = english()
    examples = windows(text, 64)
    model = SmallGPT(vocabulary, width=64, num_layers=2, num_heads=4, max_length=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    monitor = attach(model, probe=examples[:4], every_n_steps=10)  # line 2

    for batch in examples[4:].split(8)[:num_steps]:
        optimizer.zero_grad()
        next_token_loss(model, batch).backward()
        optimizer.step()

    print("energy-field effective rank of each head of the first layer, by step:")
    ranks = monitor.history["energy_effective_rank"]["blocks.0.attention"]  # (num_samples, num_heads)
    for step, heads in zip(monitor.history.steps, ranks, strict=True):
        print(f"  step {step:3d}: {heads.tolist()}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
