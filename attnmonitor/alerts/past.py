"""The latest samples of every metric that a rule reads, and the references that the present sample is compared with.

N is the number of heads (`attnmonitor.alerts.heads`), T a number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnmonitor.alerts.heads import Heads, Unit
from attnmonitor.alerts.readings import apply_reading
from attnmonitor.alerts.rules import Threshold
from attnmonitor.metrics.catalog import METRICS

__all__ = ["MetricPast", "Reference", "RunPast"]


@dataclass(frozen=True)
class Reference:
    """What a value is compared with.

    It is frozen while an alarm is pending or firing, so that a fault does not become its own baseline. It is also
    frozen where half of the window is missing or excluded, so that a fault that is over is not taken for the head's
    earlier state.

    Attributes:
        base: (N,) the head's own baseline of x.
        peers: (N,) level of the median head at that time, NaN where there are too few heads to compare with.
    """

    base: Tensor
    peers: Tensor

    @classmethod
    def unknown(cls, count: int) -> Reference:
        """Return references of ``count`` heads that have no baseline yet."""
        return cls(torch.full((count,), torch.nan), torch.full((count,), torch.nan))

    def grown_to(self, count: int) -> Reference:
        """Return these references, extended by unknown ones to ``count`` heads."""
        if count == len(self.base):
            return self
        more = Reference.unknown(count - len(self.base))
        return Reference(torch.cat([self.base, more.base]), torch.cat([self.peers, more.peers]))


class MetricPast:
    """The latest samples of one metric, and how many finite values each head has had.

    Attributes:
        rows: (T, N), oldest first, the present sample included; NaN where there is no finite value.
        is_excluded: (T, N) bool: excluded from baselines, because an alarm was pending or firing.
        seen: (N,) int64: samples with a finite value.
        is_measured: (N,) bool: measured in the present sample, finite or not.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.rows = torch.empty(0, 0)
        self.is_excluded = torch.empty(0, 0, dtype=torch.bool)
        self.seen = torch.zeros(0, dtype=torch.int64)
        self.is_measured = torch.zeros(0, dtype=torch.bool)
        self._references: dict[tuple[str, int, int, int, int], Reference] = {}

    def append(self, row: Tensor, is_measured: Tensor) -> None:
        """Add the present sample, (N,) each as `Heads.flatten` returns it; N may have grown."""
        new = len(row) - len(self.seen)
        if new:
            self.rows = torch.cat([self.rows, torch.full((len(self.rows), new), torch.nan)], dim=1)
            unmarked = torch.zeros(len(self.is_excluded), new, dtype=torch.bool)
            self.is_excluded = torch.cat([self.is_excluded, unmarked], dim=1)
            self.seen = torch.cat([self.seen, torch.zeros(new, dtype=torch.int64)])
        self.rows = torch.cat([self.rows, row[None]])[-self.depth :]
        unmarked = torch.zeros_like(row[None], dtype=torch.bool)
        self.is_excluded = torch.cat([self.is_excluded, unmarked])[-self.depth :]
        self.seen = self.seen + row.isfinite()
        self.is_measured = is_measured
        self._references.clear()

    def exclude_from_baseline(self, heads: Tensor) -> None:
        """Exclude the present sample of these heads, (N,) bool, from all later baselines."""
        if heads.any():
            self.is_excluded = torch.cat([self.is_excluded[:-1], (self.is_excluded[-1] | heads)[None]])

    def reference(self, threshold: Threshold, least_heads: int) -> Reference:
        """Return what the present sample is compared with; thresholds with the same window share one computation."""
        key = (threshold.reading, threshold.window, threshold.gap, threshold.skip, least_heads)
        if key not in self._references:
            self._references[key] = self._compute_reference(threshold, least_heads)
        return self._references[key]

    def _compute_reference(self, threshold: Threshold, least_heads: int) -> Reference:
        x = apply_reading(threshold.reading, self.rows[-1])
        before = slice(-(threshold.window + threshold.gap), -threshold.gap)
        rows, is_excluded = apply_reading(threshold.reading, self.rows[before]), self.is_excluded[before]
        if not len(rows):
            return Reference.unknown(len(x))
        if threshold.skip:
            num_from_there = self.rows.isfinite().flip(0).cumsum(0).flip(0)
            rows = rows.masked_fill((self.seen - num_from_there)[before] < threshold.skip, torch.nan)
        median = _median_of(rows, threshold.window)
        base = median
        if is_excluded.any():
            base = _median_of(rows.masked_fill(is_excluded, torch.nan), threshold.window)
        # The change of the peers is taken over all heads, in alarm or not: the median tolerates outliers, and no head
        # may be missing from it.
        change = x - median
        can_compare = int(change.isfinite().sum()) >= least_heads
        # Stored as a level, not as a change, so that it can be frozen: level now minus this level is the peers' shift.
        peers = x.nanmedian() - change.nanmedian() if can_compare else torch.tensor(torch.nan)
        return Reference(base, peers.expand(len(x)))


class RunPast:
    """The heads of both scopes, and the past of every metric that a rule reads.

    Args:
        depths: Samples to keep, per metric.
    """

    def __init__(self, depths: Mapping[str, int]) -> None:
        self.metrics = {metric: MetricPast(depth) for metric, depth in depths.items()}
        self.heads: dict[str, Heads] = {"query_head": Heads(), "kv_head": Heads()}

    def append(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add one sample; metrics that no rule reads are ignored."""
        present = [metric for metric in self.metrics if metric in values]
        for metric in present:
            self.heads_of(metric).add_layers(values[metric])
        for metric in present:
            self.metrics[metric].append(*self.heads_of(metric).flatten(values[metric]))

    def heads_of(self, metric: str) -> Heads:
        """Return the heads that the metric has values for."""
        return self.heads[METRICS[metric].scope]

    def units(self, scope: str) -> list[Unit]:
        """Return what can have an alarm in that scope, in the order of the tensors."""
        if scope == "run":
            return [(None, None)]
        if scope == "layer":
            return [(layer, None) for layer in self.layers]
        return [(layer, head) for layer, count in self.heads[scope].layers.items() for head in range(count)]

    @property
    def layers(self) -> list[str]:
        """All layers, in forward order."""
        return max((list(heads.layers) for heads in self.heads.values()), key=len)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain containers and tensors."""
        return {
            "heads": {scope: dict(heads.layers) for scope, heads in self.heads.items()},
            "metrics": {
                metric: {"rows": past.rows, "is_excluded": past.is_excluded, "seen": past.seen}
                for metric, past in self.metrics.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; a metric that is not in the state starts without a past."""
        self.heads = {scope: Heads(layers) for scope, layers in state["heads"].items()}
        for metric in self.metrics.keys() & state["metrics"].keys():
            past, stored = self.metrics[metric], state["metrics"][metric]
            past.rows, past.is_excluded = (stored[name][-past.depth :].clone() for name in ("rows", "is_excluded"))
            past.seen = stored["seen"].clone()


def _median_of(rows: Tensor, window: int) -> Tensor:
    """Return the median of each column, (N,); NaN where fewer than half of the window's values are known."""
    return torch.where(rows.isfinite().sum(dim=0) * 2 >= window, rows.nanmedian(dim=0).values, torch.nan)
