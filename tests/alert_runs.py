"""Runs of alerts on lists of numbers: made-up samples, rules, and the events they give."""

from __future__ import annotations

import math
from zlib import crc32

import torch

from attnmonitor.alerts import (
    Alerts,
    Rule,
    Threshold,
)
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from attnmonitor.sample import AlertEvent

NAN = math.nan


def events_of(rule: Rule | list[Rule], samples: list[dict], **alerts) -> list[AlertEvent]:
    """Every event of a run given as one ``{metric: {layer: [heads]}}`` per sample; the step is ten times the sample."""
    watch = Alerts([rule] if isinstance(rule, Rule) else rule, **alerts)
    return [event for index, sample in enumerate(samples) for event in watch.observe(tensors(sample), 10 * index)]


def tensors(sample: dict) -> dict:
    return {
        metric: {layer: torch.tensor(heads, dtype=torch.float32) for layer, heads in layers.items()}
        for metric, layers in sample.items()
    }


def one_head(values: list[float], metric: str = "query_rms") -> list[dict]:
    return [{metric: {"layer": [value]}} for value in values]


def plain_rule(**fields) -> Rule:
    threshold = Threshold("query_rms", "value", "identity", fire_above=2.0, clear_below=1.0)
    return Rule(**{"name": "high", "kind": "test", "scope": "query_head", "when": threshold, "grace": 0, **fields})


def changes(events: list[AlertEvent]) -> list[tuple[int, str, str]]:
    return [(event.global_step // 10, event.state, event.severity) for event in events]


def healthy_run(num_samples: int, layers: int = 3, heads: int = 4, *, seed: int = 0, noise: float = 0.05) -> list[dict]:
    """All default metrics of a run that drifts slowly and alike in all heads, with some noise of each head's own."""
    start = dict.fromkeys(DEFAULT_METRICS, 1.0) | {
        "key_leverage_max": 0.4,
        "key_participation_ratio": 9.0,
        "energy_participation_ratio": 6.0,
        "key_norm_participation": 0.9,
        "head_similarity": 0.4,
        "attention_tau": 0.4,
        "value_spread": 0.6,
    }
    # A generator each: a new metric must not change the noise of the others.
    draws = {metric: torch.Generator().manual_seed(1000 * seed + crc32(metric.encode())) for metric in start}
    samples = []
    for index in range(num_samples):
        drift = 1 + 0.5 * min(index, 20) / 20
        samples.append(
            {
                metric: {
                    f"layers.{layer}": (
                        value
                        * (drift if metric in ("energy_rms", "query_rms", "key_rms") else 1.0)
                        * (noise * torch.randn(heads, generator=draws[metric])).exp()
                    ).tolist()
                    for layer in range(layers)
                }
                for metric, value in start.items()
            }
        )
    return samples


VALUE = {"metric": "query_rms", "signal": "value"}


def contrast_rule(**fields) -> Rule:
    threshold = Threshold("query_rms", "contrast", fire_above=1.0, clear_below=0.5)
    return Rule(**{"name": "apart", "kind": "test", "scope": "query_head", "when": threshold, "grace": 0, **fields})


def heads_run(num_samples: int, factor_of_head: dict[int, float], *, onset: int, heads: int = 12, growth: float = 1.0):
    samples = []
    for index in range(num_samples):
        values = [growth**index * (1 + 0.1 * head) for head in range(heads)]
        for head, factor in factor_of_head.items():
            values[head] *= factor if index >= onset else 1.0
        samples.append({"query_rms": {"layer": values}})
    return samples
