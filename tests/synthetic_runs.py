"""Synthetic runs with values like those of training, for the tests of record, charts and report.

Heads start alike, drift apart as they learn (log-normal, layer-dependent), and share changes due to the learning rate.
In a faulty run few positions slowly dominate one head's keys while its logits grow; its alerts fire and one clears.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnmonitor.metrics.catalog import DEFAULT_METRICS, METRICS
from attnmonitor.record import RecordWriter
from attnmonitor.record.history import History
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample

# Where a healthy head of a small trained model ends, and how far heads differ (standard deviation of the logarithm).
_TYPICAL = {
    "energy_effective_rank": (6.0, 0.45),
    "energy_participation_ratio": (4.0, 0.4),
    "energy_stable_rank": (2.2, 0.25),
    "energy_rms": (1.4, 0.5),
    "energy_delocalization": (0.45, 0.3),
    "key_incoherence": (2.6, 0.22),
    "key_rank": (18.0, 0.25),
    "key_leverage_max": (0.55, 0.15),
    "key_participation_ratio": (10.0, 0.3),
    "key_norm_participation": (0.8, 0.08),
    "query_rms": (1.1, 0.25),
    "key_rms": (1.0, 0.25),
    "interaction_effective_rank": (40.0, 0.15),
    "interaction_participation_ratio": (24.0, 0.2),
    "spectral_gap": (7.0, 0.45),
}
# Factor on the faulty head's value once the fault has fully grown.
_FAULT = {
    "key_incoherence": 6.0,
    "energy_rms": 9.0,
    "key_norm_participation": 0.08,
    "energy_delocalization": 0.06,
    "key_rms": 4.0,
}


class SyntheticRun:
    """A run of ``num_layers`` × ``num_heads``.

    Args:
        num_layers: Layers of the model.
        num_heads: Query heads of a layer, or one number per layer.
        num_samples: Samples taken, ``every`` steps apart.
        faulty: (layer index, head) of the head with the fault, or None for a healthy run.
        metrics: What is measured.
        group: Query heads per KV head.
        layer_name: Format of a layer's name.
    """

    def __init__(
        self,
        num_layers: int = 6,
        num_heads: int | Sequence[int] = 8,
        num_samples: int = 40,
        *,
        every: int = 50,
        faulty: tuple[int, int] | None = None,
        metrics: Sequence[str] = DEFAULT_METRICS,
        group: int = 1,
        seed: int = 0,
        layer_name: str = "model.layers.{}.self_attn",
    ) -> None:
        self.heads = [num_heads] * num_layers if isinstance(num_heads, int) else list(num_heads)
        self.layers = [layer_name.format(index) for index in range(num_layers)]
        self.num_samples, self.every, self.faulty, self.metrics, self.group = num_samples, every, faulty, metrics, group
        self.generator = torch.Generator().manual_seed(seed)
        self.traits = {name: [self._noise(self._width(name, i)) for i in range(num_layers)] for name in metrics}
        self.config: Mapping[str, object] = {
            "model": "SyntheticLM",
            "model_signature": f"{num_layers}x{self.heads[0]}",
            "probe_fingerprint": "5e1f0c",
            "probe_length": 512,
            "schedule": every,
        }

    def samples(self) -> Iterator[Sample]:
        coverage = {
            layer: LayerCoverage(layer, "sdpa", "self", heads, max(1, heads // self.group), 64, 0.125, 3e-7)
            for layer, heads in zip(self.layers, self.heads, strict=True)
        }
        for index in range(self.num_samples):
            values = {name: self._values(name, index) for name in self.metrics}
            spread = {name: {layer: 0.1 * v for layer, v in values[name].items()} for name in self.metrics}
            diagnostics = {"certified_fraction": 0.97, "invariant_residual": 2e-6, "overhead": 0.004}
            yield Sample(
                global_step=index * self.every,
                values=values,
                spread=spread,
                coverage=coverage,
                events=self._events(index, values),
                diagnostics=diagnostics,
                seconds=0.21,
            )

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _width(self, metric: str, layer: int) -> int:
        heads = self.heads[layer]
        return heads if METRICS[metric].scope == "query_head" else max(1, heads // self.group)

    def _values(self, metric: str, index: int) -> dict[str, Tensor]:
        typical, width = _TYPICAL.get(metric, (1.0, 0.3))
        learned = 1 - math.exp(-4 * index / self.num_samples)
        shared = 0.15 * math.sin(3 * learned)
        values = {}
        for number, layer in enumerate(self.layers):
            trait = width * self.traits[metric][number] + 0.4 * width * math.cos(2.5 * number / len(self.layers))
            log_value = math.log(typical) + learned * trait + shared + 0.03 * self._noise(self._width(metric, number))
            values[layer] = log_value.exp()
        if self.faulty is not None:
            layer_index, head = self.faulty
            head = head if METRICS[metric].scope == "query_head" else head // self.group
            values[self.layers[layer_index]][head] *= _FAULT.get(metric, 1.0) ** self._severity(index)
        if METRICS[metric].unit.startswith("fraction") or metric == "key_leverage_max":
            return {layer: value.clamp(max=1.0) for layer, value in values.items()}
        return {layer: value.round() for layer, value in values.items()} if "effective_rank" in metric else values

    def _severity(self, index: int) -> float:
        return min(1.0, max(0.0, (index / self.num_samples - 0.5) / 0.2))

    def _events(self, index: int, values: Mapping[str, Mapping[str, Tensor]]) -> list[AlertEvent]:
        if self.faulty is None:
            return []
        layer, head = self.layers[self.faulty[0]], self.faulty[1]
        began = {"energy_hot": round(0.58 * self.num_samples), "key_sink": round(0.64 * self.num_samples)}
        ended = {"energy_hot": round(0.9 * self.num_samples)}
        kinds = {"energy_hot": ("logit_blowup", "energy_rms"), "key_sink": ("key_sink", "key_incoherence")}
        events = []
        for state, at in (("firing", began), ("cleared", ended)):
            for rule, when in at.items():
                if when == index:
                    kind, metric = kinds[rule]
                    of_kv = METRICS[metric].scope == "kv_head"
                    position = head // self.group if of_kv else head
                    events.append(
                        AlertEvent(
                            rule=rule,
                            kind=kind,
                            scope="kv_head" if of_kv else "query_head",
                            layer=layer,
                            head=position,
                            value=float(values[metric][layer][position]),
                            baseline=_TYPICAL[metric][0],
                            global_step=index * self.every,
                            state="firing" if state == "firing" else "cleared",
                            since_step=began[rule] * self.every,
                            message=f"{layer} head {position}: {metric} left the other heads",
                        )
                    )
        return events


def written(path: Path, run: SyntheticRun, config: dict[str, Any] | None = None) -> Path:
    """The run, recorded."""
    with RecordWriter(path, run=config or run.config) as record:
        for sample in run.samples():
            record.append(sample)
    return path


Change = Callable[[int, Mapping[str, Mapping[str, Tensor]]], None]


def followed(run: SyntheticRun, change: Change | None = None) -> tuple[History, Sample]:
    """The trajectories of a run and its last sample with the alarms that fire; ``change`` edits a sample's values."""
    heads = {
        layer: {"query_head": count, "kv_head": count // run.group}
        for layer, count in zip(run.layers, run.heads, strict=True)
    }
    history, firing = History(heads, tuple(run.metrics)), []
    for index, sample in enumerate(run.samples()):
        if change is not None:
            change(index, sample.values)
        history.append(sample)
        firing += [event for event in sample.events if event.state == "firing"]
    return history, dataclasses.replace(sample, firing=firing)
