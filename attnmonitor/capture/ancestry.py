"""What tensors are made of: the sequences that their positions come from, and which of their axes count features.

Whether attention is self or cross, and which leading axes of its operands count heads, cannot be read off shapes: two
sequences may have one length, and heads and windows one count. So every function of the first forward puts a note on
its output. **Sources** pass from operand to output wherever positions do: through projections, norms, sums and views,
and from the queries to the output of an attention. A **feature axis** begins where a weight is applied, and views and
permutations are followed factor by factor, so an axis of heads is known as a part of the features. Later forwards use
what was concluded from the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor.capture.axes import (
    Axes,
    Axis,
    axis_of,
    axis_of_number,
    default_axes,
    is_plain_index,
    num_positions,
    regrouped,
    resized,
    viewed,
)
from attnmonitor.capture.nested import flat, plain_tensors
from attnmonitor.capture.tensor_notes import Notes
from attnmonitor.capture.tracing.products import LabeledProduct, is_weight, labeled

__all__ = ["NEW", "Ancestries", "Ancestry", "same_sequence"]

_UNKNOWN = 0  # the source of a tensor that no seen function made
_VIEWS = {
    *("unbind", "chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "narrow"),
    *("__getitem__", "select", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to"),
    *("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "mT", "T", "mH", "H", "t"),
}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view", "ravel"}
NEW = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
NEW |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
_FROM_FIRST = {"linear", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "lstm", "gru"}
_CONVOLUTIONS = {f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)}
_PRODUCTS = {"matmul", "bmm", "mm", "baddbmm", "einsum", "inner", "tensordot"}
_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}
_REDUCTIONS = {"amax", "amin", "max", "min", "mean", "sum"}
_PICKS = {"gather", "take_along_dim", "index_select"}
_PUTS = {"index_add", "index_copy", "index_put", "scatter", "scatter_add"}


@dataclass(frozen=True)
class Ancestry:
    """What one tensor is made of.

    Attributes:
        sources: The tensors whose positions it has: above 0 for those that follow from the model's inputs, below 0 for
            parameters, buffers and new tensors, 0 where it is unknown.
        attended: The attentions it went through as their query.
        axes: Factors of every axis; None for an axis, or for all, where they are unknown.
        projected: Whether a weight was applied on the way, so that all feature axes are known.
    """

    sources: frozenset[int]
    attended: frozenset[int] = frozenset()
    axes: Axes | None = None
    projected: bool = False

    @property
    def inputs(self) -> frozenset[int]:
        """The sources that follow from the model's inputs."""
        return frozenset(source for source in self.sources if source > 0)


def same_sequence(query: Ancestry, key: Ancestry) -> bool | None:
    """Return whether queries and keys have the positions of one sequence; None where that is unknown."""
    ours, theirs = query.inputs, key.inputs
    if not ours and not theirs:
        ours, theirs = query.sources - {_UNKNOWN}, key.sources - {_UNKNOWN}
    if not ours or not theirs:
        return None if _UNKNOWN in query.sources | key.sources else False
    if not ours & theirs:
        return None if _UNKNOWN in query.sources & key.sources else False
    # An encoder's output as the keys of a decoder that was given the same tokens: each went through its own layers.
    return not (query.attended - key.attended and key.attended - query.attended)


