"""What single metric classes take beside the layer: settings, and states that torchmetrics must not mix up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from attnmonitor.functional import energy_effective_rank, energy_spectrum, key_incoherence, key_rank
from attnmonitor.metrics import (
    METRIC_CLASSES,
    EnergyEffectiveRank,
    EnergyParticipationRatio,
    InteractionEffectiveRank,
    InteractionParticipationRatio,
    KeyIncoherence,
    KeyRank,
    MaxLogit,
    SinkMass,
)


def layer(num_sequences: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(num_sequences, 4, 30, 8, generator=generator) * torch.logspace(0, -1, 8)
    key = torch.randn(num_sequences, 2, 30, 8, generator=generator) + 1
    return {"query": query, "key": key}


def test_energy_settings_reach_the_functions() -> None:
    tensors = layer()
    half = EnergyEffectiveRank(2, fraction=0.5, per="kv_head", method="randomized")
    half.update(**tensors)
    expected = energy_effective_rank(**tensors, fraction=0.5, per="kv_head").mean(0).float()
    torch.testing.assert_close(half.compute(), expected)
    sharp = METRIC_CLASSES["energy_rms"](4, scale=3.0)
    sharp.update(**tensors)
    torch.testing.assert_close(sharp.compute(), energy_spectrum(**tensors, scale=3.0).energy_rms.mean(0).float())


def test_key_settings_reach_the_functions() -> None:
    key = layer()["key"]
    settings: list[tuple[Any, Callable[..., Tensor]]] = [(KeyIncoherence, key_incoherence), (KeyRank, key_rank)]
    for cls, function in settings:
        metric = cls(2, energy=1.0)
        metric.update(key)
        torch.testing.assert_close(metric.compute(), function(key, energy=1.0).mean(0).float())


def test_row_settings_reach_the_functions() -> None:
    query, key = layer().values()
    logits = query @ key.repeat_interleave(2, 1).mT
    every, few, sharp = MaxLogit(4, num_rows=30), MaxLogit(4, num_rows=2), MaxLogit(4, scale=3.0)
    for metric in (every, few, sharp):
        metric.update(query, key)
    assert (few.compute() <= every.compute()).all()
    causal = logits.masked_fill(torch.ones(30, 30).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(few.compute(), 8**-0.5 * causal[:, :, [14, 29]].amax((-2, -1)).mean(0))
    torch.testing.assert_close(sharp.compute(), 3 * causal.amax((-2, -1)).mean(0))
    both_ways = SinkMass(4, num_rows=30)
    both_ways.update(query, key, causal=False)
    torch.testing.assert_close(both_ways.compute(), (8**-0.5 * logits).softmax(-1)[..., 0].mean((0, 2)))


def test_weights_are_measured_once_per_update() -> None:
    for metric in (InteractionEffectiveRank(num_heads=3), InteractionParticipationRatio(num_heads=3)):
        metric.update(torch.eye(6).expand(3, 6, 6), torch.eye(6).expand(3, 6, 6))
        assert metric.compute().tolist() == [6, 6, 6]


def test_collection_does_not_merge_metrics_that_agree() -> None:
    """After a first update with equal numbers torchmetrics merges metrics whose states look alike."""
    rank_one = {"query": torch.ones(1, 2, 9, 4), "key": torch.arange(9.0)[None, None, :, None].expand(1, 2, 9, 4)}
    collection = MetricCollection(
        {
            "rank": EnergyEffectiveRank(2),
            "to_half": EnergyEffectiveRank(2, fraction=0.5),
            "smooth": EnergyParticipationRatio(2),
            "key_rank": KeyRank(2),
        }
    )
    collection.update(**rank_one)
    assert all(value.round().tolist() == [1, 1] for value in collection.compute().values())
    spread_out = layer(1)
    spread_out = {"query": spread_out["query"][:, :2], "key": spread_out["key"]}
    collection.reset()
    collection.update(**rank_one)
    collection.update(**spread_out)
    found = {name: value.tolist() for name, value in collection.compute().items()}
    alone: dict[str, Any] = {name: type(metric)(2) for name, metric in collection.items() if name != "to_half"}
    alone["to_half"] = EnergyEffectiveRank(2, fraction=0.5)
    for name, metric in alone.items():
        for tensors in (rank_one, spread_out):
            metric.update(**({"key": tensors["key"]} if name == "key_rank" else tensors))
    assert found == {name: metric.compute().tolist() for name, metric in alone.items()}
    assert found["rank"] != found["to_half"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KeyIncoherence(2, energy=0), r"energy=0: must be in"),
        (lambda: EnergyEffectiveRank(2, fraction=2), r"fraction=2: must be in"),
        (lambda: InteractionEffectiveRank(2, fraction=-1), r"fraction=-1: must be in"),
    ],
)
def test_errors_quote_what_arrived(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
