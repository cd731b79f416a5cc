"""Notes about tensors that live exactly as long as the tensors do.

A forward makes thousands of intermediate tensors; a note about one must neither keep it alive nor be read for another
that was later given the same address. Equality of tensors is elementwise, so the usual weak dictionaries do not serve.
"""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

from torch import Tensor

__all__ = ["Notes"]

T = TypeVar("T")


class Notes(Generic[T]):
    """A mapping from tensor objects to notes, by identity, that drops a note when its tensor dies."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[weakref.ref[Tensor], T]] = {}

    def get(self, tensor: Any) -> T | None:
        """The note on ``tensor``, None if there is none (or it is no tensor)."""
        entry = self._notes.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def __bool__(self) -> bool:
        """Whether there is any note, for those who ask on every operation of a forward."""
        return bool(self._notes)

    def put(self, tensor: Tensor, note: T) -> None:
        """Write ``note`` on ``tensor``, over an earlier one."""
        key = id(tensor)

        def forget(reference: weakref.ref[Tensor]) -> None:
            if key in self._notes and self._notes[key][0] is reference:
                del self._notes[key]

        self._notes[key] = (weakref.ref(tensor, forget), note)