class Ancestries:
    """Notes on what tensors are made of, for one forward of a model.

    Args:
        model: The model.
        unseen: Called when a tensor is met that no seen function made.
        first_input: Returns the first input of the running layer, None where it has none.
    """

    def __init__(
        self,
        model: nn.Module,
        unseen: Callable[[], None] = lambda: None,
        first_input: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self._unseen = unseen
        self._first_input = first_input
        self._notes = Notes[Ancestry]()
        self._count = 0
        self._picked_from: dict[int, frozenset[int]] = {}
        self._constants = {id(x) for x in chain(model.parameters(), model.buffers())}

    def add_inputs(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that the model is called with, each as a source of its own."""
        for x in plain_tensors(list(tensors)):
            note = self._notes.get(x)
            if note is None or note.sources == {_UNKNOWN}:  # a batch that was moved to the device is a new tensor
                self._put(x, Ancestry(frozenset({self._new()})))

    def of(self, x: Tensor) -> Ancestry:
        """Return what ``x`` is made of."""
        note = self._notes.get(x)
        if note is None:
            is_constant = id(x) in self._constants or is_weight(x) or id(x._base) in self._constants
            if not is_constant:
                self._unseen()
            note = Ancestry(frozenset({-self._new() if is_constant else _UNKNOWN}), axes=default_axes(x))
            self._notes.put(x, note)
        return note

    def is_unseen(self, x: Any) -> bool:
        """Return whether ``x`` is a tensor that no seen function made."""
        return isinstance(x, Tensor) and self.of(x).sources == {_UNKNOWN}

    def _is_new(self, x: Tensor) -> bool:
        """Return whether the forward made ``x`` of no other tensor."""
        note = self._notes.get(x)
        return note is not None and max(note.sources) < 0

    def attend(self, output: Tensor, query: Ancestry) -> None:
        """Note that ``output`` is what an attention gave for queries made of ``query``."""
        known = self.of(output)
        self._notes.put(output, replace(known, sources=query.sources, attended=query.attended | {self._new()}))

    def may_be_logits(self, x: Tensor) -> bool:
        """Return whether ``x`` may hold a number per pair of positions of the running layer's first input."""
        axes = self.of(x).axes
        if axes is None or None in axes:
            return True
        return num_positions(axes) > self._num_tokens()

    def _num_tokens(self) -> int:
        """Return how many positions the running layer's first input has; 0 where it has none."""
        hidden = self._first_input()
        if hidden is None:
            return 0
        note = self._notes.get(hidden)
        if note is not None and note.projected and note.axes is not None and None not in note.axes:
            return num_positions(note.axes)
        return hidden.numel() // (hidden.shape[1] if hidden.dim() == 4 else hidden.shape[-1])

    def observe(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note what the outputs of a function are made of."""
        name = name.rstrip("_") if not name.startswith("_") else name
        if name in ("__setitem__", "copy"):
            target = args[0] if args[0]._base is None else args[0]._base
            self._write(target, args[-1], args[1] if name == "__setitem__" else None)
            return
        outputs = list(plain_tensors(output))
        given = {key: value for key, value in kwargs.items() if key != "out"}
        operands = [] if name in NEW else list(plain_tensors((args, given)))
        if not outputs:
            return
        if len(outputs) == 1 and any(outputs[0] is x for x in operands) and not self._is_new(outputs[0]):
            return
        axes = self._axes(name, func, args, kwargs, outputs)
        for x, of_x in zip(outputs, axes, strict=True):
            self._put(x, replace(self._origin(name, args, operands, x), axes=of_x))

    def _write(self, target: Tensor, value: Any, index: Any) -> None:
        """Note what was written into a tensor: a new one is made of what fills it."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        own, part = self.of(target), self.of(value)
        at = axis_of_number(index, target.dim()) if value.dim() == target.dim() - 1 else None
        axes = part.axes if part.axes is not None and value.dim() == target.dim() else own.axes
        if at is not None and part.projected and part.axes is not None and None not in part.axes:
            counting = self._axis_of_parts(part.axes, target.shape[at], may_be_heads=True)
            axes = (*part.axes[:at], counting, *part.axes[at:])
        if axes is not None:
            axes = tuple(resized(axis, size) for axis, size in zip(axes, target.shape, strict=True))
        sources = part.sources if not own.inputs else own.sources | part.sources
        self._put(target, Ancestry(sources, own.attended | part.attended, axes, own.projected or part.projected))

    def _new(self) -> int:
        self._count += 1
        return self._count

    def _put(self, x: Tensor, note: Ancestry) -> None:
        axes = note.axes
        if axes is None:
            axes = default_axes(x) if not note.projected else None
        elif len(axes) != x.dim() or any(
            axis is not None and math.prod(size for _, size in axis) != size_of
            for axis, size_of in zip(axes, x.shape, strict=True)
        ):
            axes = None
        self._notes.put(x, replace(note, axes=axes))

    # Sources.

    def _origin(self, name: str, args: Sequence[Any], operands: list[Tensor], output: Tensor) -> Ancestry:
        if not operands:
            return Ancestry(frozenset({-self._new()}))
        projects = name in _CONVOLUTIONS or name in ("linear", "addmm", "embedding")
        if name in _FROM_FIRST or name in _CONVOLUTIONS:
            chosen = operands[:1]
        elif name == "addmm":
            chosen = operands[1:2]
        elif name == "embedding":
            chosen = [x for x in operands if not x.is_floating_point()]
        elif name in _PRODUCTS:
            projects = any(self._is_matrix(x) for x in operands[-2:])
            chosen = [x for x in operands[-2:] if not self._is_matrix(x)][:1] or operands[:1]
        else:
            chosen = self._carriers(name, operands, output)
        notes = [self.of(x) for x in chosen]
        sources = frozenset().union(*(note.sources for note in notes))
        if len(sources) > 1:
            sources -= {_UNKNOWN}
        if self._picks_positions(name, args):
            picked = self._new() if any(source > 0 for source in sources) else -self._new()
            self._picked_from[picked] = sources
            sources = frozenset({picked})
        elif name in _PUTS:  # back to their places, as experts do with the tokens they were given
            sources = frozenset().union(*(self._picked_from.get(source, {source}) for source in sources))
        attended = frozenset().union(*(note.attended for note in notes))
        return Ancestry(sources, attended, None, projects or any(note.projected for note in notes))

    def _carriers(self, name: str, operands: list[Tensor], output: Tensor) -> list[Tensor]:
        """Return the operands whose positions the output has: not those that are broadcast, such as a shift."""
        if output.dtype == torch.bool or name in _JOINS:
            return operands
        kinds = [x for x in operands if x.is_floating_point()] or [x for x in operands if x.dtype != torch.bool]
        if name in ("where", "masked_fill") and not any(self.of(x).inputs for x in kinds):
            kinds = operands  # a mask written into constants
        kinds = kinds or operands
        if name in _PUTS:
            return kinds
        full = [x for x in kinds if x.numel() == output.numel()]
        if not any(self.of(x).inputs for x in full):  # columns of an input, times ones
            full += [x for x in kinds if x.numel() < output.numel() and x.shape[:-1] == output.shape[:-1]]
        if name in ("mul", "multiply") and full:
            return [max(full, key=self._says)]  # a gate, or angles of rotation, may be those of another sequence
        return full or kinds

    def _says(self, x: Tensor) -> tuple[bool, bool, bool]:
        """Return what makes one of several operands say more of positions and axes than another."""
        note = self.of(x)
        return note.projected and note.axes is not None, bool(note.inputs), x.is_floating_point()

    def _picks_positions(self, name: str, args: Sequence[Any]) -> bool:
        """Return whether positions are picked by computed indices, which makes another sequence of them."""
        if not args or not isinstance(args[0], Tensor) or args[0].dim() > 3 or not args[0].is_floating_point():
            return False
        by_index = name == "__getitem__" and any(isinstance(x, Tensor) for x in flat(args[1]))
        return by_index or name in _PICKS

    # Axes.

    def _axes(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: list[Tensor]
    ) -> list[Axes | None]:
        unknown: list[Axes | None] = [None] * len(outputs)
        if name in NEW or not args:
            return unknown
        first = args[1] if name == "addmm" and len(args) > 1 else args[0]
        if name in _JOINS:  # an empty part has no axes
            first = max(plain_tensors(args), key=Tensor.numel, default=None)
            if (joined := self._joined_axes(name, args, kwargs, outputs[0])) is not None:
                return [joined]
        shape = outputs[0].shape
        if name in _PRODUCTS:
            product = labeled(name, args, kwargs)
            return unknown if product is None else [self._product_axes(product, outputs[0])]
        if not isinstance(first, Tensor):
            return unknown
        axes = self.of(first).axes
        rearranges = name == "cdist" or name in _RESHAPES | _VIEWS | _REDUCTIONS
        if name == "embedding":
            lead = (axes or default_axes(first))[: len(shape) - 1]
            return [(*lead, axis_of(True, shape[-1]))]
        if name in ("linear", "addmm"):
            return [(*self._before_weight(first)[:-1], axis_of(True, shape[-1]))]
        if name in _CONVOLUTIONS and first.dim() == len(shape) > 2:
            batch = self._before_weight(first)[0]
            return [(batch, axis_of(True, shape[1]), *(axis_of(False, size) for size in shape[2:]))]
        if axes is None and rearranges:
            return unknown
        if axes is None:
            return [self._like(x, args) for x in outputs]
        if name == "cdist" and isinstance(args[1], Tensor):
            others = self.of(args[1]).axes
            return [None if others is None else (*axes[:-1], others[-2])]
        if name in _RESHAPES:
            return [regrouped(axes, shape)]
        if (
            name in _VIEWS
            and not any(isinstance(x, Tensor) for x in flat(list(args[1:])))
            and (name != "__getitem__" or is_plain_index(args[1]))
        ):
            views = list(plain_tensors(func(torch.empty(first.shape, device="meta"), *args[1:], **kwargs)))
            if len(views) == len(outputs):
                is_learned = not self.of(first).inputs
                return [viewed(axes, first.shape, view, is_learned=is_learned) for view in views]
        if name in _REDUCTIONS and outputs[0].dim() == first.dim() - 1:
            reduced = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if not isinstance(reduced, int):
                return unknown
            left = [axis for position, axis in enumerate(axes) if position != reduced % first.dim()]
            return [tuple(left) for _ in outputs]
        return [self._like(x, args) for x in outputs]

    def _joined_axes(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> Axes | None:
        """Return the axes of a stack, also along an axis of size 1, or of heads joined along the first.

        Parts of one sequence that each have all positions of the running layer differ in what projects them.
        """
        parts = list(plain_tensors(args[:1]))
        notes = [self.of(x) for x in parts]
        axes = notes[0].axes if notes else None
        at = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        if not isinstance(at, int) or axes is None or None in axes:
            return None
        at = 1 if name == "hstack" and output.dim() > 1 else at % output.dim()
        alike = all(
            note.projected and note.sources == notes[0].sources and x.shape == parts[0].shape
            for x, note in zip(parts, notes, strict=True)
        )
        counting = self._axis_of_parts(axes, len(parts), may_be_heads=alike)
        if name == "stack":
            return (*axes[:at], counting, *axes[at:])
        if alike and axes[at] == () and len(parts) == output.shape[at] > 1:
            return (*axes[:at], counting, *axes[at + 1 :])
        if at == 0 and counting == ((True, len(parts)),):
            return ((*counting, *(axes[0] or ())), *axes[1:])
        return None

    def _axis_of_parts(self, axes: Axes, number: int, *, may_be_heads: bool) -> Axis | None:
        """Return the axis that counts parts: heads where each part has all positions of the layer."""
        own, num_tokens = num_positions(axes), self._num_tokens()
        if may_be_heads and own == num_tokens and number > 1:
            return axis_of(True, number)
        return axis_of(False, number) if own * number == num_tokens else None

    def _is_matrix(self, x: Tensor) -> bool:
        """Return whether ``x`` acts as a weight in a product: a parameter, or one matrix that no input made."""
        return is_weight(x) or (x.dim() == 2 and not self.of(x).inputs)

    def _before_weight(self, x: Tensor) -> tuple[Axis, ...]:
        """Return the axes of a tensor that a weight is applied to.

        Where it is the first weight, all axes count positions: the last one of an image, moved by an unfold, has passed
        for features.
        """
        note = self.of(x)
        axes = note.axes if note.projected and note.axes is not None else (None,) * x.dim()
        return tuple(axis_of(False, size) if axis is None else axis for axis, size in zip(axes, x.shape, strict=True))

    def _like(self, output: Tensor, args: Sequence[Any]) -> Axes | None:
        """Return the axes of an operand of the same rank, resized where the output has another size."""
        operands = [x for x in plain_tensors(args) if x.dim() == output.dim()]
        same = [x for x in operands if x.shape[:-1] == output.shape[:-1]]
        chosen = max(same or operands, key=lambda x: (*self._says(x), x.numel()), default=None)
        if chosen is None:
            return None
        axes = self.of(chosen).axes
        if axes is None:
            return None
        return tuple(resized(axis, size) for axis, size in zip(axes, output.shape, strict=True))

    def _product_axes(self, product: LabeledProduct, output: Tensor) -> Axes | None:
        by_label: dict[str, Axis | None] = {}
        is_projection = self._is_matrix(product.left) or self._is_matrix(product.right)
        for operand, labels in ((product.right, product.right_axes), (product.left, product.left_axes)):
            if self._is_matrix(operand):
                axes: Axes | None = tuple(axis_of(True, size) for size in operand.shape)
            else:
                axes = self._before_weight(operand) if is_projection else self.of(operand).axes
            for position, label in enumerate(labels):
                if operand.shape[position] > 1 or label not in by_label:
                    by_label[label] = None if axes is None else axes[position]
        axes = tuple(by_label.get(label) for label in product.out_axes)
        return axes if len(axes) == output.dim() else None
