"""A process that is killed: the others name it within the time limit, take no more samples, and go on.

It dies before attach, in the first forward at attach, in a sample's forward, or between two samples. One that raises
in the first forward keeps no other waiting either.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fault_case import collected_warnings
from models import TinyGPT, token_batch, train_step
from processes import FSDP2, PATIENCE, in_parallel, on_dying_processes, spread, tell
from torch import Tensor, nn
from torch.distributed import nn as dist_nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from attnmonitor import AttentionMonitor

WORLD, LIMIT = 4, 5.0


class Summed(nn.Module):
    """Tensor parallelism by hand, of which the weights tell nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return dist_nn.all_reduce(self.inner(x)) / WORLD


def _by_hand(model: TinyGPT) -> nn.Module:
    for block in model.blocks:
        block.mlp = Summed(block.mlp)
    return model


def _in_pairs(model: TinyGPT) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("which", "shard"))["shard"]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


HOW: dict[str, Callable[[TinyGPT], nn.Module]] = {
    "replicas": lambda model: spread(model, "ddp"),
    "fsdp1": lambda model: spread(model, "fsdp1"),
    "tp": lambda model: in_parallel(model, init_device_mesh("cpu", (WORLD,))),
    "by hand": _by_hand,
}
if FSDP2:
    HOW |= {"fsdp2": lambda model: spread(model, "fsdp2"), "fsdp2 in pairs": _in_pairs}
WHEN = ("before attach", "at attach", "between samples", "in a sample", "raises at attach")
NOW = time.monotonic


def _timed(what: Callable[[], Any]) -> tuple[Any, float]:
    started = NOW()
    return what(), NOW() - started


def _attached(model: nn.Module) -> AttentionMonitor | str:
    try:
        return AttentionMonitor(model, token_batch(), 1, record=None)
    except ValueError as error:
        return str(error)


def _run(rank: int, how: str, when: str, victim: int) -> dict[str, Any]:
    tell(f"{how}, {when}")
    torch.manual_seed(0)
    plain = TinyGPT()
    model, armed = HOW[how](plain), [False]

    def fail(*_: Any) -> None:
        if armed[0] and rank == victim and not torch.is_grad_enabled():
            if when == "raises at attach":
                raise RuntimeError("no such expert")
            die()

    def die() -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    plain.blocks[1].attn.register_forward_pre_hook(fail)
    dist.barrier()  # what is imported by then takes each its time
    end: dict[str, Any] = {}
    with collected_warnings() as end["warnings"], mock.patch("attnmonitor.parallel.exchange.TIME_LIMIT", LIMIT):
        if when == "before attach":
            die()
        armed[0] = when.endswith("at attach")
        end["monitor"], end["to attach"] = _timed(lambda: _attached(model))
        armed[0] = False
        weights = [getattr(each, "_local_tensor", each).detach().clone() for each in model.parameters()]
        if isinstance(end["monitor"], AttentionMonitor):
            first = end["monitor"].on_step(0)
            end["first"] = None if first is None else first.failure
            armed[0] = when == "in a sample"
            if when == "between samples":
                die()
            _, end["to give up"] = _timed(lambda: end["monitor"].on_step(1))
            armed[0] = False
            _, end["after"] = _timed(lambda: end["monitor"].on_step(2))
            end["paused"], end["steps"] = end["monitor"].paused, end["monitor"].history.steps
            end["monitor"] = "attached"
    own = [getattr(each, "_local_tensor", each) for each in model.parameters()]
    end["same weights"] = all(map(torch.equal, weights, own))
    if when == "raises at attach":
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        end["loss"] = train_step(model, optimizer, token_batch()).item()
        dist.barrier()
    return end


def _ends(how: str, when: str, victim: int, folder: Path) -> dict[int, dict[str, Any]]:
    return on_dying_processes(folder, _run, how, when, victim, world=WORLD)


def _group(how: str, victim: int) -> range:
    return range(victim // 2 * 2, victim // 2 * 2 + 2) if "pairs" in how else range(WORLD)


def _check(how: str, when: str, victim: int, folder: Path) -> None:
    ends = _ends(how, when, victim, folder)
    group = _group(how, victim)
    assert sorted(ends) == [rank for rank in range(WORLD) if rank != victim or when == "raises at attach"]
    # Beside it may stand one that lives, and waits for it in a collective of the model's own.
    missing = re.compile(rf"process (\d, )*{victim}\b")
    for rank, end in ends.items():
        assert end["same weights"]
        is_concerned = rank in group and how != "replicas"
        if when == "raises at attach":
            assert end["loss"] > 0
            if is_concerned or rank == victim:
                assert "no such expert" in end["monitor"]
                assert end["to attach"] < PATIENCE / 2
        elif is_concerned and when.endswith("attach"):
            assert missing.search(end["monitor"])
            assert "did not take part within 5 s" in end["monitor"]
            assert end["to attach"] < PATIENCE / 2
        else:
            assert end["monitor"] == "attached"
            assert end["first"] is None
            assert end["to give up"] < PATIENCE / 2
            assert end["after"] < LIMIT
            assert end["paused"] is is_concerned
            said = [text for text in end["warnings"] if missing.search(text) and "no more samples are taken" in text]
            assert len(said) == is_concerned, end["warnings"]
            if not is_concerned and rank == (0 if how == "replicas" else group[0] ^ 2):
                assert end["steps"] == [0, 1, 2]


FEW = [
    ("fsdp2" if FSDP2 else "fsdp1", "in a sample", 1),
    ("fsdp2" if FSDP2 else "fsdp1", "at attach", 1),
    ("by hand", "between samples", 3),
    ("by hand", "raises at attach", 2),
]
ALL = [
    (how, when, victim)
    for how in HOW
    for when in WHEN
    for victim in (0, 1, 3)
    if how != "replicas" or when != "in a sample" or victim == 0  # of replicas, the first measures alone
]


@pytest.mark.parametrize(("how", "when", "victim"), FEW)
def test_dead_process_is_named_and_not_waited_for(how: str, when: str, victim: int, tmp_path: Path) -> None:
    _check(how, when, victim, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(("how", "when", "victim"), [case for case in ALL if case not in FEW])
def test_any_dead_process_is_named_and_not_waited_for(how: str, when: str, victim: int, tmp_path: Path) -> None:
    _check(how, when, victim, tmp_path)
