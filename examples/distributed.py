"""Train on several processes with the monitor attached: DDP or fully sharded (FSDP2).

    torchrun --nproc-per-node 2 examples/distributed.py --strategy fsdp

Every process attaches its monitor in the same way. Under DDP the first process measures; under FSDP all processes run
the probe's forward, because each holds a part of the weights. The first one writes record, logs and alerts.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from attnmonitor.callbacks.pytorch import attach
from attnmonitor.cli.demo import SmallGPT, english, next_token_loss, windows


def main(arguments: list[str] | None = None) -> None:
    """Train on this process's share of the data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="fsdp")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    options = parser.parse_args(arguments)

    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    text, vocabulary = english()
    examples = windows(text, 64)
    probe, share = examples[:4], examples[4 + rank :: num_processes]
    model: torch.nn.Module = SmallGPT(vocabulary, width=64, num_layers=2, num_heads=4, max_length=64)
    if options.strategy == "fsdp":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    with attach(model, optimizer, probe, every_n_steps=10) as monitor:
        for batch in share.split(8)[: options.steps]:
            optimizer.zero_grad()
            next_token_loss(model, batch).backward()
            optimizer.step()
    if rank == 0:
        print(f"{len(monitor.history.steps)} samples of a model on {num_processes} processes: {monitor.record_path}")
    dist.barrier()  # the first process has more to finish; the others wait for it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
