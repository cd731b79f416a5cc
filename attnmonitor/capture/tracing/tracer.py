"""Recognize hand-written attention by following a product of queries and keys to its softmax and its values.

Hand-written attention has no name of its own but a known computation: a product ``q kᵀ`` of two activations is scaled,
masked, biased and reshaped, goes through a softmax over the keys, and the softmax weights a third activation. A `Trace`
is a note on the tensor that holds the logits; every known operation puts it on its output with one more `Step`, any
other operation ends it. The layer is reported only where the trace reaches the values, and all its steps can then be
replayed on a few rows. A router, a contrastive loss, a bilinear form or linear attention never reaches values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.ancestry import Ancestries
from attnmonitor.capture.heads import Lead
from attnmonitor.capture.modules import Frame, Frames
from attnmonitor.capture.tensor_notes import Notes
from attnmonitor.capture.tracing.numbers import Numbers
from attnmonitor.capture.tracing.operands import made_of
from attnmonitor.capture.tracing.products import LabeledProduct, PairwiseProduct, is_weight, labeled, pairwise_product
from attnmonitor.capture.tracing.repeats import Repeated
from attnmonitor.capture.tracing.split import Split
from attnmonitor.capture.tracing.trace import (
    ByHead,
    Origin,
    Trace,
    TracedCall,
    add_rows,
    as_batch,
    as_soft_cap,
    size_along,
    values_by_head,
)
from attnmonitor.capture.tracing.views import (
    CASTS,
    RESHAPES,
    in_split,
    permuted,
    reshaped,
    sliced,
    with_bias,
    with_mask,
)
from attnmonitor.capture.verify import HIDDEN

__all__ = ["Tracer"]

PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
SCALINGS = {"mul": 1, "multiply": 1, "div": -1, "divide": -1, "true_divide": -1}
ADDITIONS = {"add", "sub", "subtract"}
IN_PLACE = {"add_", "__iadd__"}
NONLINEAR = {"tanh", "clamp", "clamp_min", "clamp_max", "maximum", "max", "neg", "cat", "nan_to_num", "__rsub__"}
PERMUTATIONS = {"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "mT"}
MIXING = {"linear", "conv1d", "conv2d", "einsum", "matmul", "bmm"}
EXPONENTIALS = {"exp", "exp2"}
SOFTMAXES = {"softmax", "_softmax", "_safe_softmax"}

_Follow = Callable[[Trace, TracedCall], Trace | None]


class Tracer:
    """Follows products of activations through one forward.

    Args:
        frames: The running module calls.
        repeated: Returns a key as it was before it was repeated per query head; None if it was not.
        ancestries: What tensors are made of; None where it is not followed.
        found: Called with ``(trace, output, row axis of output, values by head)`` for each attention.
        missed: Called with ``(layer, reason)`` when an attention was recognized but cannot be measured.

    Attributes:
        ended: For each layer in which a trace ended, by which operation.
    """

    def __init__(
        self,
        frames: Frames,
        repeated: Callable[[Tensor], Repeated | None],
        ancestries: Ancestries | None,
        found: Callable[[Trace, Tensor, int, Callable[[Lead], ByHead]], None],
        missed: Callable[[str, str], None],
    ) -> None:
        self._frames = frames
        self._repeated = repeated
        self._ancestries = ancestries
        self._found = found
        self._missed = missed
        self._traces = Notes[Trace]()
        self._numbers = Numbers()
        self._normalizers = Notes[Origin]()
        self._mixed = Notes[Origin]()
        self._untraced = Notes[bool]()
        self.ended: dict[str, str] = {}
        follow: dict[str, _Follow] = dict.fromkeys(SCALINGS, self._scale)
        follow |= dict.fromkeys(ADDITIONS, self._add)
        follow |= dict.fromkeys(NONLINEAR, self._nonlinear) | dict.fromkeys(CASTS, self._pass_through)
        follow |= dict.fromkeys(PERMUTATIONS, permuted) | dict.fromkeys(RESHAPES, reshaped)
        follow |= dict.fromkeys(SOFTMAXES, self._softmax)
        follow |= {"masked_fill": self._mask, "where": self._mask, "__getitem__": sliced, "dropout": self._dropout}
        follow |= {"log_softmax": self._softmax, "exp": self._exp}
        self._follow = follow
        self.observers: dict[str, Callable[..., None]] = dict.fromkeys(follow, self._observe)
        self.observers |= dict.fromkeys(PRODUCTS, self._observe_product)
        self._follow["baddbmm"] = self._add_input
        self.observers |= self._numbers.observers
        self.observers |= {"logsumexp": self._observe_normalizer, "__setitem__": self._observe_write}

    # Observers of torch functions.

    def _observe(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        if name in SOFTMAXES and args and self._traces.get(args[0]) is None:
            self._note_untraced(args[0], output)
        elif args and self._untraced.get(args[0]) and (name in CASTS or name == "dropout"):
            self._untraced.put(output, True)
        if not self._traces or not isinstance(output, Tensor):
            return
        call = TracedCall(name, func, args, kwargs, output)
        slots = [slot for slot, x in enumerate(call.operands) if self._traces.get(x) is not None]
        if name in ADDITIONS:  # one that is broadcast is a bias: a product with a table of relative positions
            slots = [slot for slot in slots if call.operands[slot].shape == output.shape] or slots
        if name in CASTS:  # the other operand only names a type
            slots = [slot for slot in slots if slot == 0]
        if not slots:
            return
        call.slot = slots[0]
        trace = self._traces.get(call.operands[call.slot])
        assert trace is not None
        if len(slots) > 1 and any(call.operands[slot] is not call.operands[call.slot] for slot in slots):
            trace = replace(trace, ambiguity="its logits are the sum of several query-key products")
        elementwise = name not in PERMUTATIONS and name not in RESHAPES and name not in ("cat", "__getitem__")
        if elementwise and output.shape != call.operands[call.slot].shape:
            return
        moved = self._follow[name](trace, call) if trace.split is None else in_split(trace, trace.split, call)
        if moved is None:
            self._end(trace, name)
        else:
            # After the softmax it is known which operand holds the keys, and the calls are no longer needed.
            self._traces.put(output, replace(moved, calls=() if moved.stage == "after" else (*moved.calls, call)))
            if moved.split is not None and getattr(func, "__name__", "") in IN_PLACE:
                self._write_through(moved.split)

    def _note_untraced(self, logits: Any, weights: Tensor) -> None:
        """Note weights of logits that were not followed: their product with values begins no attention."""
        self._untraced.put(weights, True)
        if self._ancestries is not None and self._ancestries.is_unseen(logits):
            layer = self._frames.current_layer()[0]
            self.ended[layer] = "its logits come out of a function that cannot be seen: a scripted one, or no torch's"

    def _observe_product(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        product = labeled(name, args, kwargs)
        if product is None or not isinstance(output, Tensor):
            return
        for operand, axes, other, other_axes in (
            (product.left, product.left_axes, product.right, product.right_axes),
            (product.right, product.right_axes, product.left, product.left_axes),
        ):
            trace = self._traces.get(operand)
            if trace is not None:
                if trace.stage != "after" or trace.logged or trace.origin.values_reached:
                    self._end(trace, name)
                    return
                if trace.ambiguity:
                    self._missed(trace.origin.layer, trace.ambiguity)
                elif product.contracted == {axes[trace.key_axis]}:
                    call = TracedCall(name, func, args, kwargs, output)
                    self._finish(trace, call, operand, axes, other, other_axes, product.out_axes)
                elif product.contracted == {axes[trace.query_axis]}:
                    self._missed(trace.origin.layer, "its softmax does not run over the positions its values come from")
                else:
                    self._end(trace, name)
                return
            if is_weight(other):
                self._frames.note_projection(operand)
        layer, frame = self._frames.current_layer()
        trace = self._start(product, layer, frame, output.dtype)
        if trace is not None and name == "baddbmm":
            call = TracedCall(name, func, args, kwargs, output)
            trace = replace(self._add_input(trace, call), calls=(call,))
        if trace is not None:
            self._traces.put(output, trace)

    def observe_other(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note that logits or weights went into a function that is not followed."""
        if not self._traces or not isinstance(output, Tensor) or not output.is_floating_point():
            return
        for x in (*args, *kwargs.values()):
            trace = self._traces.get(x)
            if trace is not None and output.numel() >= x.numel():
                self._end(trace, name)
                if name in MIXING and trace.stage != "after":
                    self._mixed.put(output, trace.origin)

    def _end(self, trace: Trace, name: str) -> None:
        """Note why the attention of a layer cannot be measured, if no other use of the same product is."""
        what, when = ("weights", "after") if trace.stage == "after" else ("logits", "before")
        reason = f"its {what} go through {name}, which cannot be followed"
        if name in MIXING:
            reason = (
                f"its heads are mixed by {name} {when} the softmax (talking heads), so no head has a field of its own"
            )
        if not trace.origin.values_reached:
            self.ended.setdefault(trace.origin.layer, reason)
            if name in MIXING and trace.stage != "after" and trace.origin.frame is not None:
                trace.origin.frame.mixes_heads = True
            made_of = trace.origin.made_of
            # Random features are exponentials of a product with constants.
            of_constants = made_of is not None and made_of.query.inputs and not made_of.key.inputs
            if name in EXPONENTIALS and trace.stage != "after" and not of_constants:
                self._frames.suspect()  # a softmax by hand; other products are no attention

    def _observe_normalizer(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        trace = self._traces.get(args[0]) if args else None
        if trace is not None and isinstance(output, Tensor) and size_along(output, trace.key_axis) == 1:
            self._normalizers.put(output, trace.origin)

    def _observe_write(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Follow a bias on a part of the logits that is written back into them."""
        target, index, value = args
        trace, part = self._traces.get(target), self._traces.get(value)
        if trace is None or part is None or part.origin is not trace.origin:
            return
        if part.split is None:
            if value.shape == target.shape:
                self._traces.put(target, part)
        elif repr(part.split.part) == repr(index if isinstance(index, tuple) else (index,)):
            self._traces.put(target, with_bias(trace, part.split.bias(target), target))

    def _write_through(self, split: Split) -> None:
        """Follow a bias that is added to a view of the logits in place."""
        trace = self._traces.get(split.source)
        if trace is not None:
            self._traces.put(split.source, with_bias(trace, split.latest().bias(split.source), split.source))

    def _start(
        self, product: LabeledProduct, layer: str, frame: Frame | None, dtype: torch.dtype, *, keys_first: bool = False
    ) -> Trace | None:
        pair = pairwise_product(product, keys_first=keys_first)
        if pair is None or self._untraced.get(product.left) or self._untraced.get(product.right):
            return None
        repeated = self._key_before_repetition(product, pair, keys_first)
        origin = Origin(product, pair, repeated, layer, frame, dtype, made_of(self._ancestries, product, pair))
        num_axes = len(pair.batch) + 2
        return Trace(origin, pair.query_axis - num_axes, pair.key_axis - num_axes)

    def _with_keys_first(self, trace: Trace) -> Trace | None:
        """Return the same trace with queries and keys exchanged, as for ``k qᵀ`` with a softmax over its rows."""
        origin = trace.origin
        mirrored = self._start(origin.labeled, origin.layer, origin.frame, origin.dtype, keys_first=True)
        for call in trace.calls:
            mirrored = mirrored and self._follow[call.name](mirrored, call)
        return mirrored and replace(mirrored, calls=trace.calls, ambiguity=trace.ambiguity)

    def _key_before_repetition(
        self, product: LabeledProduct, pair: PairwiseProduct, keys_first: bool
    ) -> Repeated | None:
        """Return the key of ``pair`` before its heads were repeated; None if they were not, or if more was repeated."""
        left, right = self._repeated(product.left), self._repeated(product.right)
        for before, smaller in (
            (left, left and replace(product, left=left.source)),
            (right, right and replace(product, right=right.source)),
        ):
            own = smaller and pairwise_product(smaller, keys_first=keys_first)
            if before and own and own.query.shape == pair.query.shape and own.key.shape[-2:] == pair.key.shape[-2:]:
                return replace(before, source=own.key)
        return None

    # Operations on a trace: each returns the trace of its output, None where the trace ends.

    def _pass_through(self, trace: Trace, call: TracedCall) -> Trace:
        """Return the trace as it is: casts and copies change no logit, and the replay stays in full precision."""
        return trace

    def _scale(self, trace: Trace, call: TracedCall) -> Trace | None:
        sign = SCALINGS[call.name]
        if sign < 0 and call.slot != 0:
            return None
        apply = call.replay(trace)
        other = call.operands[1 - call.slot]
        number = self._numbers.of(other)
        if trace.stage == "nonlinear" and trace.capped and number is not None:
            return as_soft_cap(trace, number).then(apply)
        if trace.stage != "affine":
            return trace.then(apply)
        if number is not None:
            return trace.then(apply, scale=trace.scale * number**sign)
        if not isinstance(other, Tensor) or size_along(other, trace.key_axis) != 1:
            return trace.then(apply, stage="nonlinear", outside=trace.outside | {"bias"})
        factor = other if sign > 0 else other.reciprocal()
        return trace.then(apply, factors=(*trace.factors, as_batch(factor, trace, call.output)))

    def _add(self, trace: Trace, call: TracedCall) -> Trace | None:
        other = call.operands[1 - call.slot]
        if self._mixed.get(other) is trace.origin:
            return None
        if self._normalizers.get(other) is trace.origin and call.name != "add" and call.slot == 0:
            axes = (trace.query_axis, trace.key_axis, trace.first_column)
            over = _softmax_over(trace.key_axis, logged=True)
            return trace.then(over, stage="after", softmax_axes=axes, logged=True)
        if isinstance(other, Tensor) and other.is_floating_point():
            trace = replace(trace, has_added=True)
            if call.name == "add":
                trace = with_mask(trace, other, call.output)
        return self._nonlinear(trace, call) if call.slot and call.name != "add" else trace.then(call.replay(trace))

    def _add_input(self, trace: Trace, call: TracedCall) -> Trace:
        """Follow ``baddbmm(input, q, kᵀ, beta, alpha)``, which is ``beta·input + alpha·q kᵀ``."""
        beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
        added = call.args[0]
        trace = replace(trace, scale=trace.scale * alpha)
        if beta == 0:
            return trace
        trace = replace(with_mask(trace, added, call.output), has_added=True)
        num_rows = call.output.shape[trace.query_axis]
        apply = partial(add_rows, added, beta, trace.query_axis, num_rows)
        return trace.then(apply, fused_bias=True)

    def _mask(self, trace: Trace, call: TracedCall) -> Trace | None:
        if call.name == "masked_fill":
            blocked, fill = call.operands[1:3]
            hides_where = True
        else:
            blocked, fill = call.condition, call.operands[1 - call.slot]
            hides_where = call.slot == 1
        value = self._numbers.of(fill)
        if value is not None and value <= HIDDEN:
            trace = with_mask(trace, blocked, call.output, true_hides=hides_where)
        return trace.then(call.replay(trace))

    def _nonlinear(self, trace: Trace, call: TracedCall) -> Trace | None:
        changes: dict[str, Any] = {}
        if trace.stage == "affine":
            changes["stage"] = "nonlinear"
        if call.name == "cat":
            before = call.operands[: call.slot]
            if any(x.shape[trace.query_axis] != call.output.shape[trace.query_axis] for x in call.operands):
                return None
            changes["first_column"] = trace.first_column + sum(x.shape[trace.key_axis] for x in before)
            if trace.stage != "after":
                changes["outside"] = trace.outside | {"sinks"}
        changes["capped"] = call.name == "tanh" and trace.stage == "affine"
        return trace.then(call.replay(trace), **changes)

    def _softmax(self, trace: Trace, call: TracedCall) -> Trace | None:
        dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
        if trace.stage == "after" or not isinstance(dim, int):
            return None
        over, logged = dim % call.output.dim() - call.output.dim(), call.name == "log_softmax"
        if over == trace.query_axis:
            mirrored = self._with_keys_first(trace)
            if mirrored is None:
                return None
            trace = mirrored
        if over != trace.key_axis:
            return None
        axes = (trace.query_axis, trace.key_axis, trace.first_column)
        return trace.then(_softmax_over(trace.key_axis, logged=logged), stage="after", softmax_axes=axes, logged=logged)

    def _exp(self, trace: Trace, call: TracedCall) -> Trace | None:
        return trace.then(call.replay(trace), logged=False) if trace.logged else None

    def _dropout(self, trace: Trace, call: TracedCall) -> Trace:
        p, training = (*call.args[1:3], *(0.5, True)[len(call.args) - 1 :])[:2]
        active = call.kwargs.get("training", training) and call.kwargs.get("p", p) > 0
        return replace(trace, exact=trace.exact and not active)

    # The end of a trace.

    def _finish(
        self, trace: Trace, call: TracedCall, weights: Tensor, axes: str, values: Tensor, value_axes: str, out_axes: str
    ) -> None:
        """Report the attention that a product of ``weights`` and ``values``, with labeled axes, completes."""
        trace.origin.values_reached = True
        before = self._repeated(values)
        query, key = axes[trace.query_axis], axes[trace.key_axis]
        batch = [axis for axis in axes if axis not in (query, key)]

        def by_head(lead: Lead) -> ByHead:
            own = values if before is None else before.source
            return values_by_head(own, value_axes, (batch, query, key), out_axes, lead)

        self._found(trace.then(call.replay(trace, weights)), call.output, out_axes.index(query), by_head)


def _softmax_over(axis: int, *, logged: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the step of a softmax, or of its logarithm."""
    return lambda x, rows: x.log_softmax(axis) if logged else x.softmax(axis)
