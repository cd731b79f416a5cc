"""Lightning and the Trainer under ``torchrun``: training is bit-identical, and one process writes.

Run as a script, this file is what ``torchrun`` starts: ``callbacks/test_distributed_frameworks.py FOLDER``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Block, TinyGPT, everything, language_loss, token_batch
from torch import Tensor, nn

from attnmonitor import AttentionMonitor
from attnmonitor.record import RunRecord

LIGHTNING = ("ddp", "fsdp", "model_parallel")
RUNS = (*LIGHTNING, "fabric", "transformers", "accelerate")
STEPS = [0, 2, 4, 6]


def _strategy(name: str) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import FullyShardedDataParallel

    class FSDPWithoutGPU(FSDPStrategy):
        """Lightning allows ``fsdp`` only on GPUs; on a CPU it works once the device is given."""

        def _setup_model(self, model: nn.Module) -> nn.Module:
            return super()._setup_model(FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs))

    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "fsdp":
        return FSDPWithoutGPU(auto_wrap_policy={Block}, process_group_backend="gloo")
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def _in_lightning(name: str, watched: bool) -> dict[str, Any]:
    import lightning
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import DataLoader

    from attnmonitor.callbacks.lightning import AttentionMonitorCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = TinyGPT(dropout=0.1)
            self.losses: list[float] = []

        def configure_model(self) -> None:
            if name == "model_parallel":
                for block in self.gpt.blocks:
                    fully_shard(block)
                fully_shard(self.gpt)

        def forward(self, token_ids: Tensor) -> Tensor:
            return self.gpt(token_ids)

        def training_step(self, token_ids: Tensor, index: int) -> Tensor:
            loss = language_loss(self(token_ids), token_ids)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    torch.manual_seed(0)
    module, watcher = Module(), AttentionMonitorCallback(every_n_steps=2, strict=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=_strategy(name),
        max_steps=6,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watcher] if watched else [],
        default_root_dir=f"{name}-{watched}",
    )
    trainer.fit(module, DataLoader(token_batch(batch=24), batch_size=4, shuffle=True))
    return _end(module, trainer.optimizers[0], module.losses, watcher.monitor)


def _in_fabric(watched: bool) -> dict[str, Any]:
    """Fabric's wrapper holds a DDP model, whose own forward sends buffers to the other process."""
    from lightning.fabric import Fabric

    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model = TinyGPT(dropout=0.1, batch_norm=True)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), 1e-2))
    monitor = _attached(model, "fabric") if watched else None
    return _trained(model, optimizer, fabric.backward, fabric.global_rank, monitor)


def _in_accelerate(watched: bool) -> dict[str, Any]:
    """The monitor is attached before `prepare` wraps the model in DDP."""
    from accelerate import Accelerator

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model: Any = TinyGPT(dropout=0.1, batch_norm=True)
    optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-2)
    monitor = _attached(model, "accelerate") if watched else None
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    return _trained(model, optimizer, accelerator.backward, accelerator.process_index, monitor)


def _attached(model: nn.Module, name: str) -> AttentionMonitor:
    from attnmonitor.callbacks.pytorch import attach

    record = Path(f"{name}-True/attnmonitor_runs")
    return attach(model, probe=token_batch(), every_n_steps=2, strict=True, record=record)


def _trained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Tensor], None],
    rank: int,
    monitor: AttentionMonitor | None,
) -> dict[str, Any]:
    """Train with a loop of the user's own."""
    losses = []
    for step in range(6):
        token_ids = token_batch(seed=10 * step + rank)
        loss = language_loss(model(token_ids), token_ids)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if monitor is not None:
        monitor.close()
    return _end(model, optimizer, losses, monitor)


def _in_transformers(watched: bool) -> dict[str, Any]:
    from trainer_run import trainer_of

    from attnmonitor.callbacks.transformers import AttentionMonitorCallback

    watcher = AttentionMonitorCallback(every_n_steps=2, strict=True)
    trainer = trainer_of(
        Path(f"transformers-{watched}"), *([watcher] if watched else []), max_steps=6, ddp_backend="gloo"
    )
    assert trainer.args.world_size == 2
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return _end(trainer.model, trainer.optimizer, losses, watcher.monitor)


def _end(model: nn.Module, optimizer: Any, losses: list[float], monitor: Any) -> dict[str, Any]:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    states = [*everything(model, optimizer), *model.parameters()]
    end: dict[str, Any] = {
        "tensors": [getattr(each, "_local_tensor", each).detach().clone() for each in states],
        "losses": losses,
    }
    if monitor is not None:
        end |= {"history": monitor.history.steps, "record": monitor.record_path, "failures": monitor.failures}
        end["heads"] = {name: layer.heads for name, layer in monitor.coverage.items()}
    return end


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    work: dict[str, Callable[[bool], dict[str, Any]]] = {
        name: lambda watched, name=name: _in_lightning(name, watched) for name in LIGHTNING
    }
    work |= {"fabric": _in_fabric, "transformers": _in_transformers, "accelerate": _in_accelerate}
    ends = {(name, watched): run(watched) for name, run in work.items() for watched in (False, True)}
    torch.save(ends, f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("torchrun")
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*torchrun, "--standalone", __file__, str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-6000:]
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_training_on_two_processes_is_bit_identical(name: str, ends: Any) -> None:
    for rank in range(2):
        bare, watched = (ends[1][rank][name, which] for which in (False, True))
        assert bare["losses"] == watched["losses"]
        assert len(bare["tensors"]) == len(watched["tensors"]) > 20
        assert all(torch.equal(one, other) for one, other in zip(bare["tensors"], watched["tensors"], strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_one_process_writes_every_scheduled_sample(name: str, ends: Any) -> None:
    folder, (first, second) = ends
    first, second = first[name, True], second[name, True]
    assert first["history"] == STEPS
    assert second["history"] == []
    assert second["record"] is None
    assert first["failures"] == second["failures"] == 0
    [record] = folder.glob(f"{name}-True/attnmonitor_runs/*.sqlite")
    assert folder / first["record"] == record
    assert list(RunRecord.open(record).steps) == STEPS
    assert all(heads[0] == 4 for heads in first["heads"].values())
    assert len(first["heads"]) == 2
    assert not any("module" in layer.split(".") for layer in first["heads"])


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(Path(sys.argv[1]))
