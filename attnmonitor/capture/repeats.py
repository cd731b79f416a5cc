"""Keys that code repeats once per query head, and what they were before.

Grouped-query attention written without kernel support copies each key head to the query heads that share it. The copy
is made in plain sight, by an expand or `repeat_interleave`; a note on the copy leads back to the keys as they were,
through the views and casts that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from attnmonitor.capture.notes import Notes

__all__ = ["Repeats"]

_CARRIED = {
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


class Repeats:
    """Notes from repeated keys to what they were repeated from."""

    def __init__(self) -> None:
        self._sources = Notes[Tensor]()
        self.observers: dict[str, Callable[..., None]] = dict.fromkeys(_CARRIED, self._observe_carried)
        self.observers |= dict.fromkeys(("reshape", "view", "flatten"), self._observe_merge)
        self.observers |= {"expand": self._observe_expand, "broadcast_to": self._observe_expand}
        self.observers |= {"repeat_interleave": self._observe_repeat_interleave}

    def before(self, x: Tensor) -> Tensor | None:
        """``x`` before its heads were repeated, axes in the same order; None if they were not."""
        return self._sources.get(x)

    def _observe_expand(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """``(B, Hkv, 1, L, d) -> (B, Hkv, g, L, d)``: not yet a repetition of heads, until the two axes are merged."""
        source = args[0]
        if output.dim() != 5 or source.dim() != 5:
            return
        grown = [axis for axis in range(5) if source.shape[axis] != output.shape[axis]]
        if grown in ([2], [3]) and source.shape[grown[0]] == 1:
            self._sources.put(output, source)

    def _observe_merge(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        whole = args[0]
        source = self._sources.get(whole)
        if source is None:
            return
        if whole.dim() == 5:
            axis = next(axis for axis in (2, 3) if source.shape[axis] != whole.shape[axis])
            if output.shape == whole.flatten(axis - 1, axis).shape:
                self._sources.put(output, source.squeeze(axis))
        elif whole.dim() == 4 and output.shape == whole.flatten(0, 1).shape:
            self._sources.put(output, source.flatten(0, 1))

    def _observe_repeat_interleave(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        axis = kwargs.get("dim", args[2] if len(args) > 2 else None)
        count = kwargs.get("repeats", args[1] if len(args) > 1 else None)
        if isinstance(count, int) and isinstance(axis, int) and args[0].dim() == 4 and axis % 4 in (1, 2):
            self._sources.put(output, args[0])

    def _observe_carried(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        source = self._sources.get(args[0]) if self._sources and args else None
        if source is not None and source.dim() == output.dim():
            self._sources.put(output, func(source, *args[1:], **kwargs))
