"""Processes that run the same probe share the work: each finishes some layers, and the numbers have the same bits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from models import TinyGPT, token_batch
from processes import FSDP2, on_processes, spread, tell
from torch import nn

from attnmonitor import AttentionMonitor
from attnmonitor.measurement.shares import Share
from attnmonitor.metrics.statistics import head_statistics

HOW = FSDP2 or ("fsdp1",)
SHARED = ("ddp", *HOW)


def _one_sample(model: nn.Module, probe_seed: int = 0, **settings: Any) -> dict[str, Any]:
    """The sample of the first process, and how many layers this process has finished for it."""
    tell(f"shared work, {probe_seed}, {settings}")
    monitor = AttentionMonitor(model, token_batch(seed=probe_seed, length=200), record=None, strict=True, **settings)
    finished: list[int] = []

    def counted(layers: list[Any], *settings: Any, **more: Any) -> Any:
        finished.append(len(layers))
        return head_statistics.steps(layers, *settings, **more)

    with mock.patch("attnmonitor.measurement.reduction.head_statistics", mock.Mock(steps=counted)):
        sample = monitor.sample(0)
    covered = {name: (layer.heads, layer.error, layer.reason) for name, layer in sample.coverage.items()}
    return {
        "values": sample.values,
        "spread": sample.spread,
        "coverage": covered,
        "certified": sample.diagnostics.get("certified_fraction"),
        "after_last_attention": monitor.describe()["after_last_attention"],
        "finished": sum(finished),
    }


def _replicas(rank: int) -> dict[str, Any]:
    """What DDP gives, alone and with shared work; and where one process fails or has another probe."""
    torch.manual_seed(0)
    model = spread(TinyGPT(num_layers=5, num_kv_heads=2, max_length=200), "ddp")
    found: dict[str, Any] = {"ddp, each alone": _one_sample(model), "ddp": _one_sample(model, processes="all")}
    try:
        AttentionMonitor(model, token_batch(seed=rank), record=None, processes="all")
    except ValueError as error:
        found["different probes"] = str(error)

    fails = []

    def forward(model: nn.Module, batch: Any) -> Any:
        if rank == 1 and fails:
            raise OSError("a file is gone")
        return model(batch)

    monitor = AttentionMonitor(model, token_batch(), record=None, processes="all", forward=forward)
    fails.append(1)
    found["failure"] = monitor.sample(1).failure
    fails.clear()
    found["after a failure"] = len(monitor.sample(2).values)
    return found


def _everything(rank: int) -> dict[str, Any]:
    found = _replicas(rank)
    for how in HOW:
        torch.manual_seed(0)
        model = spread(TinyGPT(num_layers=5, num_kv_heads=2, max_length=200), how)
        found[how] = _one_sample(model)
        found[f"{how}, different probes"] = _one_sample(model, probe_seed=rank)
        # Not the whole model on one process: weights that lie elsewhere in memory can give products other bits.
        with mock.patch("attnmonitor.measurement.distributed.Share", return_value=Share()):
            found[f"{how}, each alone"] = _one_sample(model)
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_processes(tmp_path_factory.mktemp("shared"), _everything)


@pytest.mark.parametrize("how", SHARED)
def test_shared_work_has_the_bits_of_one_process(how: str, processes: list[dict[str, Any]]) -> None:
    alone, together = processes[0][f"{how}, each alone"], processes[0][how]
    for table in ("values", "spread"):
        assert alone[table].keys() == together[table].keys()
        for metric, layers in alone[table].items():
            assert list(layers) == list(together[table][metric])
            for layer, heads in layers.items():
                assert torch.equal(heads, together[table][metric][layer]), (table, metric, layer)
    assert together["coverage"] == alone["coverage"]
    assert together["certified"] == alone["certified"]


@pytest.mark.parametrize("how", SHARED)
def test_each_process_finishes_its_share(how: str, processes: list[dict[str, Any]]) -> None:
    alone = [5, 0] if how == "ddp" else [5, 5]
    assert [process[f"{how}, each alone"]["finished"] for process in processes] == alone
    assert [process[how]["finished"] for process in processes] == [3, 2]


@pytest.mark.parametrize("how", HOW)
def test_different_probes_are_not_shared(how: str, processes: list[dict[str, Any]]) -> None:
    """Each process finishes all layers, and the first one's are shown."""
    assert [process[f"{how}, different probes"]["finished"] for process in processes] == [5, 5]


def test_replicas_that_share_skip_the_tail(processes: list[dict[str, Any]]) -> None:
    for how in ("ddp", "ddp, each alone"):
        assert [process[how]["after_last_attention"] for process in processes] == ["skipped", "skipped"]


def test_replicas_need_the_same_probe(processes: list[dict[str, Any]]) -> None:
    for process in processes:
        assert process["different probes"].startswith('processes="all": processes 0, 1 have 2 different probes')


def test_failure_of_one_replica_is_that_of_all(processes: list[dict[str, Any]]) -> None:
    assert processes[0]["failure"] == "RuntimeError: process 1: OSError: a file is gone"
    assert processes[0]["after a failure"] > 0


def test_unknown_word_for_processes_is_quoted() -> None:
    with pytest.raises(ValueError, match=r"processes='every'; give \"first\" .* or \"all\""):
        AttentionMonitor(TinyGPT(), token_batch(), record=None, processes="every")


def test_layers_are_dealt_out_in_turn() -> None:
    names = tuple("abcde")
    shares = [Share(place, 3, names) for place in range(3)]
    assert [[name for name in names if share.takes(name)] for share in shares] == [["a", "d"], ["b", "e"], ["c"]]
    assert [share.takes("appeared later") for share in shares] == [True, False, False]
    assert all(Share().takes(name) for name in names)
