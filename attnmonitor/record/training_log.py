"""What training logs beside the heads, such as its loss: one curve per name, bounded in memory.

A value may be a tensor on a device. Reading it would make training wait for the device, so tensors are kept as they are
and many are read at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from attnmonitor.record.texts import storable

__all__ = ["Curve", "TrainingLog", "curves_of"]

Curve = list[tuple[int, float]]
"""Pairs of step and value, in increasing order of step."""

_MAX_POINTS = 10_000  # of one curve
_MAX_NAMES = 100
_MAX_UNREAD = 500  # values that may still be tensors
_MAX_NEW = 100_000  # points that no record has taken


class TrainingLog:
    """Curves of logged values, bounded in memory.

    A curve that is full keeps every second point, and grows at half the rate from then on.

    Example:
        >>> log = TrainingLog()
        >>> log.add(1, {"loss": torch.tensor(2.5), "lr": 1e-3})
        >>> log.curves
        {'loss': [(1, 2.5)], 'lr': [(1, 0.001)]}
    """

    def __init__(self) -> None:
        self._curves: dict[str, Curve] = {}
        self._latest: dict[str, int] = {}  # step of each curve's last point, also of one that is unread
        self._strides: dict[str, int] = {}  # steps between two points
        self._unread: list[tuple[int, str, float | Tensor]] = []
        self._new: list[tuple[int, str, float]] = []

    @property
    def curves(self) -> dict[str, Curve]:
        """The points kept so far, by name."""
        self._read()
        return {name: list(curve) for name, curve in self._curves.items()}

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a point to each named curve; it replaces the points of its step and later ones.

        Args:
            step: Optimizer steps done.
            values: Numbers, or tensors of one element.

        Raises:
            ValueError: The step is negative or too large, a value is not a number, or there are too many names.
        """
        if not 0 <= step < 2**63:
            raise ValueError(f"step={step} must be 0 or more, and fit into 64 bits")
        for key, value in values.items():
            name = storable(key)
            latest = self._latest.get(name)
            if latest is not None and latest < step < latest + self._strides.get(name, 1):
                continue
            if latest is None and len(self._latest) == _MAX_NAMES:
                raise ValueError(f"{name!r} is not logged: {_MAX_NAMES} other names are")
            self._unread.append((step, name, _as_number(name, value)))
            self._latest[name] = step
        if len(self._unread) >= _MAX_UNREAD:
            self._read()

    def take_new(self) -> list[tuple[int, str, float]]:
        """Return the points (step, name, value) that were added since the last call."""
        self._read()
        new, self._new = self._new, []
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return all curves as plain containers and tensors."""
        return {
            name: {
                "steps": torch.tensor([step for step, _ in curve], dtype=torch.int64, device="cpu"),
                "values": torch.tensor([value for _, value in curve], dtype=torch.float64, device="cpu"),
            }
            for name, curve in self.curves.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue saved curves."""
        curves = {
            name: list(zip(curve["steps"].tolist(), curve["values"].tolist(), strict=True))
            for name, curve in state.items()
        }
        self._curves, self._latest = curves, {name: curve[-1][0] for name, curve in curves.items() if curve}
        self._strides, self._unread, self._new = {}, [], []

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        numbers = _numbers([value for _, _, value in unread])
        points = [(step, name, number) for (step, name, _), number in zip(unread, numbers, strict=True)]
        for step, name, number in points:
            curve = self._curves.setdefault(name, [])
            _put(curve, step, number)
            if len(curve) > _MAX_POINTS:
                del curve[1::2]
                self._strides[name] = 2 * self._strides.get(name, 1)
        self._new += points
        del self._new[:-_MAX_NEW]


def curves_of(points: Iterable[tuple[int, str, float]]) -> dict[str, Curve]:
    """Return the curves that points (step, name, value) make, in the order they were logged."""
    curves: dict[str, Curve] = {}
    for step, name, value in points:
        _put(curves.setdefault(name, []), step, value)
    return curves


def _put(curve: Curve, step: int, value: float) -> None:
    while curve and curve[-1][0] >= step:  # a resume from an older checkpoint
        curve.pop()
    curve.append((step, value))


def _as_number(name: str, value: Any) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name}: a tensor of shape {tuple(value.shape)} is not one number; log its mean, for example"
            )
        return value.detach().reshape(()).to(torch.float64, copy=True)  # training may go on to write into it
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={value!r:.60} is not a number; give a number or a tensor of one element") from None


def _numbers(values: list[float | Tensor]) -> list[float]:
    """Return the values as numbers, in one transfer for each device; NaN for a tensor that cannot be read."""
    numbers = [value if isinstance(value, float) else math.nan for value in values]
    on_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            on_device.setdefault(value.device, []).append((index, value))
    for tensors in on_device.values():
        with suppress(Exception):  # a tensor without numbers, a device that failed: training reports that itself
            read = torch.stack([tensor for _, tensor in tensors]).tolist()
            for (index, _), number in zip(tensors, read, strict=True):
                numbers[index] = number
    return numbers
