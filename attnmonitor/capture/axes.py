"""Factors of the axes of a tensor, those that count features and those that count positions or sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = [
    "Axes",
    "Axis",
    "Factor",
    "axis_of",
    "axis_of_number",
    "default_axes",
    "index_parts",
    "is_plain_index",
    "num_positions",
    "regrouped",
    "resized",
    "viewed",
]

Factor = tuple[bool, int]
"""A factor of an axis: whether it counts features, and its size."""

Axis = tuple[Factor, ...]
"""The factors of an axis, outermost first, without those of size 1."""

Axes = tuple[Axis | None, ...]
"""Factors of all axes of a tensor, None for an axis of which they are unknown."""


def axis_of(is_feature: bool, size: int) -> Axis:
    """Return an axis of one factor; of none where its size is 1."""
    return ((is_feature, size),) if size > 1 else ()


def default_axes(x: Tensor) -> Axes:
    """Return the axes of a tensor of unknown making: its last one counts features, of indices none does."""
    last = x.dim() - 1 if x.is_floating_point() else x.dim()
    return tuple(axis_of(position == last, size) for position, size in enumerate(x.shape))


def resized(axis: Axis | None, size: int) -> Axis | None:
    """Return an axis of which a part was taken, or that was padded or joined with another."""
    if axis is None or math.prod(n for _, n in axis) == size:
        return axis
    if len({kind for kind, _ in axis}) <= 1:
        return axis_of(bool(axis) and axis[0][0], size)
    inner = math.prod(n for _, n in axis[1:])
    if size % inner == 0:
        return (*axis_of(axis[0][0], size // inner), *axis[1:])
    return resized(axis[1:], size) if inner % size == 0 else None


def regrouped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Return the axes after a reshape; None where a new axis cuts through a factor."""
    left: list[Factor] = []
    for axis in axes:
        if axis is None:
            return None
        for kind, size in axis:
            if left and left[-1][0] == kind:
                left[-1] = (kind, left[-1][1] * size)
            else:
                left.append((kind, size))
    left.reverse()
    regrouped: list[Axis] = []
    for wanted in shape:
        taken: list[Factor] = []
        while wanted > 1:
            if not left:
                return None
            kind, size = left.pop()
            part = math.gcd(size, wanted)
            if part != min(size, wanted):
                return None
            taken.append((kind, part))
            wanted //= part
            if size > part:
                left.append((kind, size // part))
        regrouped.append(tuple(taken))
    return tuple(regrouped)


def viewed(axes: Axes, shape: Sequence[int], view: Tensor, *, is_learned: bool) -> Axes:
    """Return the axes of a view, found by the strides of ``view``, the same view of a plain tensor."""
    strides = [math.prod(shape[position + 1 :]) for position in range(len(shape))]
    found: list[Axis | None] = []
    for position, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if size == 1:
            found.append(())
        elif stride == 0:  # copies: one per sequence along the batch, else one per head; learned ones per either
            found.append(None if is_learned and position > 0 else axis_of(position > 0, size))
        else:
            source = next(i for i, own in enumerate(strides) if own <= stride and shape[i] > 1)
            found.append(resized(axes[source], size))
    return tuple(found)


def num_positions(axes: Axes) -> int:
    """Return how many positions there are along all axes."""
    return math.prod(size for axis in axes for is_feature, size in axis or () if not is_feature)


def index_parts(index: Any) -> tuple[Any, ...]:
    """Return what an index says of each axis: ``:`` and ``2`` of ``x[:, 2]``."""
    return index if isinstance(index, tuple) else (index,)


def is_plain_index(index: Any) -> bool:
    """Return whether an index gives a view; one with a list, ``x[:, [-1]]``, copies."""
    return all(x is None or x is ... or isinstance(x, slice) or type(x) is int for x in index_parts(index))


def axis_of_number(index: Any, num_axes: int) -> int | None:
    """Return the axis at which an index has its only number, ``x[:, 2]``; None for another index."""
    parts = index_parts(index)
    numbers = [position for position, x in enumerate(parts) if type(x) is int]
    if len(numbers) != 1 or not is_plain_index(index) or None in parts:
        return None
    at = numbers[0]
    return num_axes - len(parts) + at if ... in parts[:at] else at
