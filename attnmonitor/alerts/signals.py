"""From a metric of every head to the numbers that thresholds are put on.

The contrast is what makes alerts usable: warm-up, the learning rate and the data move all heads together, so a head's
change minus the *median change over all heads* cancels them, while one sick head does not cancel. The price is that a
fault of the whole run cancels as well; rules about the run look at values and at shares of heads instead.

All heads of a model lie in one flat tensor, in forward order. N is their number, T a number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnmonitor.alerts.rules import Threshold
from attnmonitor.metrics.catalog import METRICS

__all__ = ["Heads", "Past", "Recent", "Reference", "Unit", "evaluate", "unread"]

SMALLEST = 1e-7
"""What a logarithm is taken of at least: the resolution of float32 near 1, and far below any live head."""

SPREAD_FLOOR = 0.1
"""Added to the robust spread of the contrast: heads that agree closely must not turn a 10 % change into an outlier."""

SHIFT_SHARE = 1 / 3
"""Of the shift that all heads share, this much is added to the spread as well: heads learn at paces of their own, so
while all of them move far, a head that is half as fast again as the others is no outlier."""


Unit = tuple[str | None, int | None]
"""What one alarm is about: (layer, head), (layer, None), or (None, None) for the run."""


class Heads:
    """The heads of one scope in a fixed order: layers as they first appear, then heads by index."""

    def __init__(self, layers: Mapping[str, int] | None = None) -> None:
        self.layers: dict[str, int] = dict(layers or {})

    def __len__(self) -> int:
        return sum(self.layers.values())

    def admit(self, values: Mapping[str, Tensor]) -> None:
        """Take in layers that were not seen before.

        Raises:
            ValueError: A known layer arrives with another number of heads.
        """
        for layer, value in values.items():
            if self.layers.setdefault(layer, len(value)) != len(value):
                raise ValueError(
                    f"alerts: layer {layer!r} arrived with {len(value)} heads but had {self.layers[layer]}; "
                    "a changed model needs new Alerts"
                )

    def flatten(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (N,) float32, NaN where there is no finite value, and (N,) bool: whether it was measured at all."""
        parts = [values.get(layer, torch.full((count,), torch.nan)) for layer, count in self.layers.items()]
        row = torch.cat([part.detach().to("cpu", torch.float32) for part in parts])
        is_measured = torch.tensor([layer in values for layer in self.layers])
        return torch.where(row.isfinite(), row, torch.nan), self.scatter(is_measured)

    def gather(self, row: Tensor, quantile: float, *, per_layer: bool) -> Tensor:
        """Return the quantile of an (N,) row over the heads of each layer, (layers,), or over all heads, (1,)."""
        groups = torch.split(row, list(self.layers.values())) if per_layer else (row,)
        return torch.stack([group.nanquantile(quantile) for group in groups])

    def scatter(self, row: Tensor) -> Tensor:
        """Return a row of layers, (layers,), or of the run, (1,), repeated for each head, (N,)."""
        counts = list(self.layers.values()) if len(row) == len(self.layers) else [len(self)]
        return row.repeat_interleave(torch.tensor(counts))


