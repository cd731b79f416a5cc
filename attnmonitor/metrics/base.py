"""The state of every metric class: sums over sequences of one value per head.

A head's value is its mean over the sequences of the probe. Mean and spread both follow from three sums, and processes
can add sums: with ``dist_reduce_fx="sum"`` the result of `compute` is the same on one process and on eight, with shards
of any size.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from attnmonitor.functional.averages import mean_of_sums, sequence_sums, spread_of_sums
from attnmonitor.messages import whole_argument

__all__ = ["HeadMetric"]


class HeadMetric(Metric):
    """Mean over sequences of one value per head.

    Subclasses turn tensors into ``(B, num_heads)`` values and hand them to `accumulate`.

    Args:
        num_heads: Heads of the layer that have a value: query heads or key/value heads, as the catalog's scope says.
        setting: The subclass's other arguments; metrics with different settings never share a state.
        kwargs: Passed on to `torchmetrics.Metric`.

    Raises:
        ValueError: ``num_heads`` is less than 1.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    name: ClassVar[str]

    def __init__(self, num_heads: int, *, setting: tuple[object, ...] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if (whole := whole_argument(num_heads, least=1)) is None:
            raise ValueError(
                f"{type(self).__name__}(num_heads={num_heads!r}): a layer has one head or more, whole ones"
            )
        self.num_heads = num_heads = whole
        # The state's name says what is summed: MetricCollection merges metrics whose states have the same name and
        # happen to hold the same numbers after the first update, and from then on reports one for the other.
        self._sums = re.sub(r"\W+", "_", "_".join(map(str, (self.name, *setting, "sums"))))
        self.add_state(self._sums, default=torch.zeros(3, num_heads, dtype=torch.float64), dist_reduce_fx="sum")

    def accumulate(self, values: Tensor, counted: Tensor | None = None) -> None:
        """Add one value per sequence and head.

        Args:
            values: ``(B, num_heads)``. A NaN makes that head's mean NaN and leaves the others alone.
            counted: ``(B, num_heads)`` bool: the values that count; the others are as if their sequence were not there.

        Raises:
            ValueError: ``values`` is not ``(B, num_heads)``.
        """
        if values.ndim != 2 or values.shape[1] != self.num_heads:
            raise ValueError(
                f"{type(self).__name__}(num_heads={self.num_heads}): got values of shape {tuple(values.shape)}, "
                f"expected (sequences, {self.num_heads}); num_heads counts what the metric is measured per"
            )
        setattr(self, self._sums, self._state + sequence_sums(values, counted))
        # torchmetrics' wrapper around `update` sets these; a caller that has the values does not go through it.
        self._update_count, self._computed = max(1, self._update_count), None

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        # torchmetrics returns a tensor of one entry without its axis: keep the axis of heads for a layer of one head.
        wrapped = super()._wrap_compute(compute)
        return functools.wraps(wrapped)(lambda *args, **kwargs: wrapped(*args, **kwargs).reshape(self.num_heads))

    @property
    def _state(self) -> Tensor:
        """Sum, sum of squares and count per head, ``(3, num_heads)``."""
        sums: Tensor = getattr(self, self._sums)
        return sums

    def compute(self) -> Tensor:
        """Mean over sequences, ``(num_heads,)`` float32."""
        return mean_of_sums(self._state)

    def spread(self) -> Tensor:
        """Population standard deviation over sequences, ``(num_heads,)`` float32; 0 for one sequence."""
        return spread_of_sums(self._state)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value of each head, or several computed values over time, by torchmetrics; needs matplotlib.

        Args:
            val: A result of `compute` or a list of them; the current value when None.
            ax: Matplotlib axes to draw into.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)
