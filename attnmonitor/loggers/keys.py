"""Which keys a run may have in an experiment tracker, and what a sample puts under them.

A model of 80 layers × 64 heads × 12 metrics has 61,440 curves, and trackers stop working long before that. So the
keys of a run are planned once, under a hard cap: whole-model summaries always, then every head if all fit, else
per-layer summaries and, from what is left, the heads that stand out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnmonitor.sample import Sample
from attnmonitor.verdict import outstanding_heads

__all__ = ["ScalarKeys"]

_SUMMARIES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
_LAYER_SUMMARIES = {"min": 0.0, "median": 0.5, "max": 1.0}


class ScalarKeys:
    """The scalars of a run's samples as ``{key: float}``, never more keys than the cap.

    Keys are ``attention/global_step`` (the x-axis of all others), ``attention/<metric>/{min,q25,median,q75,max}``,
    ``attention/<metric>/layer_03/head_07``, ``attention/alerts/{firing,new}`` and ``attention/monitor/<figure>``,
    with the monitor's name after ``attention/`` where it has one. Layers are numbered in the order of
    `Sample.coverage`.

    Args:
        first: A sample of the run: its metrics, layers and heads are those of all others.
        max_keys: Most keys ever made, at least as many as the summaries need.
        reserved: Keys the logger makes besides (images, charts), counted under the cap.

    Raises:
        ValueError: The summaries alone exceed ``max_keys``.
    """

    def __init__(self, first: Sample, *, max_keys: int = 2000, reserved: int = 0) -> None:
        self.prefix = f"attention/{first.name}" if first.name else "attention"
        self.step_key = f"{self.prefix}/global_step"
        layers = list(first.coverage)
        digits = max(2, len(str(len(layers) - 1)))
        self.layer_keys = {layer: f"layer_{index:0{digits}d}" for index, layer in enumerate(layers)}
        self._with_layers = False
        self._chosen: dict[str, set[tuple[str, int]]] = {metric: set() for metric in first.values}

        num_fixed = len(self.summaries(first)) + reserved
        if num_fixed > max_keys:
            raise ValueError(f"max_keys={max_keys} is less than the {num_fixed} keys of the summaries; raise it")
        num_heads = sum(values.numel() for layers in first.values.values() for values in layers.values())
        num_layer_keys = len(_LAYER_SUMMARIES) * sum(map(len, first.values.values()))
        self.every_head = num_fixed + num_heads <= max_keys
        self._with_layers = not self.every_head and num_fixed + num_layer_keys <= max_keys
        self._budget = max_keys - num_fixed - (num_layer_keys if self._with_layers else 0)
        self.num_keys = num_fixed + num_heads if self.every_head else max_keys

    def summaries(self, sample: Sample) -> dict[str, float]:
        """Return whole-model figures: quantiles over all heads, alert counts, the monitor's own cost and checks."""
        scalars: dict[str, float] = {self.step_key: sample.global_step}
        for metric, layers in sample.values.items():
            quantiles = _quantiles(torch.cat(list(layers.values())), _SUMMARIES)
            scalars.update({f"{self.prefix}/{metric}/{name}": value for name, value in quantiles.items()})
        scalars[f"{self.prefix}/alerts/firing"] = len(sample.firing)
        scalars[f"{self.prefix}/alerts/new"] = sum(event.state == "firing" for event in sample.events)
        scalars[f"{self.prefix}/monitor/seconds"] = sample.seconds
        scalars[f"{self.prefix}/monitor/failures"] = sample.failures
        scalars.update({f"{self.prefix}/monitor/{name}": value for name, value in sample.diagnostics.items()})
        return scalars

    def details(self, sample: Sample) -> dict[str, float]:
        """Return figures per head, and per layer where not every head fits."""
        scalars: dict[str, float] = {}
        for metric, layers in sample.values.items():
            if not self.every_head:
                self._choose(metric, layers)
            for layer, values in layers.items():
                stem = f"{self.prefix}/{metric}/{self.layer_keys[layer]}"
                if self._with_layers:
                    quantiles = _quantiles(values, _LAYER_SUMMARIES)
                    scalars.update({f"{stem}/{name}": value for name, value in quantiles.items()})
                for head, value in enumerate(values.tolist()):
                    if self.every_head or (layer, head) in self._chosen[metric]:
                        scalars[f"{stem}/head_{head:02d}"] = value
        return scalars

    def _choose(self, metric: str, layers: Mapping[str, Tensor]) -> None:
        # A head once chosen stays, so that its curve has no holes; the budget is shared evenly between metrics.
        chosen, allowed = self._chosen[metric], self._budget // len(self._chosen)
        for outstanding in outstanding_heads(layers, metric, allowed):
            if len(chosen) < allowed:
                chosen.add((outstanding.layer, outstanding.head))


def _quantiles(values: Tensor, wanted: Mapping[str, float]) -> dict[str, float]:
    """Quantiles over the heads that have a number; NaN where none has."""
    quantiles = torch.nanquantile(values, values.new_tensor(list(wanted.values())), interpolation="linear")
    return dict(zip(wanted, quantiles.tolist(), strict=True))