class Past:
    """The latest samples of one metric, and how many were seen of each head."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.rows = torch.empty(0, 0)  # (T, N), oldest first, the present sample included; NaN where there is no value
        self.is_sick = torch.empty(0, 0, dtype=torch.bool)  # (T, N): a sample that an alarm lived in
        self.seen = torch.zeros(0, dtype=torch.int64)  # (N,) samples with a finite value
        self.is_measured = torch.zeros(0, dtype=torch.bool)  # (N,) in the present sample, finite or not
        self._baselines: dict[tuple[str, int, int, int], Reference] = {}

    def append(self, row: Tensor, is_measured: Tensor) -> None:
        """Add the present sample, (N,) each as `Heads.flatten` returns it; N may have grown."""
        new = len(row) - len(self.seen)
        if new:
            self.rows = torch.cat([self.rows, torch.full((len(self.rows), new), torch.nan)], dim=1)
            self.is_sick = torch.cat([self.is_sick, torch.zeros(len(self.is_sick), new, dtype=torch.bool)], dim=1)
            self.seen = torch.cat([self.seen, torch.zeros(new, dtype=torch.int64)])
        self.rows = torch.cat([self.rows, row[None]])[-self.depth :]
        self.is_sick = torch.cat([self.is_sick, torch.zeros_like(row[None], dtype=torch.bool)])[-self.depth :]
        self.seen = self.seen + row.isfinite()
        self.is_measured = is_measured
        self._baselines.clear()

    def mark_sick(self, is_sick: Tensor) -> None:
        """Leave the present sample of these heads, (N,) bool, out of every baseline to come."""
        if is_sick.any():
            self.is_sick = torch.cat([self.is_sick[:-1], (self.is_sick[-1] | is_sick)[None]])

    def reference(self, threshold: Threshold, least_heads: int) -> Reference:
        """Return what the present sample is compared with; thresholds that look at the same past share it."""
        key = (threshold.reading, threshold.window, threshold.gap, least_heads)
        if key not in self._baselines:
            self._baselines[key] = self._compute_reference(threshold, least_heads)
        return self._baselines[key]

    def _compute_reference(self, threshold: Threshold, least_heads: int) -> Reference:
        x = read(threshold, self.rows[-1])
        before = slice(-(threshold.window + threshold.gap), -threshold.gap)
        rows, is_sick = read(threshold, self.rows[before]), self.is_sick[before]
        if not len(rows):
            return Reference.unknown(len(x))
        median = _median_of(rows, threshold.window)
        base = _median_of(rows.masked_fill(is_sick, torch.nan), threshold.window) if is_sick.any() else median
        # What the crowd did is measured on all heads, sick or not: a median bears some, and misses none of its heads.
        change = x - median
        # The crowd is written as a level, not as a change, so that it can be kept: now minus level stays its shift.
        can_compare = int(change.isfinite().sum()) >= least_heads
        crowd = x.nanmedian() - change.nanmedian() if can_compare else torch.tensor(torch.nan)
        return Reference(base, crowd.expand(len(x)))


class Recent:
    """What is remembered of a run: the heads of either scope and the past of every metric that a rule reads.

    Args:
        depths: Samples to remember, per metric.
    """

    def __init__(self, depths: Mapping[str, int]) -> None:
        self.pasts = {metric: Past(depth) for metric, depth in depths.items()}
        self.heads: dict[str, Heads] = {"query_head": Heads(), "kv_head": Heads()}

    def append(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take in one sample; metrics that no rule reads are left alone."""
        present = [metric for metric in self.pasts if metric in values]
        for metric in present:
            self.heads_of(metric).admit(values[metric])
        for metric in present:
            self.pasts[metric].append(*self.heads_of(metric).flatten(values[metric]))

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
            "pasts": {
                metric: {"rows": past.rows, "is_sick": past.is_sick, "seen": past.seen}
                for metric, past in self.pasts.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; a metric that the state does not know starts with no past."""
        self.heads = {scope: Heads(layers) for scope, layers in state["heads"].items()}
        for metric in self.pasts.keys() & state["pasts"].keys():
            past, stored = self.pasts[metric], state["pasts"][metric]
            past.rows, past.is_sick = (stored[name][-past.depth :].clone() for name in ("rows", "is_sick"))
            past.seen = stored["seen"].clone()


@dataclass(frozen=True)
class Reference:
    """What a value is compared with; kept still while an alarm lives, so that a fault does not become its own normal.

    It stands still as well where half of the window is missing or sick, so that a fault that is over is not taken for
    what its head was like before.

    Attributes:
        base: (N,) the head's own baseline of x.
        crowd: (N,) what the median head had at that time, NaN where there are too few heads to compare with.
    """

    base: Tensor
    crowd: Tensor

    @classmethod
    def unknown(cls, count: int) -> Reference:
        """Return references for ``count`` heads that have none yet."""
        return cls(torch.full((count,), torch.nan), torch.full((count,), torch.nan))

    def grown_to(self, count: int) -> Reference:
        """Return these references and unknown ones up to ``count`` heads."""
        if count == len(self.base):
            return self
        more = Reference.unknown(count - len(self.base))
        return Reference(torch.cat([self.base, more.base]), torch.cat([self.crowd, more.crowd]))


def _median_of(rows: Tensor, window: int) -> Tensor:
    """Return the median of each column, (N,); half a window is the least that it may speak for."""
    return torch.where(rows.isfinite().sum(dim=0) * 2 >= window, rows.nanmedian(dim=0).values, torch.nan)


def read(threshold: Threshold, metric: Tensor) -> Tensor:
    """Return x, the metric as the threshold reads it."""
    if threshold.reading == "log":
        return metric.clamp(min=SMALLEST).log()
    if threshold.reading == "log_slack":
        return (1 - metric).clamp(min=SMALLEST).log()
    if threshold.reading == "log_excess":
        return (metric - 1).clamp(min=SMALLEST).log()
    return metric


def unread(threshold: Threshold, x: Tensor) -> Tensor:
    """Return the metric that is read as x."""
    if threshold.reading == "log":
        return x.exp()
    if threshold.reading == "log_slack":
        return 1 - x.exp()
    if threshold.reading == "log_excess":
        return 1 + x.exp()
    return x


def evaluate(
    threshold: Threshold,
    past: Past,
    *,
    kept: Reference,
    is_kept: Tensor,  # (N,) bool
    least_heads: int,
) -> tuple[Tensor, Reference]:
    """Return the threshold's signal for every head now, and what it was compared with.

    Args:
        threshold: What to look at.
        past: Samples of its metric, the present one last.
        kept: Reference of earlier samples.
        is_kept: (N,) bool: heads whose alarm lives, for which ``kept`` stands still.
        least_heads: Heads needed for a comparison among heads; with fewer, the contrast is the change.

    Returns:
        (N,) signal, NaN where unknown, and the `Reference` used.
    """
    now = past.rows[-1]
    if threshold.signal == "non_finite":
        return torch.where(past.is_measured, now.isnan().float(), torch.nan), kept
    x = read(threshold, now)
    if threshold.signal == "value":
        return x, kept
    fresh = past.reference(threshold, least_heads)
    stands = is_kept | fresh.base.isnan()
    reference = Reference(torch.where(stands, kept.base, fresh.base), torch.where(stands, kept.crowd, fresh.crowd))
    change = x - reference.base
    if threshold.signal == "change":
        return change, reference
    shift = (x.nanmedian() - reference.crowd).nan_to_num(nan=0.0)
    contrast = change - shift
    if threshold.signal == "contrast":
        return contrast, reference
    # Where there are too few heads to compare with, their spread is not known either, and the floor stands for it.
    spread = 1.4826 * (contrast - contrast.nanmedian()).abs().nanmedian()
    spread = torch.where(reference.crowd.isnan(), 0.0, spread) + SHIFT_SHARE * shift.abs()
    return contrast / (spread + SPREAD_FLOOR), reference
