"""The keys of a run in an experiment tracker, and the values of a sample under them.

A model of 80 layers × 64 heads × 16 metrics has 81,920 curves, and trackers stop working long before that. So the keys
of a run are planned once, under a hard cap: whole-model summaries always, then every head in every metric if that fits,
else every head in the metrics that the table gives curves (``head_curves``), else per-layer summaries and, within the
rest of the cap, outlier heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnmonitor.metrics.catalog import METRICS
from attnmonitor.sample import Sample
from attnmonitor.summary.outliers import outlier_heads

__all__ = ["BAND_KEYS", "HeadScalars", "heatmap_key", "key_prefix", "step_key", "summary_scalars"]

_SUMMARIES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
_LAYER_SUMMARIES = {"min": 0.0, "median": 0.5, "max": 1.0}
BAND_KEYS = ("/min", "/q25", "/q75", "/max")
"""Ends of the keys whose values are the edges of a band around the median."""

_NUM_IMAGE_KEYS, _NUM_CHART_KEYS = 7, 4  # a tracker stores path, size, hash, … under separate keys
_NUM_MODEL_KEYS = len(_SUMMARIES) + _NUM_IMAGE_KEYS + 2 * _NUM_CHART_KEYS  # of a metric
_NUM_OTHER_KEYS = 16 + _NUM_CHART_KEYS  # step, alert counts, the monitor's own figures (fewer than 16), chart of ranks
_LEAST_KEYS = _NUM_MODEL_KEYS * len(METRICS) + _NUM_OTHER_KEYS


def key_prefix(sample: Sample) -> str:
    """Return ``attention``, or ``attention/<name>`` where the monitor has a name."""
    return f"attention/{sample.name}" if sample.name else "attention"


def heatmap_key(sample: Sample, metric: str) -> str:
    """Return the key of the heatmap of all heads."""
    return f"{key_prefix(sample)}/{metric}/heatmap"


def step_key(sample: Sample) -> str:
    """Return the key of the x-axis of all other keys: optimizer steps, independent of the tracker's own step."""
    return f"{key_prefix(sample)}/global_step"


def summary_scalars(sample: Sample) -> dict[str, float]:
    """Return whole-model scalars of a sample.

    ``attention/<metric>/{min,q25,median,q75,max}`` over all heads, ``attention/alerts/{firing,new}``,
    ``attention/monitor/<name>`` with the monitor's own cost and checks, and the step they belong to.
    """
    prefix = key_prefix(sample)
    scalars: dict[str, float] = {step_key(sample): sample.global_step}
    for metric, layers in sample.values.items():
        quantiles = _quantiles(torch.cat(list(layers.values())), _SUMMARIES)
        scalars.update({f"{prefix}/{metric}/{name}": value for name, value in quantiles.items()})
    scalars[f"{prefix}/alerts/firing"] = len(sample.firing)
    scalars[f"{prefix}/alerts/new"] = sum(event.state == "firing" for event in sample.events)
    scalars[f"{prefix}/monitor/seconds"] = sample.seconds
    scalars[f"{prefix}/monitor/failures"] = sample.failures
    numbers = {name: value for name, value in sample.diagnostics.items() if not isinstance(value, str)}
    scalars.update({f"{prefix}/monitor/{name}": value for name, value in numbers.items()})
    return scalars


class HeadScalars:
    """The scalars per head of a run's samples, ``attention/<metric>/layer_03/head_07``, under a cap.

    Layers are numbered in the order of `Sample.coverage`. Where not every head fits under the cap, not even in the
    metrics whose ``head_curves`` is set in the table, there are
    ``attention/<metric>/layer_03/{min,median,max}``, and a head that once was an outlier keeps its curve from then on.

    Args:
        max_keys: Most keys that a logger makes, including those that the tracker makes for parts of images and charts.

    Attributes:
        every_head: Whether every head has its curves; set by the first sample.
        num_keys: Upper bound on the number of keys; set by the first sample.

    Raises:
        ValueError: ``max_keys`` is less than the summaries alone may need.
    """

    def __init__(self, max_keys: int = 2000) -> None:
        if max_keys < _LEAST_KEYS:
            raise ValueError(f"max_keys={max_keys} is less than the {_LEAST_KEYS} that summaries may need; raise it")
        self.every_head = True
        self.num_keys = max_keys
        self._layer_keys: dict[str, str] = {}
        self._max_keys = max_keys
        self._with_layers = False
        self._allowed_heads = 0
        self._chosen: dict[str, set[tuple[str, int]]] = {}
        self._only_charted: set[str] = set()

    def __call__(self, sample: Sample) -> dict[str, float]:
        """Return the scalars of one sample."""
        if not self._layer_keys:
            self._plan(sample)
        scalars: dict[str, float] = {}
        for metric, layers in sample.values.items():
            if metric in self._only_charted:
                continue
            chosen = self._choose(metric, layers)
            for layer, values in layers.items():
                stem = f"{key_prefix(sample)}/{metric}/{self._layer_keys[layer]}"
                if self._with_layers:
                    quantiles = _quantiles(values, _LAYER_SUMMARIES)
                    scalars.update({f"{stem}/{name}": value for name, value in quantiles.items()})
                for head, value in enumerate(values.tolist()):
                    if self.every_head or (layer, head) in chosen:
                        scalars[f"{stem}/head_{head:02d}"] = value
        return scalars

    def _plan(self, first: Sample) -> None:
        digits = max(2, len(str(len(first.coverage) - 1)))
        self._layer_keys = {layer: f"layer_{index:0{digits}d}" for index, layer in enumerate(first.coverage)}
        num_metrics = len(first.values)
        num_fixed = _NUM_MODEL_KEYS * num_metrics + _NUM_OTHER_KEYS
        num_heads = {metric: sum(map(torch.numel, layers.values())) for metric, layers in first.values.items()}
        charted = {metric for metric in first.values if metric in METRICS and not METRICS[metric].head_curves}
        if num_fixed + sum(num_heads.values()) > self._max_keys:
            self._only_charted = charted
        with_keys = [metric for metric in first.values if metric not in self._only_charted]
        num_curves = sum(num_heads[metric] for metric in with_keys)
        self.every_head = num_fixed + num_curves <= self._max_keys
        num_layer_keys = len(_LAYER_SUMMARIES) * sum(len(first.values[metric]) for metric in with_keys)
        self._with_layers = not self.every_head and num_fixed + num_layer_keys <= self._max_keys
        left = self._max_keys - num_fixed - (num_layer_keys if self._with_layers else 0)
        self._allowed_heads = left // max(len(with_keys), 1)
        self.num_keys = num_fixed + num_curves if self.every_head else self._max_keys

    def _choose(self, metric: str, layers: Mapping[str, Tensor]) -> set[tuple[str, int]]:
        """Return the heads of a metric that have curves; one that is chosen stays, so curves have no gaps."""
        chosen = self._chosen.setdefault(metric, set())
        if not self.every_head and len(chosen) < self._allowed_heads:
            for outstanding in outlier_heads(layers, metric, self._allowed_heads):
                if len(chosen) < self._allowed_heads:
                    chosen.add((outstanding.layer, outstanding.head))
        return chosen


def _quantiles(values: Tensor, wanted: Mapping[str, float]) -> dict[str, float]:
    """Return quantiles over the heads that have a number; NaN where none has."""
    quantiles = torch.nanquantile(values, values.new_tensor(list(wanted.values())))
    return dict(zip(wanted, quantiles.tolist(), strict=True))
