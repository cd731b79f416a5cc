"""Two real processes over gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import TinyGPT, language_loss, token_batch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.record import RunRecord

WRAPPINGS = ("ddp", "fsdp2")


def _process(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        torch.save(work(rank, *arguments), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two_processes(folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``work(rank, *arguments)`` on two processes and return what each returned."""
    mp.spawn(_process, (2, str(folder), work, arguments), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def _train(rank: int, wrapping: str, watched: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = TinyGPT(dropout=0.1, batch_norm=wrapping == "ddp")
    model: nn.Module = plain
    if wrapping == "ddp":
        model = nn.parallel.DistributedDataParallel(plain)
    else:
        for block in plain.blocks:
            fully_shard(block)
        fully_shard(plain)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if watched:
        monitor = attach(model, optimizer, token_batch(), every_n_steps=2, strict=True)
    torch.manual_seed(rank)
    for step in range(5):
        batch = token_batch(seed=10 * step + rank)
        optimizer.zero_grad()
        language_loss(model(batch), batch).backward()
        optimizer.step()
    full: Callable[[Tensor], Tensor] = lambda value: getattr(value, "full_tensor", lambda: value)()  # noqa: E731
    end: dict[str, Any] = {"weights": [full(value).detach().clone() for value in plain.state_dict().values()]}
    end["generator"] = torch.get_rng_state()
    if watched:
        monitor.close()
        end["record"] = str(monitor.record_path)
    return end


def _one_sample(rank: int, wrapping: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = TinyGPT()
    if wrapping == "fsdp2":
        fully_shard(model)
    sample = AttentionMonitor(model, token_batch(), record=None, strict=True).sample(0)
    assert bool(sample.values) == (rank == 0)
    return {metric: dict(layers) for metric, layers in sample.values.items()}


def _everything(rank: int) -> dict[str, Any]:
    # One pair of processes for all: starting them costs more than what they do.
    ends = {(wrapping, watched): _train(rank, wrapping, watched) for wrapping in WRAPPINGS for watched in (False, True)}
    return {"ends": ends, "samples": {wrapping: _one_sample(rank, wrapping) for wrapping in WRAPPINGS}}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("processes")
    return folder, on_two_processes(folder, _everything)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_two_processes_train_bit_identically_watched_or_not(
    wrapping: str, processes: tuple[Path, list[dict[str, Any]]]
) -> None:
    for rank in range(2):
        bare, watched = (processes[1][rank]["ends"][wrapping, which] for which in (False, True))
        assert torch.equal(bare["generator"], watched["generator"])
        for one, other in zip(bare["weights"], watched["weights"], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_one_process_writes_for_all(wrapping: str, processes: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = processes
    assert list(RunRecord.open(folder / first["ends"][wrapping, True]["record"]).steps) == [0, 2, 4]
    assert second["ends"][wrapping, True]["record"] == "None"
    assert len(list(folder.glob("attnmonitor_runs/*.sqlite"))) == len(WRAPPINGS)


def test_sharded_weights_give_the_numbers_of_whole_ones(processes: tuple[Path, list[dict[str, Any]]]) -> None:
    samples = processes[1][0]["samples"]
    for metric, layers in samples["ddp"].items():
        for layer, values in layers.items():
            assert torch.equal(samples["fsdp2"][metric][layer], values)
