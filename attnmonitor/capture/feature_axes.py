"""Which axes of a function's outputs count features, by those of its operands.

A feature axis begins where a weight is applied. Views and permutations are followed factor by factor, so an axis of
heads is known as a part of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.ancestry import Ancestry
from attnmonitor.capture.axes import (
    Axes,
    Axis,
    axis_of,
    default_axes,
    is_plain_index,
    num_positions,
    regrouped,
    resized,
    viewed,
)
from attnmonitor.capture.function_call import FunctionCall
from attnmonitor.capture.nested import flat, plain_tensors
from attnmonitor.capture.tracing.products import PRODUCTS, LabeledProduct, is_weight, labeled

__all__ = ["CONVOLUTIONS", "JOINS", "NEW", "FeatureAxes"]

NEW = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
NEW |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
CONVOLUTIONS = {f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)}
JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}
_VIEWS = {
    *("unbind", "chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "narrow"),
    *("__getitem__", "select", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to"),
    *("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "mT", "T", "mH", "H", "t"),
}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view", "ravel"}
_REDUCTIONS = {"amax", "amin", "max", "min", "mean", "sum"}
_REARRANGING = _RESHAPES | _VIEWS | _REDUCTIONS | {"cdist"}


class FeatureAxes:
    """Follows the axes of tensors through the functions of a forward.

    Args:
        of: Returns what a tensor is made of.
        num_tokens: Returns how many positions the running layer's first input has; 0 where it has none.
    """

    def __init__(self, of: Callable[[Tensor], Ancestry], num_tokens: Callable[[], int]) -> None:
        self._of = of
        self._num_tokens = num_tokens

    def of_outputs(self, name: str, call: FunctionCall, outputs: list[Tensor]) -> list[Axes | None]:
        """Return the axes of what a function returned; None for an output where they are not known.

        Args:
            name: The function's name, without the ``_`` of its form in place.
            call: The call.
            outputs: The plain tensors in its output.
        """
        args = call.args
        unknown: list[Axes | None] = [None] * len(outputs)
        if name in NEW or not args:
            return unknown
        x = args[1] if name == "addmm" and len(args) > 1 else args[0]
        if name in JOINS:
            if (joined := self._joined_axes(name, call, outputs[0])) is not None:
                return [joined]
            x = max(plain_tensors(args), key=Tensor.numel, default=None)  # an empty part has no axes
        if name in PRODUCTS:
            product = labeled(call)
            return unknown if product is None else [self._product_axes(product, outputs[0])]
        if not isinstance(x, Tensor):
            return unknown
        if (weighted := self._weighted_axes(name, x, outputs[0].shape)) is not None:
            return [weighted]
        axes = self._of(x).axes
        if name in _REARRANGING:
            rearranged = unknown if axes is None else self._rearranged_axes(name, call, axes, outputs)
            if rearranged is not None:
                return rearranged
        return [self._like(output, args) for output in outputs]

    def _weighted_axes(self, name: str, x: Tensor, shape: Sequence[int]) -> Axes | None:
        """Return the axes of what a weight gives for ``x``; None for a function that applies none."""
        if name == "embedding":
            lead = (self._of(x).axes or default_axes(x))[: len(shape) - 1]
            return (*lead, axis_of(True, shape[-1]))
        if name in ("linear", "addmm"):
            return (*self._before_weight(x)[:-1], axis_of(True, shape[-1]))
        if name in CONVOLUTIONS and x.dim() == len(shape) > 2:
            batch = self._before_weight(x)[0]
            return (batch, axis_of(True, shape[1]), *(axis_of(False, size) for size in shape[2:]))
        return None

    def _rearranged_axes(
        self, name: str, call: FunctionCall, axes: Axes, outputs: Sequence[Tensor]
    ) -> list[Axes | None] | None:
        """Return the axes after a function that moves, splits, joins or drops ``axes``; None for another form of it."""
        args = call.args
        x: Tensor = args[0]
        if name == "cdist" and isinstance(args[1], Tensor):
            others = self._of(args[1]).axes
            return [None if others is None else (*axes[:-1], others[-2])]
        if name in _RESHAPES:
            return [regrouped(axes, outputs[0].shape)]
        has_plain_index = name != "__getitem__" or is_plain_index(args[1])
        if name in _VIEWS and has_plain_index and not any(isinstance(each, Tensor) for each in flat(list(args[1:]))):
            views = list(plain_tensors(call.func(torch.empty(x.shape, device="meta"), *args[1:], **call.kwargs)))
            if len(views) == len(outputs):
                is_learned = not self._of(x).inputs
                return [viewed(axes, x.shape, view, is_learned=is_learned) for view in views]
        if name in _REDUCTIONS and outputs[0].dim() == x.dim() - 1:
            reduced = call.argument(1, "dim")
            if not isinstance(reduced, int):
                return [None] * len(outputs)
            left = [axis for position, axis in enumerate(axes) if position != reduced % x.dim()]
            return [tuple(left) for _ in outputs]
        return None

    def says(self, x: Tensor) -> tuple[bool, bool, bool]:
        """Return what makes one of several operands say more of positions and axes than another."""
        note = self._of(x)
        return note.projected and note.axes is not None, bool(note.inputs), x.is_floating_point()

    def _joined_axes(self, name: str, call: FunctionCall, output: Tensor) -> Axes | None:
        """Return the axes of a stack, also along an axis of size 1, or of heads joined along the first.

        Parts of one sequence that each have all positions of the running layer differ in what projects them.
        """
        parts = list(plain_tensors(call.args[:1]))
        notes = [self._of(x) for x in parts]
        axes = notes[0].axes if notes else None
        at = call.argument(1, "dim", call.kwargs.get("axis", 0))
        if not isinstance(at, int) or axes is None or None in axes:
            return None
        at = 1 if name == "hstack" and output.dim() > 1 else at % output.dim()
        alike = all(
            note.projected and note.sources == notes[0].sources and x.shape == parts[0].shape
            for x, note in zip(parts, notes, strict=True)
        )
        counting = self.axis_of_parts(axes, len(parts), may_be_heads=alike)
        if name == "stack":
            return (*axes[:at], counting, *axes[at:])
        if alike and axes[at] == () and len(parts) == output.shape[at] > 1:
            return (*axes[:at], counting, *axes[at + 1 :])
        if at == 0 and counting == ((True, len(parts)),):
            return ((*counting, *(axes[0] or ())), *axes[1:])
        return None

    def axis_of_parts(self, axes: Axes, number: int, *, may_be_heads: bool) -> Axis | None:
        """Return the axis that counts parts: heads where each part has all positions of the layer."""
        own, num_tokens = num_positions(axes), self._num_tokens()
        if may_be_heads and own == num_tokens and number > 1:
            return axis_of(True, number)
        return axis_of(False, number) if own * number == num_tokens else None

    def is_matrix(self, x: Tensor) -> bool:
        """Return whether ``x`` acts as a weight in a product: a parameter, or one matrix that no input made."""
        return is_weight(x) or (x.dim() == 2 and not self._of(x).inputs)

    def _before_weight(self, x: Tensor) -> tuple[Axis, ...]:
        """Return the axes of a tensor that a weight is applied to.

        Where it is the first weight, all axes count positions: the last one of an image, moved by an unfold, has passed
        for features.
        """
        note = self._of(x)
        axes = note.axes if note.projected and note.axes is not None else (None,) * x.dim()
        return tuple(axis_of(False, size) if axis is None else axis for axis, size in zip(axes, x.shape, strict=True))

    def _like(self, output: Tensor, args: Sequence[Any]) -> Axes | None:
        """Return the axes of an operand of the same rank, resized where the output has another size."""
        operands = [x for x in plain_tensors(args) if x.dim() == output.dim()]
        same = [x for x in operands if x.shape[:-1] == output.shape[:-1]]
        chosen = max(same or operands, key=lambda x: (*self.says(x), x.numel()), default=None)
        if chosen is None:
            return None
        axes = self._of(chosen).axes
        if axes is None:
            return None
        return tuple(resized(axis, size) for axis, size in zip(axes, output.shape, strict=True))

    def _product_axes(self, product: LabeledProduct, output: Tensor) -> Axes | None:
        by_label: dict[str, Axis | None] = {}
        is_projection = self.is_matrix(product.left) or self.is_matrix(product.right)
        for operand, labels in ((product.right, product.right_axes), (product.left, product.left_axes)):
            if self.is_matrix(operand):
                axes: Axes | None = tuple(axis_of(True, size) for size in operand.shape)
            else:
                axes = self._before_weight(operand) if is_projection else self._of(operand).axes
            for position, label in enumerate(labels):
                if operand.shape[position] > 1 or label not in by_label:
                    by_label[label] = None if axes is None else axes[position]
        axes = tuple(by_label.get(label) for label in product.out_axes)
        return axes if len(axes) == output.dim() else None
