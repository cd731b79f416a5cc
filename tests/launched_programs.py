"""Training programs of libraries that set up their own processes: ``python launched_programs.py deepspeed 1``.

Each trains a model without and with the README's line, and prints as JSON whether the weights are the same, the steps
of the samples and the number of failures.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import TinyGPT, language_loss, token_batch
from torch import nn

from attnmonitor.callbacks.pytorch import attach

STEPS = 4


def compared(train: Callable[[Callable[[nn.Module], None]], nn.Module]) -> dict[str, Any]:
    """Train without and with a monitor."""
    monitors = []

    def line(model: nn.Module) -> None:
        monitors.append(attach(model, probe=token_batch(seed=7), every_n_steps=1, record=None))

    bare, model = train(lambda model: None), train(line)
    [monitor] = monitors
    monitor.close()
    same = all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    return {"same": same, "steps": monitor.history.steps, "failures": monitor.failures}


def fresh() -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT(num_layers=1, width=16, num_query_heads=2)


def deepspeed(stage: int) -> dict[str, Any]:
    """ZeRO on a CPU; from stage 1 on in bfloat16, and the optimizer steps copies of the weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import deepspeed as library

    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    config: dict[str, Any] = {"train_batch_size": 2, "optimizer": optimizer, "bf16": {"enabled": stage > 0}}
    config["zero_optimization"] = {"stage": stage}

    def train(line: Callable[[nn.Module], None]) -> nn.Module:
        model = fresh()
        engine, *_ = library.initialize(model=model, model_parameters=model.parameters(), config=config)
        line(engine)
        for seed in range(STEPS):
            batch = token_batch(seed=seed, batch=2)
            engine.backward(language_loss(engine(batch).float(), batch))
            engine.step()
        return model

    return compared(train)


def ray(num_workers: int) -> dict[str, Any]:
    """Ray Train: the loop runs in workers, under DDP where there are several."""
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    import ray as library
    import ray.train.torch
    from ray.train import RunConfig, ScalingConfig

    folder = Path.cwd()

    def train_in_a_worker() -> None:
        def train(line: Callable[[nn.Module], None]) -> nn.Module:
            own = fresh()
            model = library.train.torch.prepare_model(own)
            line(model)
            optimizer = torch.optim.AdamW(own.parameters(), 1e-2)
            for seed in range(STEPS):
                batch = token_batch(seed=seed, batch=2)
                optimizer.zero_grad()
                language_loss(model(batch), batch).backward()
                optimizer.step()
            return own

        result = compared(train)
        if library.train.get_context().get_world_rank() == 0:
            (folder / "result.json").write_text(json.dumps(result))

    library.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    scaling = ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 0.5})
    library.train.torch.TorchTrainer(
        train_in_a_worker, scaling_config=scaling, run_config=RunConfig(storage_path=str(folder))
    ).fit()
    library.shutdown()
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


if __name__ == "__main__":
    print(json.dumps({"deepspeed": deepspeed, "ray": ray}[sys.argv[1]](int(sys.argv[2]))))
