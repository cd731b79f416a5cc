"""Notes on tensor objects, dropped when the tensor is freed.

A forward makes thousands of intermediate tensors. A note on one must not keep it alive, and must not be read for
another tensor that later gets the same address. Equality of tensors is elementwise, so ``WeakKeyDictionary`` fails.
"""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

from torch import Tensor

__all__ = ["Notes"]

T = TypeVar("T")


class Notes(Generic[T]):
    """A mapping from tensor objects to notes, by identity, that drops a note when its tensor is freed."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[weakref.ref[Tensor], T]] = {}

    def get(self, tensor: Any) -> T | None:
        """Return the note on ``tensor``; None if there is none or it is not a tensor."""
        entry = self._notes.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def __bool__(self) -> bool:
        """Return whether there is any note, a cheap test for every operation of a forward."""
        return bool(self._notes)

    def put(self, tensor: Tensor, note: T) -> None:
        """Set the note on ``tensor``, in place of an earlier one."""
        key = id(tensor)

        def forget(reference: weakref.ref[Tensor]) -> None:
            if key in self._notes and self._notes[key][0] is reference:
                del self._notes[key]

        self._notes[key] = (weakref.ref(tensor, forget), note)
