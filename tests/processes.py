"""Real processes over gloo, ways to distribute a model over them, and a timeout for hangs."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import Block, TinyGPT
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

# Processes are forked from one that has imported these: on a busy machine each import takes a minute.
multiprocessing.set_forkserver_preload(
    [
        "attnmonitor.metrics",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.distributed.pipelining",
    ]
)

PATIENCE = 60.0  # seconds without progress
TO_START = 180.0  # seconds until the first progress: a busy machine imports torch slowly

# FSDP2 of torch 2.6 runs on GPUs only: it calls `record_event` on a CPU stream, which torch 2.6 does not have.
FSDP2 = ("fsdp2",) if hasattr(torch.cpu.Stream, "record_event") else ()
ON_TWO = ("ddp", "fsdp1", *FSDP2, "tp")
"""The ways to spread a model over two processes."""


def on_processes(folder: Path, work: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """Run ``work(rank, *arguments)`` on each process and return the results.

    Raises:
        TimeoutError: No process has reported progress (`tell`) for a minute; all are killed.
    """
    context = _started(_process, world, (world, str(folder), work, arguments))
    started = time.time()
    while not context.join(timeout=1):
        _kill_if_silent(context, folder, started)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def on_dying_processes(folder: Path, work: Callable[..., Any], *arguments: Any, world: int) -> dict[int, Any]:
    """Run ``work(rank, *arguments)`` on processes of which some kill themselves; return the results of the others.

    Raises:
        TimeoutError: As for `on_processes`.
    """
    context = _started(_dying_process, world, (world, str(folder), work, arguments))
    started = time.time()
    while any(process.is_alive() for process in context.processes):
        time.sleep(0.05)
        _kill_if_silent(context, folder, started)
    if any(process.exitcode > 0 for process in context.processes):
        context.join()  # raises what was raised
    return {int(path.stem[4:]): torch.load(path, weights_only=False) for path in sorted(folder.glob("rank*.pt"))}


def _started(work: Callable[..., Any], world: int, arguments: tuple[Any, ...]) -> Any:
    return mp.start_processes(work, arguments, nprocs=world, join=False, start_method="forkserver")


def _kill_if_silent(context: Any, folder: Path, started: float) -> None:
    said = list(folder.glob("progress*"))
    silent = time.time() - max([started, *(path.stat().st_mtime for path in said)])
    if silent > (PATIENCE if said else TO_START):
        for process in context.processes:
            process.kill()
        raise TimeoutError(f"no progress: {', '.join(path.read_text() for path in said)}")


def tell(text: str) -> None:
    """Report the progress of this process."""
    Path(f"progress{dist.get_rank()}").write_text(text)


def _join_group(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE),
    )


def _process(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _join_group(rank, world, folder)
    try:
        torch.save(work(rank, *arguments), f"{folder}/rank{rank}.pt")
        # Otherwise gloo may still hold the result of a collective: torch 2.6 then waits for gloo's thread while it
        # holds Python's lock, which that thread needs to release the tensor.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _dying_process(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _join_group(rank, world, folder)
    torch.save(work(rank, *arguments), f"{folder}/rank{rank}.pt")
    os._exit(0)  # without leaving the group: a member of it is gone


def spread(model: TinyGPT, how: str) -> nn.Module:
    """Distribute the model: ``"ddp"``, ``"fsdp1"``, ``"fsdp2"``, ``"tp"``, and ``"fsdp2 x tp"`` on 4 processes."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp1":
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True
        )
    if how == "tp":
        return in_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    mesh = None
    if how == "fsdp2 x tp":
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        in_parallel(model, grid["tensor"])
        mesh = grid["data"]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_parallel(model: TinyGPT, mesh: DeviceMesh) -> TinyGPT:
    """Split the heads and the hidden units of every block over the processes of the mesh."""
    by_columns = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.0")
    plan = {name: ColwiseParallel() for name in by_columns} | {
        name: RowwiseParallel() for name in ("attn.o_proj", "mlp.2")
    }
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
        block.attn.num_query_heads //= mesh.size()
        block.attn.num_kv_heads //= mesh.size()
    return model
