"""Trajectories in memory: what each head's numbers were at each sample of this run.

One float32 row per metric and sample holds all heads of the model; a layer is a stretch of it. The rows kept are
bounded, so that neither memory nor a checkpoint that carries them grows with the length of the run: older samples are
in the run's record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attnmonitor.metrics.catalog import METRICS
from attnmonitor.sample import ByLayer, Sample

__all__ = ["History"]


class History:
    """``history["key_incoherence"]["layer name"]`` is a float32 tensor ``(num_samples, num_heads)``.

    NaN where a head could not be measured, and for weight metrics in the samples that did not measure them.

    Args:
        num_heads: For each layer name, its number of heads per scope: ``{"query_head": 12, "kv_head": 4}``.
        metrics: Names of the metrics that are kept.
        max_samples: How many of the latest samples are kept.
    """

    def __init__(
        self, num_heads: Mapping[str, Mapping[str, int]], metrics: tuple[str, ...], *, max_samples: int = 1000
    ) -> None:
        self.num_heads = {layer: dict(heads) for layer, heads in num_heads.items()}
        self._max_samples = max_samples
        self._steps: list[int] = []
        self._rows: dict[str, list[Tensor]] = {metric: [] for metric in metrics}

    @property
    def steps(self) -> list[int]:
        """Optimizer steps of the samples kept, oldest first."""
        return list(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __getitem__(self, metric: str) -> ByLayer[Tensor]:
        """Return the trajectories of a metric: layer name to ``(num_samples, num_heads)``."""
        if metric not in self._rows:
            raise KeyError(f"{metric!r} is not measured by this monitor; it measures {', '.join(self._rows)}")
        stretches = torch.split(self._table(metric), self._widths(metric), dim=1)
        return ByLayer(zip(self.num_heads, stretches, strict=True))

    def append(self, sample: Sample) -> None:
        """Add a sample; one taken again at an earlier step replaces what came after it."""
        self._cut(sample.global_step)
        self._steps.append(sample.global_step)
        for metric, rows in self._rows.items():
            layers = sample.values.get(metric)
            unknown = torch.full((sum(self._widths(metric)),), torch.nan)
            rows.append(unknown if layers is None else torch.cat([layers[name] for name in self.num_heads]))
        if len(self._steps) > self._max_samples:
            del self._steps[0]
            for rows in self._rows.values():
                del rows[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the trajectories as plain containers and tensors."""
        return {
            "num_heads": self.num_heads,
            "steps": list(self._steps),
            "values": {metric: self._table(metric) for metric in self._rows},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the trajectories of a run over the same layers; a metric it did not measure is NaN there."""
        self._steps = list(state["steps"])
        for metric in self._rows:
            saved = state["values"].get(metric)
            if saved is None:
                saved = torch.full((len(self._steps), sum(self._widths(metric))), torch.nan)
            self._rows[metric] = list(saved.float().cpu())

    def _cut(self, global_step: int) -> None:
        keep = len(self._steps)
        while keep and self._steps[keep - 1] >= global_step:
            keep -= 1
        del self._steps[keep:]
        for rows in self._rows.values():
            del rows[keep:]

    def _table(self, metric: str) -> Tensor:
        rows = self._rows[metric]
        return torch.stack(rows) if rows else torch.empty(0, sum(self._widths(metric)))

    def _widths(self, metric: str) -> list[int]:
        return [heads[METRICS[metric].scope] for heads in self.num_heads.values()]
