"""Models that are sharded or wrapped after attach, over two groups of processes: each group is recorded and alerted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fault_case import collected_warnings
from models import TinyGPT, token_batch, train_step
from processes import FSDP2, in_parallel, on_processes, tell
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from attnmonitor import AttentionMonitor, Sample
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.record import RunRecord

HOT = Threshold("query_rms", "value", fire_above=-20.0, clear_below=-21.0, quantile=0.5)
ALWAYS = Rule("always", "test", "run", HOT, patience=1, grace=0)
Finish = Callable[[TinyGPT, Any], nn.Module]


def _fsdp1(model: TinyGPT, pair: Any) -> nn.Module:
    return FullyShardedDataParallel(model, pair.get_group(), device_id=torch.device("cpu"), use_orig_params=True)


def _fsdp2(model: TinyGPT, pair: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=pair)
    return fully_shard(model, mesh=pair)


def _ddp(model: TinyGPT, pair: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, process_group=pair.get_group())


LATE: dict[str, Finish] = {"ddp": _ddp, "fsdp1": _fsdp1, "tp": in_parallel}
if FSDP2:
    LATE["fsdp2"] = _fsdp2


class Logger:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_run(self, description: dict[str, Any]) -> None:
        self.steps.append(-len(description["layers"]))

    def log_sample(self, sample: Sample) -> None:
        self.steps.append(sample.global_step)


def _run(rank: int, how: str) -> dict[str, Any]:
    tell(how)
    torch.manual_seed(rank // 2)
    model, logger = TinyGPT(), Logger()
    pair = init_device_mesh("cpu", (2, 2), mesh_dim_names=("which", "shard"))["shard"]
    with collected_warnings() as messages:
        settings: dict[str, Any] = {"record": f"{how}{rank // 2}.sqlite", "alerts": [ALWAYS], "loggers": [logger]}
        monitor = AttentionMonitor(model, token_batch(), 1, **settings)
        wrapped = LATE[how](model, pair)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
        for step in range(3):
            monitor.on_step(step)
            train_step(wrapped, optimizer, token_batch(seed=step))
        monitor.close()
    record = None if monitor.record_path is None else RunRecord.open(monitor.record_path)
    return {
        "warnings": messages,
        "logged": logger.steps,
        "history": monitor.history.steps,
        "record": None if record is None else (record.path.name, list(record.steps), len(record.events)),
        "firing": len(monitor.firing),
        "query_rms": monitor.history["query_rms"]["blocks.0.attn"],
    }


def _everything(rank: int) -> dict[str, Any]:
    return {how: _run(rank, how) for how in LATE}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_processes(tmp_path_factory.mktemp("late"), _everything, world=4)


@pytest.mark.parametrize("how", LATE)
def test_first_of_each_late_group_records_and_alerts(how: str, found: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(run[how] for run in found):
        assert each["warnings"] == []
        if rank % 2:
            assert (each["history"], each["logged"], each["record"], each["firing"]) == ([], [], None, 0)
            continue
        assert each["history"] == [0, 1, 2]
        assert each["logged"] == [-2, 0, 1, 2]
        assert each["record"] == (f"{how}{rank // 2}.sqlite", [0, 1, 2], 1)
        assert each["firing"] == 1
        assert each["query_rms"].shape == (3, 4)
        assert not each["query_rms"].isnan().any()
    assert not torch.equal(found[0][how]["query_rms"], found[2][how]["query_rms"])
