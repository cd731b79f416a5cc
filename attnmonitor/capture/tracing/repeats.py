"""Keys before code repeats them once per query head.

Grouped-query attention written without kernel support copies each key head to the query heads that share it, by an
expand, a repeat or `repeat_interleave`. A note on the copy holds the original keys, and passes through the views and
casts that follow. Copies come in two orders: most code keeps the copies of a key head side by side (query head h reads
key head h // g), some repeats the whole set of key heads (h % Hkv).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from attnmonitor.capture.tensor_notes import Notes

__all__ = ["Repeated", "Repeats"]

_LAYOUT_CHANGES = {
    "transpose",
    "permute",
    "swapaxes",
    "contiguous",
    "clone",
    "to",
    "float",
    "half",
    "bfloat16",
    "type_as",
    "mT",
}


@dataclass(frozen=True, eq=False)
class Repeated:
    """Keys before their heads were repeated.

    Attributes:
        source: The original keys, with axes in the order of the repeated ones.
        tiled: Whether the whole set of heads was repeated, instead of each head's copies side by side.
    """

    source: Tensor
    tiled: bool


class Repeats:
    """Notes from repeated keys to the keys before repetition."""

    def __init__(self) -> None:
        self._notes = Notes[Repeated]()
        self.observers: dict[str, Callable[..., None]] = dict.fromkeys(_LAYOUT_CHANGES, self._observe_layout_change)
        self.observers |= dict.fromkeys(("reshape", "view", "flatten"), self._observe_merge)
        self.observers |= dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile"), self._observe_copies)
        self.observers |= {"repeat_interleave": self._observe_repeat_interleave}

    def original(self, x: Tensor) -> Repeated | None:
        """Return ``x`` before its heads were repeated; None if they were not, or if something else was as well."""
        return self._notes.get(x)

    def _observe_copies(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Note copies along one axis that may count heads.

        ``(B, Hkv, 1, L, d) -> (B, Hkv, g, L, d)`` becomes a repetition of heads when the two axes are merged;
        ``(B, Hkv, L, d) -> (B, g·Hkv, L, d)`` is a repetition of heads.
        """
        source = args[0]
        if source.dim() != output.dim() or output.dim() not in (4, 5):
            return
        grown = [axis for axis in range(output.dim()) if source.shape[axis] != output.shape[axis]]
        if output.dim() == 5 and grown in ([1], [2], [3]) and source.shape[grown[0]] == 1:
            self._notes.put(output, Repeated(source, tiled=False))
        elif output.dim() == 4 and grown in ([1], [2]):
            self._notes.put(output, Repeated(source, tiled=source.shape[grown[0]] > 1))

    def _observe_merge(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        whole = args[0]
        before = self._notes.get(whole)
        if before is None:
            return
        source = before.source
        if whole.dim() == 4:
            if output.shape == whole.flatten(0, 1).shape:
                self._notes.put(output, replace(before, source=source.flatten(0, 1)))
            return
        copies = next(axis for axis in range(5) if source.shape[axis] != whole.shape[axis])
        for first in (copies - 1, copies):  # merged with the axis before it, or with the one after it
            if first in (1, 2) and output.shape == whole.flatten(first, first + 1).shape:
                tiled = first == copies and source.shape[copies + 1] > 1  # copies of a single head are in both orders
                self._notes.put(output, Repeated(source.squeeze(copies), tiled))
                return

    def _observe_repeat_interleave(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        axis = kwargs.get("dim", args[2] if len(args) > 2 else None)
        count = kwargs.get("repeats", args[1] if len(args) > 1 else None)
        if isinstance(count, int) and isinstance(axis, int) and args[0].dim() == 4 and axis % 4 in (1, 2):
            self._notes.put(output, Repeated(args[0], tiled=False))

    def _observe_layout_change(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        before = self._notes.get(args[0]) if self._notes and args else None
        if before is not None and before.source.dim() == output.dim():
            self._notes.put(output, replace(before, source=func(before.source, *args[1:], **kwargs)))
