"""What each head writes: the output of an attention through the weight that it meets next, its output projection.

Which call that is, and how its input holds the heads, is found in the first forward by entries, not by shapes: some
rows of the input must be the layer's output. Later forwards compare the same call again, without a wait. From there on
the part of each head is followed: a learned scale multiplies it, an adapter beside the weight is added to it, a further
weight in the same module (a factor, or a rotation before the weight) is applied to it, and a sum with anything else
ends it.

Letters: B sequences, L positions, H query heads, R rows, dv size of a value, n features after a weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.applied_weights import (
    WEIGHTS,
    AppliedWeight,
    applied_weight,
    feature_scale,
    is_plain,
    through_weight,
)
from attnmonitor.capture.function_call import FunctionCall, Observer
from attnmonitor.capture.layouts import Layouts, OutputPlace
from attnmonitor.capture.modules import Frame, Frames
from attnmonitor.capture.tensor_notes import Notes
from attnmonitor.capture.verify import RebuiltRows, without_autocast

__all__ = ["Listener", "WrittenOutputs"]

Listener = Callable[[Tensor | None], None]
"""Called with what each head writes, ``(B, H, R, n)`` in the rows of its call, again whenever more acts on it; with
None where only a part of the weights is known. The last call counts."""

_COPYING = ("to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "dropout")
_VIEWS = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "mT", "movedim")
_KEEPING = (*_COPYING, *_VIEWS)
_SCALING = ("mul", "multiply", "div", "true_divide")

_NOWHERE = OutputPlace(-1)


@dataclass(eq=False)
class _Output:
    """The output of one attention.

    Attributes:
        layer: The name of its call.
        listeners: Who wants what its heads write.
        rows: What it computed in some rows, ``(B, H, R, dv)``; by document where its rows hold several.
        whole: The rows of whole sequences that its projection's input is compared with.
        length: L.
        place: Where it met a weight in the first forward; None in that one.
        call: Returns the call of the layer, while it runs. Not kept here: its inputs would be kept with it.
        projection: Returns the call of the layer's part in which it met a weight, likewise; None where the layer itself
            applied it.
        num_fitting: Weights that were applied to something of its size since.
        num_weights: Weights that were applied to it.
    """

    layer: str
    listeners: Sequence[Listener]
    rows: Tensor
    whole: RebuiltRows
    length: int
    place: OutputPlace | None
    call: Callable[[], Frame | None]
    projection: Callable[[], Frame | None] = lambda: None
    num_fitting: int = 0
    num_weights: int = 0


@dataclass(frozen=True, eq=False)
class _Part:
    """A tensor that is a sum over heads, and the part of each head.

    Attributes:
        output: The attention.
        by_head: ``(B, H, R, n)``.
        place: Where the heads are, for the output itself; None after a weight.
        axis: Its axis of features, counted from the right.
        weights: Which of the weights that were applied to the output it has been through.
        is_inner: Whether it has been through two or more, one after the other.
    """

    output: _Output
    by_head: Tensor
    place: OutputPlace | None = None
    axis: int = -1
    weights: frozenset[int] = field(default_factory=frozenset)
    is_inner: bool = False


class WrittenOutputs:
    """Follows the output of each attention of a forward through its output projection.

    Args:
        layouts: What is known of each layer; where its output meets a weight is added.
        frames: The running module calls.

    Attributes:
        observers: Called by the mode with each function of these names.
    """

    def __init__(self, layouts: Layouts, frames: Frames) -> None:
        self._layouts = layouts
        self._frames = frames
        self._expected: _Output | None = None
        self._parts = Notes[_Part | None]()
        self.observers: dict[str, Observer] = dict.fromkeys(WEIGHTS, self._observe_weight)
        self.observers |= dict.fromkeys(_KEEPING, self._observe_keeping)
        self.observers |= dict.fromkeys(_SCALING, self._observe_scale)
        self.observers |= {"add": self._observe_sum, "sub": self._observe_sum, "addcmul": self._observe_scaled_sum}

    def expect(
        self,
        layer: str,
        frame: Frame | None,
        listeners: Sequence[Listener],
        rows: Tensor | None,
        whole: RebuiltRows,
        length: int,
    ) -> None:
        """Look for the weight that the output of an attention meets, in place of that of the attention before."""
        self._expected = None
        if not listeners or rows is None or whole.output is None:
            return
        layout = self._layouts[layer]
        self._expected = _Output(layer, listeners, rows, whole, length, layout.output_at, _weakly(frame))
        if layout.output_at is None:
            self._layouts[layer] = replace(layout, output_at=_NOWHERE)

    def _observe_weight(self, call: FunctionCall) -> None:
        if self._expected is None and not self._parts:
            return
        applied = applied_weight(call)
        if applied is None or not isinstance(call.output, Tensor):
            return
        part = self._parts.get(applied.given) or self._met(applied)
        if part is None or part.axis != applied.axis:
            return
        number = part.output.num_weights
        if part.place is not None:
            part.output.num_weights += 1
        with without_autocast(part.by_head):
            through = replace(
                part,
                by_head=through_weight(part.by_head, applied.matrix, part.place),
                place=None,
                weights=part.weights if part.place is None else frozenset({number}),
                is_inner=part.place is None,
            )
        self._note(call.output, through)

    def _met(self, applied: AppliedWeight) -> _Part | None:
        """Return the expected output if the weight was applied to it."""
        expected = self._expected
        if expected is None or not is_plain(applied.x):
            return None
        num_sequences, num_heads, _, head_dim = expected.whole.output.shape  # type: ignore[union-attr]
        features = num_heads * head_dim
        if applied.x.shape[-1] != features or applied.x.numel() != num_sequences * expected.length * features:
            return None
        known, number = expected.place, expected.num_fitting
        expected.num_fitting += 1
        if known is not None and known.number != number:
            return None
        fitting = [known] if known is not None else _fitting_places(applied.x, expected, number)
        if not fitting:
            return None
        place, is_clear = fitting[0], len(fitting) == 1
        same = _holds(applied.x, expected, place)
        self._expected = None
        expected.projection = _weakly(self._frames.call_in(expected.call()))
        # An output of zeros, or of one value for all positions, fits in several ways: the next forward looks again.
        self._layouts[expected.layer] = replace(self._layouts[expected.layer], output_at=place if is_clear else None)
        part = _Part(expected, torch.where(same, expected.rows, torch.nan), place, applied.axis)
        self._parts.put(applied.given, part)
        return part

    def _observe_keeping(self, call: FunctionCall) -> None:
        x: Any = call.args[0] if call.args else None
        output = call.output
        part = self._parts.get(x) if self._parts else None
        if part is None or not isinstance(output, Tensor) or output is x:
            return
        axis = part.axis if call.name in _COPYING else _axis_after(x, part.axis, output)
        if axis is not None and not (call.name == "dropout" and call.argument(2, "training", True)):
            self._parts.put(output, replace(part, axis=axis))

    def _observe_scale(self, call: FunctionCall) -> None:
        multiplies, output = call.name.startswith("mul"), call.output
        for part, other in self._operands(call.args, output):
            factor = feature_scale(other, output, part.axis)
            is_first = self._parts.get(call.args[0]) is part
            if factor is None or part.place is not None or call.kwargs or not (is_first or multiplies):
                self._parts.put(output, None)
            else:
                scaled = part.by_head * factor if multiplies else part.by_head / factor
                self._note(output, replace(part, by_head=scaled))
            return

    def _observe_sum(self, call: FunctionCall) -> None:
        adds, output = call.name == "add", call.output
        for part, other in self._operands(call.args, output):
            added = self._parts.get(other)
            if call.kwargs or part.place is not None:
                self._parts.put(output, None)
            elif added is not None and added.output is part.output and added.place is None:
                weights, is_inner = part.weights | added.weights, part.is_inner and added.is_inner
                by_head = part.by_head + (added.by_head if adds else -added.by_head)
                self._note(output, replace(part, by_head=by_head, weights=weights, is_inner=is_inner))
            else:  # a bias belongs to no head
                is_kept = adds or self._parts.get(call.args[0]) is part
                is_bias = feature_scale(other, output, part.axis) is not None
                self._parts.put(output, part if is_kept and is_bias else None)
            return

    def _observe_scaled_sum(self, call: FunctionCall) -> None:
        output = call.output
        for part, other in self._operands(call.args[1:], output):
            factor = feature_scale(other, output, part.axis)
            if factor is not None and part.place is None:
                self._note(output, replace(part, by_head=part.by_head * factor))
            self._parts.put(output, None)  # the sum with something else ends it
            return

    def _operands(self, args: Sequence[Any], output: Any) -> Iterator[tuple[_Part, Any]]:
        """Yield each operand of an operation on two that has parts, with the other operand."""
        if self._parts and isinstance(output, Tensor) and len(args) == 2:
            for one, other in (args, args[::-1]):
                part = self._parts.get(one)
                if part is not None:
                    yield part, other

    def _note(self, x: Tensor, part: _Part) -> None:
        self._parts.put(x, part)
        if not part.is_inner or self._frames.is_running(part.output.projection()):
            is_whole = len(part.weights) == part.output.num_weights
            for listen in part.output.listeners:
                listen(part.by_head if is_whole else None)


def _weakly(call: Frame | None) -> Callable[[], Frame | None]:
    return (lambda: None) if call is None else weakref.ref(call)


def _axis_after(x: Tensor, axis: int, output: Tensor) -> int | None:
    """Return where an axis of features is after a view, counted from the right; None where that is not clear."""
    if output.shape[-1:] == x.shape[-1:] and output.stride(-1) == x.stride(-1) and axis == -1:
        return -1
    axes = [at - output.dim() for at, size in enumerate(output.shape) if size == x.shape[axis]]
    same = [at for at in axes if output.stride(at) == x.stride(axis)]
    return same[0] if len(same) == 1 else None


def _fitting_places(x: Tensor, expected: _Output, number: int) -> list[OutputPlace]:
    """Return the ways in which a tensor holds the output of an attention; waits for the device."""
    assert expected.whole.output is not None
    num_sequences, num_heads, _, head_dim = expected.whole.output.shape
    orders = (
        (False, True) if num_sequences > 1 and expected.length > 1 else (False,),
        (False, True) if num_heads > 1 and head_dim > 1 else (False,),
    )
    places = (OutputPlace(number, *order) for order in product(*orders))
    return [place for place in places if bool(_holds(x, expected, place))]


def _holds(x: Tensor, expected: _Output, place: OutputPlace) -> Tensor:
    """Return whether a tensor holds the output of an attention in that order, a 0-dim bool; made without a wait."""
    output = expected.whole.output
    assert output is not None
    num_sequences, num_heads, _, head_dim = output.shape
    if place.rows_first:
        rows = x.reshape(expected.length, num_sequences, -1).index_select(0, expected.whole.rows).transpose(0, 1)
    else:
        rows = x.reshape(num_sequences, expected.length, -1).index_select(1, expected.whole.rows)
    by_head = (
        rows.unflatten(-1, (head_dim, num_heads)).permute(0, 3, 1, 2)
        if place.heads_last
        else rows.unflatten(-1, (num_heads, head_dim)).transpose(1, 2)
    )
    output = output.to(by_head.dtype)
    same: Tensor = ((by_head == output) | (by_head.isnan() & output.isnan())).all()
    return same
