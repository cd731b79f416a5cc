"""A model that is sharded after attach, over processes of which the one that writes is none."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from models import TinyGPT, token_batch
from processes import FSDP2, on_processes, tell
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from attnmonitor import AttentionMonitor


def _shard_alone_after_attach(rank: int) -> tuple[list[str], bool]:
    model = TinyGPT()
    monitor = AttentionMonitor(model, token_batch(), 1, record=f"rank{rank}.sqlite")
    tell("attached")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("which", "shard"))["shard"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for step in range(2):
            monitor.on_step(step)
    return [str(each.message) for each in said], Path(f"rank{rank}.sqlite").exists()


@pytest.mark.skipif(not FSDP2, reason="FSDP2 of this torch runs on GPUs only")
def test_group_without_the_writing_process_is_warned_of(tmp_path: Path) -> None:
    (first, is_recorded), (second, is_second_recorded) = on_processes(tmp_path, _shard_alone_after_attach)
    assert is_recorded
    assert not is_second_recorded
    warned = "sharded over processes [1] alone, and what they measure is neither recorded nor logged: process 0"
    assert not any("neither recorded" in text for text in first)
    assert sum(warned in text for text in second) == 1
