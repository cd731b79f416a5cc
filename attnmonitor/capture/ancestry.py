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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor.capture.tensor_notes import Notes
from attnmonitor.capture.tracing.products import LabeledProduct, is_weight, labeled

__all__ = ["Ancestries", "Ancestry", "Axis", "Factor", "same_sequence"]

Factor = tuple[bool, int]
"""A factor of an axis: whether it counts features, and its size."""

Axis = tuple[Factor, ...]
"""The factors of an axis, outermost first, without those of size 1."""

_UNKNOWN = 0  # the source of a tensor that no seen function made
_VIEWS = {
    *("unbind", "chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "narrow"),
    *("__getitem__", "select", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to"),
    *("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "mT", "T", "mH", "H", "t"),
}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view", "ravel"}
_NEW = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
_NEW |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
_FROM_FIRST = {"linear", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "lstm", "gru"}
_CONVOLUTIONS = {f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)}
_PRODUCTS = {"matmul", "bmm", "mm", "baddbmm", "einsum"}
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
    axes: tuple[Axis | None, ...] | None = None
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
    """

    def __init__(self, model: nn.Module, unseen: Callable[[], None] = lambda: None) -> None:
        self._unseen = unseen
        self._notes = Notes[Ancestry]()
        self._count = 0
        self._picked_from: dict[int, frozenset[int]] = {}
        self._constants = {id(x) for x in chain(model.parameters(), model.buffers())}

    def add_inputs(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that the model is called with, each as a source of its own."""
        for x in _tensors(list(tensors)):
            if self._notes.get(x) is None:
                self._put(x, Ancestry(frozenset({self._new()})))

    def of(self, x: Tensor) -> Ancestry:
        """Return what ``x`` is made of."""
        note = self._notes.get(x)
        if note is None:
            is_constant = id(x) in self._constants or is_weight(x) or id(x._base) in self._constants
            if not is_constant:
                self._unseen()
            note = Ancestry(frozenset({-self._new() if is_constant else _UNKNOWN}), axes=_default_axes(x))
            self._notes.put(x, note)
        return note

    def is_unseen(self, x: Any) -> bool:
        """Return whether ``x`` is a tensor that no seen function made."""
        return isinstance(x, Tensor) and self.of(x).sources == {_UNKNOWN}

    def attend(self, output: Tensor, query: Ancestry) -> None:
        """Note that ``output`` is what an attention gave for queries made of ``query``."""
        known = self.of(output)
        self._notes.put(output, replace(known, sources=query.sources, attended=query.attended | {self._new()}))

    def may_be_logits(self, x: Tensor, num_tokens: int) -> bool:
        """Return whether ``x`` may hold a number per pair of positions, of so many tokens in all."""
        axes = self.of(x).axes
        if axes is None or None in axes:
            return True
        positions = math.prod(size for axis in axes if axis is not None for is_feature, size in axis if not is_feature)
        return positions > num_tokens

    def observe(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note what the outputs of a function are made of."""
        name = name.rstrip("_") if not name.startswith("_") else name
        if name in ("__setitem__", "copy"):
            self._write(args[0] if args[0]._base is None else args[0]._base, args[-1])
            return
        outputs = list(_tensors(output))
        operands = [] if name in _NEW else list(_tensors((args, kwargs)))
        if not outputs or (len(outputs) == 1 and any(outputs[0] is x for x in operands)):
            return
        axes = self._axes(name, func, args, kwargs, outputs)
        for x, of_x in zip(outputs, axes, strict=True):
            self._put(x, replace(self._origin(name, args, operands, x), axes=of_x))

    def _write(self, target: Tensor, value: Any) -> None:
        """Note what was written into a tensor: a new one is made of what fills it."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        own, part = self.of(target), self.of(value)
        axes = part.axes if part.axes is not None and value.dim() == target.dim() else own.axes
        if axes is not None:
            axes = tuple(_resized(axis, size) for axis, size in zip(axes, target.shape, strict=True))
        sources = part.sources if not own.inputs else own.sources | part.sources
        self._put(target, Ancestry(sources, own.attended | part.attended, axes, own.projected or part.projected))

    def _new(self) -> int:
        self._count += 1
        return self._count

    def _put(self, x: Tensor, note: Ancestry) -> None:
        axes = note.axes
        if axes is None:
            axes = _default_axes(x) if not note.projected else None
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
            projects = any(_is_matrix(x) for x in operands[-2:])
            chosen = [x for x in operands[-2:] if not _is_matrix(x)][:1] or operands[:1]
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
        if name in ("mul", "multiply") and full:
            return full[:1]  # a gate, or the angles of a rotary embedding, that another sequence may share
        return full or kinds

    def _picks_positions(self, name: str, args: Sequence[Any]) -> bool:
        """Return whether positions are picked by computed indices, which makes another sequence of them."""
        if not args or not isinstance(args[0], Tensor) or args[0].dim() > 3 or not args[0].is_floating_point():
            return False
        by_index = name == "__getitem__" and any(isinstance(x, Tensor) for x in _flat(args[1]))
        return by_index or name in _PICKS

    # Axes.

    def _axes(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: list[Tensor]
    ) -> list[tuple[Axis | None, ...] | None]:
        unknown: list[tuple[Axis | None, ...] | None] = [None] * len(outputs)
        if name in _NEW or not args:
            return unknown
        first = args[1] if name == "addmm" and len(args) > 1 else args[0]
        if name in _JOINS:  # an empty part has no axes
            first = max(_tensors(args), key=Tensor.numel, default=None)
        shape = outputs[0].shape
        if name in _PRODUCTS:
            product = labeled(name, args, kwargs)
            return unknown if product is None else [self._product_axes(product, outputs[0])]
        if not isinstance(first, Tensor):
            return unknown
        axes = self.of(first).axes
        if name in ("linear", "addmm", "embedding"):
            if name != "embedding" and not self.of(first).projected:  # an image whose last axis passed for features
                axes = tuple(_axis(False, size) for size in first.shape)
            lead = (
                (axes or _default_axes(first))[: len(shape) - 1]
                if axes is None or len(axes) >= len(shape) - 1
                else None
            )
            return [None if lead is None else (*lead, _axis(True, shape[-1]))]
        if name in _CONVOLUTIONS and first.dim() == len(shape) > 2:
            batch = axes[0] if axes is not None else _axis(False, shape[0])
            return [(batch, _axis(True, shape[1]), *(_axis(False, size) for size in shape[2:]))]
        if axes is None:
            return unknown
        if name in _RESHAPES:
            return [_regrouped(axes, shape)]
        if name in _VIEWS and not any(isinstance(x, Tensor) for x in _flat(list(args[1:]))):
            views = list(_tensors(func(torch.empty(first.shape, device="meta"), *args[1:], **kwargs)))
            if len(views) == len(outputs):
                return [_viewed(axes, first.shape, view) for view in views]
        if name in _REDUCTIONS and outputs[0].dim() == first.dim() - 1:
            reduced = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if not isinstance(reduced, int):
                return unknown
            left = [axis for position, axis in enumerate(axes) if position != reduced % first.dim()]
            return [tuple(left) for _ in outputs]
        return [self._like(x, first, args) for x in outputs]

    def _like(self, output: Tensor, first: Tensor, args: Sequence[Any]) -> tuple[Axis | None, ...] | None:
        """Return the axes of an operand of the same rank, resized where the output has another size."""
        operands = [x for x in _tensors(args) if x.dim() == output.dim()]
        same = [x for x in operands if x.shape == output.shape]
        chosen = next(iter(same or operands), None)
        if chosen is None:
            return None
        axes = self.of(chosen).axes
        if axes is None:
            return None
        return tuple(_resized(axis, size) for axis, size in zip(axes, output.shape, strict=True))

    def _product_axes(self, product: LabeledProduct, output: Tensor) -> tuple[Axis | None, ...] | None:
        by_label: dict[str, Axis | None] = {}
        for operand, labels in ((product.right, product.right_axes), (product.left, product.left_axes)):
            axes = tuple(_axis(True, size) for size in operand.shape) if _is_matrix(operand) else self.of(operand).axes
            for position, label in enumerate(labels):
                if operand.shape[position] > 1 or label not in by_label:
                    by_label[label] = None if axes is None else axes[position]
        axes = tuple(by_label.get(label) for label in product.out_axes)
        return axes if len(axes) == output.dim() else None


def _tensors(value: Any) -> Iterator[Tensor]:
    return (x for x in _flat(value) if isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, Mapping):
        yield from _flat(list(value.values()))
    else:
        yield value


def _is_matrix(x: Tensor) -> bool:
    """Return whether ``x`` acts as a weight in a product: a parameter, or one matrix for all sequences."""
    return is_weight(x) or x.dim() == 2


def _axis(is_feature: bool, size: int) -> Axis:
    return ((is_feature, size),) if size > 1 else ()


def _default_axes(x: Tensor) -> tuple[Axis | None, ...]:
    """Return the axes of a tensor of unknown making: its last one counts features, of indices none does."""
    last = x.dim() - 1 if x.is_floating_point() else x.dim()
    return tuple(_axis(position == last, size) for position, size in enumerate(x.shape))


def _resized(axis: Axis | None, size: int) -> Axis | None:
    """Return an axis of which a part was taken, or that was padded or joined with another."""
    if axis is None or math.prod(n for _, n in axis) == size:
        return axis
    if len({kind for kind, _ in axis}) <= 1:
        return _axis(bool(axis) and axis[0][0], size)
    inner = math.prod(n for _, n in axis[1:])
    if size % inner == 0:
        return (*_axis(axis[0][0], size // inner), *axis[1:])
    return _resized(axis[1:], size) if inner % size == 0 else None


def _regrouped(axes: tuple[Axis | None, ...], shape: Sequence[int]) -> tuple[Axis | None, ...] | None:
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


def _viewed(axes: tuple[Axis | None, ...], shape: Sequence[int], view: Tensor) -> tuple[Axis | None, ...]:
    """Return the axes of a view, found by the strides of ``view``, the same view of a plain tensor."""
    strides = [math.prod(shape[position + 1 :]) for position in range(len(shape))]
    found: list[Axis | None] = []
    for position, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if size == 1:
            found.append(())
        elif stride == 0:  # copies: of a learned sequence along the batch, else one per head
            found.append(_axis(position > 0, size))
        else:
            source = next(i for i, own in enumerate(strides) if own <= stride and shape[i] > 1)
            found.append(_resized(axes[source], size))
    return tuple(found)
