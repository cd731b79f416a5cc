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


def _one_sample(model: nn.Module, probe_seed: int = 0) -> dict[str, Any]:
    """The sample of the first process, and how many layers this process has finished for it."""
    tell(f"shared work, {probe_seed}")
    monitor = AttentionMonitor(model, token_batch(seed=probe_seed, length=200), record=None, strict=True)
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
        "finished": sum(finished),
    }


def _everything(rank: int) -> dict[str, Any]:
    found = {}
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


@pytest.mark.parametrize("how", HOW)
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


@pytest.mark.parametrize("how", HOW)
def test_each_process_finishes_its_share(how: str, processes: list[dict[str, Any]]) -> None:
    assert [process[f"{how}, each alone"]["finished"] for process in processes] == [5, 5]
    assert [process[how]["finished"] for process in processes] == [3, 2]


@pytest.mark.parametrize("how", HOW)
def test_different_probes_are_not_shared(how: str, processes: list[dict[str, Any]]) -> None:
    """Each process finishes all layers, and the first one's are shown."""
    assert [process[f"{how}, different probes"]["finished"] for process in processes] == [5, 5]


def test_layers_are_dealt_out_in_turn() -> None:
    names = tuple("abcde")
    shares = [Share(place, 3, names) for place in range(3)]
    assert [[name for name in names if share.takes(name)] for share in shares] == [["a", "d"], ["b", "e"], ["c"]]
    assert [share.takes("appeared later") for share in shares] == [True, False, False]
    assert all(Share().takes(name) for name in names)
