"""Notes on what the tensors of a forward are made of, passed from operands to outputs.

Every function of the first forward puts a note on its output. **Sources** pass from operand to output wherever
positions do: through projections, norms, sums and views, and from the queries to the output of an attention. Axes that
count features pass as `feature_axes` says. Later forwards use what was concluded from the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor.capture.ancestry import UNKNOWN, Ancestry
from attnmonitor.capture.axes import axis_of_number, default_axes, num_positions, resized
from attnmonitor.capture.feature_axes import CONVOLUTIONS, JOINS, NEW, FeatureAxes
from attnmonitor.capture.function_call import FunctionCall
from attnmonitor.capture.nested import flat, plain_tensors
from attnmonitor.capture.tensor_notes import Notes
from attnmonitor.capture.tracing.products import PRODUCTS, is_weight

__all__ = ["Ancestries"]

_FROM_FIRST = {"linear", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "lstm", "gru"}
_PICKS = {"gather", "take_along_dim", "index_select"}
_RANKS = {"topk": 1, "sort": 1, "argsort": 1, "kthvalue": 1} | dict.fromkeys(("lt", "le", "gt", "ge"), 2)
"""How many computed numbers a function ranks at least: a comparison with a constant ranks none."""
_PUTS = {"index_add", "index_copy", "index_put", "scatter", "scatter_add"}


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
        self._feature_axes = FeatureAxes(self.of, self._num_tokens)
        self._count = 0
        self._picked_from: dict[int, frozenset[int]] = {}
        self._constants = {id(x) for x in chain(model.parameters(), model.buffers())}

    def add_inputs(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that the model is called with, each as a source of its own."""
        for x in plain_tensors(list(tensors)):
            note = self._notes.get(x)
            if note is None or note.sources == {UNKNOWN}:  # a batch that was moved to the device is a new tensor
                self._put(x, Ancestry(frozenset({self._new()})))

    def of(self, x: Tensor) -> Ancestry:
        """Return what ``x`` is made of."""
        note = self._notes.get(x)
        if note is None:
            is_constant = id(x) in self._constants or is_weight(x) or id(x._base) in self._constants
            if not is_constant:
                self._unseen()
            note = Ancestry(frozenset({-self._new() if is_constant else UNKNOWN}), axes=default_axes(x))
            self._notes.put(x, note)
        return note

    def is_unseen(self, x: Any) -> bool:
        """Return whether ``x`` is a tensor that no seen function made."""
        return isinstance(x, Tensor) and self.of(x).sources == {UNKNOWN}

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

    def observe(self, call: FunctionCall) -> None:
        """Note what the outputs of a function are made of."""
        name, args, output = call.name, call.args, call.output
        name = name.rstrip("_") if not name.startswith("_") else name
        if name in ("__setitem__", "copy"):
            target = args[0] if args[0]._base is None else args[0]._base
            self._write(target, args[-1], args[1] if name == "__setitem__" else None)
            return
        outputs = list(plain_tensors(output))
        given = {key: value for key, value in call.kwargs.items() if key != "out"}
        operands = [] if name in NEW else list(plain_tensors((args, given)))
        if not outputs:
            return
        if len(outputs) == 1 and any(outputs[0] is x for x in operands) and not self._is_new(outputs[0]):
            return
        axes = self._feature_axes.of_outputs(name, call, outputs)
        rankings = self._rankings(name, operands)
        for x, of_x in zip(outputs, axes, strict=True):
            self._put(x, replace(self._origin(name, args, operands, x), axes=of_x, rankings=rankings))

    def _write(self, target: Tensor, value: Any, index: Any) -> None:
        """Note what was written into a tensor: a new one is made of what fills it."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        own, part = self.of(target), self.of(value)
        at = axis_of_number(index, target.dim()) if value.dim() == target.dim() - 1 else None
        axes = part.axes if part.axes is not None and value.dim() == target.dim() else own.axes
        if at is not None and part.projected and part.axes is not None and None not in part.axes:
            counting = self._feature_axes.axis_of_parts(part.axes, target.shape[at], may_be_heads=True)
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

    def _origin(self, name: str, args: Sequence[Any], operands: list[Tensor], output: Tensor) -> Ancestry:
        if not operands:
            return Ancestry(frozenset({-self._new()}))
        projects = name in CONVOLUTIONS or name in ("linear", "addmm", "embedding")
        if name in _FROM_FIRST or name in CONVOLUTIONS:
            chosen = operands[:1]
        elif name == "addmm":
            chosen = operands[1:2]
        elif name == "embedding":
            chosen = [x for x in operands if not x.is_floating_point()]
        elif name in PRODUCTS:
            projects = any(self._feature_axes.is_matrix(x) for x in operands[-2:])
            chosen = [x for x in operands[-2:] if not self._feature_axes.is_matrix(x)][:1] or operands[:1]
        else:
            chosen = self._carriers(name, operands, output)
        notes = [self.of(x) for x in chosen]
        sources = frozenset().union(*(note.sources for note in notes))
        if len(sources) > 1:
            sources -= {UNKNOWN}
        if self._picks_positions(name, args):
            picked = self._new() if any(source > 0 for source in sources) else -self._new()
            self._picked_from[picked] = sources
            sources = frozenset({picked})
        elif name in _PUTS:  # back to their places, as experts do with the tokens they were given
            sources = frozenset().union(*(self._picked_from.get(source, {source}) for source in sources))
        attended = frozenset().union(*(note.attended for note in notes))
        return Ancestry(sources, attended, None, projects or any(note.projected for note in notes))

    def _rankings(self, name: str, operands: list[Tensor]) -> frozenset[int]:
        """Return the rankings of computed numbers that an output follows from, the function's own among them."""
        notes = [self.of(x) for x in operands]
        rankings = frozenset[int]().union(*(note.rankings for note in notes))
        if name in _RANKS:
            computed = [x for x, note in zip(operands, notes, strict=True) if note.projected and note.inputs]
            if sum(x.is_floating_point() for x in computed) >= _RANKS[name]:
                rankings |= {self._new()}
        return rankings

    def _carriers(self, name: str, operands: list[Tensor], output: Tensor) -> list[Tensor]:
        """Return the operands whose positions the output has: not those that are broadcast, such as a shift."""
        if output.dtype == torch.bool or name in JOINS:
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
            # A gate, or angles of rotation, may be those of another sequence.
            return [max(full, key=self._feature_axes.says)]
        return full or kinds

    def _picks_positions(self, name: str, args: Sequence[Any]) -> bool:
        """Return whether positions are picked by computed indices, which makes another sequence of them."""
        if not args or not isinstance(args[0], Tensor) or args[0].dim() > 3 or not args[0].is_floating_point():
            return False
        by_index = name == "__getitem__" and any(isinstance(x, Tensor) for x in flat(args[1]))
        return by_index or name in _PICKS
