"""Trajectories in memory: the values of each head in the latest samples of this run.

One float32 row per metric and sample holds all heads of the model, layer after layer. The number of rows is bounded, so
that memory does not grow with the length of the run. A checkpoint has the latest rows up to a number of bytes, so that
many heads do not make it large either. The record has all samples.
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
        num_heads: Number of heads of each layer per scope: ``{"query_head": 12, "kv_head": 4}``.
        metrics: Names of the metrics to keep.
        max_samples: Number of latest samples to keep.
        max_state_bytes: Size of the values in `state_dict`, which has the latest samples that fit, one at least.
    """

    def __init__(
        self,
        num_heads: Mapping[str, Mapping[str, int]],
        metrics: tuple[str, ...],
        *,
        max_samples: int = 1000,
        max_state_bytes: int = 64 * 2**20,
    ) -> None:
        self.num_heads = {layer: dict(heads) for layer, heads in num_heads.items()}
        self._max_samples = max_samples
        self._max_state_bytes = max_state_bytes
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
        layers = torch.split(self._table(metric), self._widths(metric), dim=1)
        return ByLayer(zip(self.num_heads, layers, strict=True))

    def append(self, sample: Sample) -> None:
        """Add a sample; it replaces all samples of its step and later ones (a resume from an older checkpoint)."""
        self._drop_from(sample.global_step)
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
        """Return the trajectories of the latest samples as plain containers and tensors."""
        bytes_per_sample = 4 * sum(sum(self._widths(metric)) for metric in self._rows)
        latest = slice(-max(1, self._max_state_bytes // max(1, bytes_per_sample)), None)
        return {
            "num_heads": self.num_heads,
            "steps": self._steps[latest],
            "values": {metric: self._table(metric, latest) for metric in self._rows},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the trajectories of a run with the same layers; a metric that it did not measure is NaN."""
        steps, rows = list(state["steps"]), dict(self._rows)
        for metric in rows:
            shape = len(steps), sum(self._widths(metric))
            saved = state["values"].get(metric, torch.full(shape, torch.nan))
            if saved.shape != shape:
                raise ValueError(f"{metric} is {tuple(saved.shape)} and not {shape}, samples by heads")
            rows[metric] = list(saved.float().cpu())
        self._steps, self._rows = steps, rows

    def _drop_from(self, global_step: int) -> None:
        keep = len(self._steps)
        while keep and self._steps[keep - 1] >= global_step:
            keep -= 1
        del self._steps[keep:]
        for rows in self._rows.values():
            del rows[keep:]

    def _table(self, metric: str, samples: slice = slice(None)) -> Tensor:
        rows = self._rows[metric][samples]
        return torch.stack(rows) if rows else torch.empty(0, sum(self._widths(metric)))

    def _widths(self, metric: str) -> list[int]:
        return [heads[METRICS[metric].scope] for heads in self.num_heads.values()]
