"""Which heads differ most from the others in the model.

An outlier is not a fault: healthy heads differ by factors of ten. Only alarms say that something is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnmonitor.metrics.catalog import is_log

__all__ = ["OutlierHead", "movement", "outlier_heads", "range_without_outliers"]

# Added to the spread of the heads in a distance. Where most heads are equal (integer ranks often are) the spread is 0,
# and the smallest difference would be infinitely far: below 10 % nobody needs to look.
_SPREAD_FLOOR = 0.1
_OUTLIER_DISTANCE = 4.0  # robust standard deviations


class OutlierHead(NamedTuple):
    """A head, its value, and its signed ``distance`` from the others in robust standard deviations."""

    layer: str
    head: int
    value: float
    distance: float


def outlier_heads(values: Mapping[str, ArrayLike], metric: str, k: int) -> list[OutlierHead]:
    r"""Return the ``k`` heads that differ most from the others in the model, largest distance first.

    .. math:: z = (x - \operatorname{median} x) \,/\, (1.4826 \operatorname{MAD} x + 0.1 c)

    over all heads of the model, where x is the logarithm of the value for metrics whose differences are read as ratios
    (``log_scale`` of the catalog; c = 1), and the value itself otherwise (c the larger of 1 and the median's size for
    counts, 1 for fractions). Median and MAD, because with mean and standard deviation an outlier widens the scale it
    is measured on.

    Args:
        values: For each layer ``(num_heads,)``; NaN heads are ignored.
        metric: Name of the metric, for its scale.
        k: Number of heads to return.

    Example:
        >>> values = {"h.0": [1.0, 1.1, 0.9, 1.0], "h.1": [1.2, 1.0, 9.0, 0.8]}
        >>> [(head.layer, head.head) for head in outlier_heads(values, "energy_rms", 1)]
        [('h.1', 2)]
    """
    places = [(layer, head) for layer, heads in values.items() for head in range(np.size(np.asarray(heads)))]
    if not places or k <= 0:
        return []
    flat = np.concatenate([np.asarray(heads, dtype=np.float64).ravel() for heads in values.values()])
    distances = robust_distances(flat, metric)
    order = np.argsort(-np.nan_to_num(np.abs(distances), nan=-1.0, posinf=np.inf), kind="stable")
    chosen = [int(at) for at in order[:k] if not np.isnan(distances[at])]
    return [OutlierHead(places[at][0], places[at][1], float(flat[at]), float(distances[at])) for at in chosen]


def robust_distances(values: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """Return signed distances as in `outlier_heads`, ``(num_heads,)`` in and out."""
    log_scale = is_log(metric)
    with np.errstate(divide="ignore", invalid="ignore"):  # a dead head: log 0 is infinitely far
        x = np.log(values) if log_scale else values
    if not np.isfinite(x).any():
        return np.full_like(x, np.nan)
    center = np.median(x[np.isfinite(x)])
    mad = np.median(np.abs(x[np.isfinite(x)] - center))
    unit = 1.0 if log_scale else max(1.0, abs(center))
    return np.asarray((x - center) / (1.4826 * mad + _SPREAD_FLOOR * unit))


def movement(curves: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """Return how far each head moved from the median head: the range of its distances, ``(num_heads,)``.

    Args:
        curves: ``(num_samples, num_heads)``; a head without a number has not moved.
        metric: Name of the metric: distances are of logarithms where differences are read as ratios.

    Example:
        >>> movement(np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 7.0]]), "key_rank").tolist()
        [0.0, 0.0, 5.0]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.log(curves) if is_log(metric) else curves
    x = np.where(np.isfinite(x), x, np.nan)[np.isfinite(x).any(axis=1)]
    distances = x - np.nanmedian(x, axis=1, keepdims=True)
    moved = np.fmax.reduce(distances, initial=np.nan) - np.fmin.reduce(distances, initial=np.nan)
    return np.asarray(np.nan_to_num(moved), dtype=np.float64)


def range_without_outliers(
    values: NDArray[np.float64], metric: str, quantiles: tuple[float, float]
) -> tuple[float, float] | None:
    """Return limits of a color or y scale: quantiles over the heads that are no outliers.

    Among a dozen heads a high quantile is nearly the maximum, so a single outlier would give all others one color. If
    more than a quarter of the heads are far from the median they are no outliers, and all count.

    Args:
        values: Any shape; entries that are not finite, or not positive for ratio metrics, are ignored.
        metric: Name of the metric, for its scale.
        quantiles: The lower and the upper one, in [0, 1].

    Returns:
        The limits, or None if no entry is left.

    Example:
        >>> range_without_outliers(np.array([1.0, 2.0, 3.0, 4.0, 1000.0]), "energy_rms", (0.0, 1.0))
        (1.0, 4.0)
    """
    log_scale = is_log(metric)
    known = values[np.isfinite(values) & ((values > 0) | (not log_scale))].astype(np.float64)
    if not known.size:
        return None
    inliers = known[np.abs(robust_distances(known, metric)) <= _OUTLIER_DISTANCE]
    low, high = np.quantile(inliers if 4 * inliers.size >= 3 * known.size else known, quantiles)
    return float(low), float(high)
