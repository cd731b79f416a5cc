"""Keys before code repeats them once per query head.

Grouped-query attention written without kernel support copies each key head to the query heads that share it, by an
expand, a repeat or `repeat_interleave`. A note on the copy holds the original keys, and passes through the views and
casts that follow, and through what treats all heads alike, as rotary embeddings and norms after the copy do. Copies
come in two orders: most code keeps the copies of a key head side by side (query head h reads key head h // g), some
repeats the whole set of key heads (h % Hkv).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from attnmonitor.capture.axes import is_plain_index
from attnmonitor.capture.function_call import FunctionCall, Observer
from attnmonitor.capture.nested import plain_tensors
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

_OF_ALL_HEADS = {"mul", "multiply", "add", "sub", "subtract", "div", "true_divide", "neg", "pow", "rsqrt", "mean"}
_OF_ALL_HEADS |= {"layer_norm", "rms_norm", "normalize", "__getitem__", "chunk", "split", "cat", "concat"}


@dataclass(frozen=True, eq=False)
class Repeated:
    """Keys before their heads were repeated.

    Attributes:
        source: The original keys, with axes in the order of the repeated ones.
        tiled: Whether the whole set of heads was repeated, instead of each head's copies side by side.
    """

    source: Tensor
    tiled: bool

    def axis(self, x: Tensor) -> int | None:
        """Return the axis of heads of the copy ``x``, the only one along which it is larger; else None."""
        pairs = enumerate(zip(self.source.shape, x.shape, strict=True))
        larger = [axis for axis, (own, size) in pairs if own != size] if self.source.dim() == x.dim() else []
        return larger[0] if len(larger) == 1 else None


class Repeats:
    """Notes from repeated keys to the keys before repetition.

    Attributes:
        observers: Called by the mode with each function of these names.
    """

    def __init__(self) -> None:
        self._notes = Notes[Repeated]()
        self.observers: dict[str, Observer] = dict.fromkeys(_LAYOUT_CHANGES, self._observe_layout_change)
        self.observers |= dict.fromkeys(("reshape", "view", "flatten"), self._observe_merge)
        self.observers |= dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile"), self._observe_copies)
        self.observers |= {"repeat_interleave": self._observe_repeat_interleave}
        self.observers |= dict.fromkeys(_OF_ALL_HEADS, self._observe_all_heads)

    def original(self, x: Tensor) -> Repeated | None:
        """Return ``x`` before its heads were repeated; None if they were not, or if something else was as well."""
        return self._notes.get(x)

    def _observe_copies(self, call: FunctionCall) -> None:
        """Note copies along one axis that may count heads.

        ``(B, Hkv, 1, L, d) -> (B, Hkv, g, L, d)`` becomes a repetition of heads when the two axes are merged;
        ``(B, Hkv, L, d) -> (B, g·Hkv, L, d)`` is a repetition of heads.
        """
        source, output = call.args[0], call.output
        if source.dim() != output.dim() or output.dim() not in (4, 5):
            return
        grown = [axis for axis in range(output.dim()) if source.shape[axis] != output.shape[axis]]
        if output.dim() == 5 and grown in ([1], [2], [3]) and source.shape[grown[0]] == 1:
            self._notes.put(output, Repeated(source, tiled=False))
        elif output.dim() == 4 and grown in ([1], [2]):
            self._notes.put(output, Repeated(source, tiled=source.shape[grown[0]] > 1))

    def _observe_merge(self, call: FunctionCall) -> None:
        whole, output = call.args[0], call.output
        before = self._notes.get(whole)
        if before is None:
            return
        source = before.source
        if whole.dim() == 4:
            if output.shape == whole.shape:
                self._notes.put(output, before)
            elif output.shape == whole.flatten(0, 1).shape:
                self._notes.put(output, replace(before, source=source.flatten(0, 1)))
            return
        copies = next(axis for axis in range(5) if source.shape[axis] != whole.shape[axis])
        for first in (copies - 1, copies):  # merged with the axis before it, or with the one after it
            if first in (1, 2) and output.shape == whole.flatten(first, first + 1).shape:
                tiled = first == copies and source.shape[copies + 1] > 1  # copies of a single head are in both orders
                self._notes.put(output, Repeated(source.squeeze(copies), tiled))
                return

    def _observe_repeat_interleave(self, call: FunctionCall) -> None:
        source, count, axis = call.args[0], call.argument(1, "repeats"), call.argument(2, "dim")
        if isinstance(count, int) and isinstance(axis, int) and source.dim() == 4 and axis % 4 in (1, 2):
            self._notes.put(call.output, Repeated(source, tiled=False))

    def _observe_layout_change(self, call: FunctionCall) -> None:
        before = self._notes.get(call.args[0]) if self._notes and call.args else None
        if before is not None and before.source.dim() == call.output.dim():
            moved = call.func(before.source, *call.args[1:], **call.kwargs)
            self._notes.put(call.output, replace(before, source=moved))

    def _observe_all_heads(self, call: FunctionCall) -> None:
        """Note copies that a function treated alike: with operands that are copies as well, or the same for all heads.

        What is done to the last axis leaves the others as they are: a cut, a join, a mean.
        """
        operands = list(plain_tensors((call.args, call.kwargs))) if self._notes else []
        known = [(x, note) for x in operands if (note := self._notes.get(x)) is not None]
        if not known or (call.name == "__getitem__" and not is_plain_index(call.args[1])):
            return
        whole, before = known[0]
        axis = before.axis(whole)
        if axis is None or axis == whole.dim() - 1:
            return
        from_end = axis - whole.dim()
        own = before.source.shape[axis]
        alike = sum(
            note.axis(x) == axis and note.source.shape[axis] == own and note.tiled == before.tiled for x, note in known
        )
        shared = sum(x.dim() < -from_end or x.shape[from_end] == 1 for x in operands)
        if alike != len(known) or alike + shared != len(operands):
            return
        for x in plain_tensors(call.output):
            if x.shape[:-1] == whole.shape[:-1]:
                parts = x.unflatten(axis, (-1, own) if before.tiled else (own, -1))
                self._notes.put(x, replace(before, source=parts.select(axis if before.tiled else axis + 1, 0)))
