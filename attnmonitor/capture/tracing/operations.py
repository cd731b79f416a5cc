"""Operations on logits and weights: how a trace goes on after each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.axes import index_parts
from attnmonitor.capture.tensor_notes import Notes
from attnmonitor.capture.tracing.numbers import Numbers
from attnmonitor.capture.tracing.trace import Origin, Trace
from attnmonitor.capture.tracing.traced_call import TracedCall, add_rows, rows_of, size_along
from attnmonitor.capture.tracing.views import CASTS, RESHAPES, permuted, reshaped, sliced, with_mask
from attnmonitor.capture.verify import HIDDEN

__all__ = ["ADDITIONS", "EXPONENTIALS", "IN_PLACE", "PERMUTATIONS", "SOFTMAXES", "Operations"]

SCALINGS = {"mul": 1, "multiply": 1, "div": -1, "divide": -1, "true_divide": -1}
ADDITIONS = {"add", "sub", "subtract"}
IN_PLACE = {"add_", "__iadd__"}
REVERSED = {"__rsub__", "rsub"}
NONLINEAR = {"tanh", "clamp", "clamp_min", "clamp_max", "maximum", "max", "cat", "nan_to_num", "pad"}
PERMUTATIONS = {"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "mT"}
EXPONENTIALS = {"exp", "exp2"}
SOFTMAXES = {"softmax", "_softmax", "_safe_softmax"}

Follow = Callable[[Trace, TracedCall], Trace | None]


class Operations:
    """What each operation makes of a trace: the trace of its output, None where it ends.

    Args:
        mirrored: Returns a trace with queries and keys exchanged.

    Attributes:
        numbers: The plain numbers among a model's operands.
        normalizers: Logarithms of sums over the keys, of the product they belong to.
        maxima: Largest entries of rows, or of all, of the product they belong to.
        mixed: Logits whose heads were mixed, of the product they belong to.
        follow: The operations by name.
    """

    def __init__(self, mirrored: Callable[[Trace], Trace | None]) -> None:
        self._mirrored = mirrored
        self.numbers = Numbers()
        self.normalizers = Notes[Origin]()
        self.maxima = Notes[Origin]()
        self.mixed = Notes[Origin]()
        follow: dict[str, Follow] = dict.fromkeys(SCALINGS, self._scale)
        follow |= dict.fromkeys(ADDITIONS | REVERSED, self._add) | {"neg": self._negate}
        follow |= dict.fromkeys(NONLINEAR, self._nonlinear) | dict.fromkeys(CASTS, self._pass_through)
        follow |= dict.fromkeys(PERMUTATIONS, permuted) | dict.fromkeys(RESHAPES, reshaped)
        follow |= dict.fromkeys(SOFTMAXES, self._softmax)
        follow |= {"masked_fill": self._mask, "where": self._mask, "__getitem__": sliced, "dropout": self._dropout}
        follow |= {"log_softmax": self._softmax, "exp": self._exp}
        self.follow = follow

    def written(self, trace: Trace, target: Tensor, index: Any, value: Any) -> Trace | None:
        """Return the trace of logits or weights after a number was written into some of them."""
        number = self.numbers.of(value)
        if number is None:
            return None
        mask = _written(index, target)
        if number <= HIDDEN:
            trace = with_mask(trace, mask, target, true_hides=True)
        axis, num_rows = trace.query_axis, target.shape[trace.query_axis]
        return trace.then(lambda x, rows: x.masked_fill(rows_of(mask, rows, axis, num_rows), number))

    def _pass_through(self, trace: Trace, call: TracedCall) -> Trace:
        """Return the trace as it is: casts and copies change no logit, and the replay stays in full precision."""
        return trace

    def _scale(self, trace: Trace, call: TracedCall) -> Trace | None:
        sign = SCALINGS[call.name]
        if sign < 0 and call.slot != 0:
            return None
        apply = call.replay(trace.query_axis)
        other = call.operands[1 - call.slot]
        number = self.numbers.of(other)
        if trace.stage == "after":
            return trace.then(apply)
        if number is not None:
            return trace.times(number**sign).then(apply)
        if not isinstance(other, Tensor) or size_along(other, trace.key_axis) != 1:
            return trace.then(apply, stage="nonlinear", outside=trace.outside | {"bias"})
        return trace.times_each(other if sign > 0 else other.reciprocal(), call.output).then(apply)

    def _negate(self, trace: Trace, call: TracedCall) -> Trace:
        return trace.times(-1).then(call.replay(trace.query_axis))

    def _add(self, trace: Trace, call: TracedCall) -> Trace | None:
        other = call.operands[1 - call.slot]
        if self.mixed.get(other) is trace.origin:
            return None
        if self.normalizers.get(other) is trace.origin and call.name != "add" and call.slot == 0:
            over = _softmax_over(trace.key_axis, logged=True)
            return trace.then(over, stage="after", softmax_axes=trace.axes, logged=True)
        is_maximum = self.maxima.get(other) is trace.origin and size_along(other, trace.key_axis) == 1
        if is_maximum and call.name != "add" and call.slot == 0:
            return trace.then(call.replay(trace.query_axis), shifts=True)
        is_reversed = call.name in REVERSED or (call.name != "add" and call.slot == 1)  # the logits are subtracted
        alpha = call.kwargs.get("alpha", 1)
        if isinstance(other, Tensor) and other.is_floating_point():
            is_taken = call.name != "add" and not is_reversed
            trace = replace(with_mask(trace, other, call.output, is_taken=is_taken), has_added=True)
        factor = alpha if call.slot or call.name in REVERSED else 1
        return trace.times(-factor if is_reversed else factor).then(call.replay(trace.query_axis))

    def add_input(self, trace: Trace, call: TracedCall) -> Trace:
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
        value = self.numbers.of(fill)
        if value is not None and value <= HIDDEN:
            trace = with_mask(trace, blocked, call.output, true_hides=hides_where)
        return trace.then(call.replay(trace.query_axis))

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
        if call.name == "pad":
            pads = call.operands[1]
            if len(pads) != 2 or trace.key_axis != -1 or min(pads) < 0:
                return None
            changes["first_column"] = trace.first_column + pads[0]
            if trace.stage != "after":
                changes["outside"] = trace.outside | {"sinks"}
        return trace.then(call.replay(trace.query_axis), **changes)

    def _softmax(self, trace: Trace, call: TracedCall) -> Trace | None:
        dim = call.argument(1, "dim")
        if trace.stage == "after" or not isinstance(dim, int):
            return None
        over, logged = dim % call.output.dim() - call.output.dim(), call.name == "log_softmax"
        if over == trace.query_axis:
            mirrored = self._mirrored(trace)
            if mirrored is None:
                return None
            trace = mirrored
        if over != trace.key_axis:
            return None
        return trace.then(
            _softmax_over(trace.key_axis, logged=logged), stage="after", softmax_axes=trace.axes, logged=logged
        )

    def _exp(self, trace: Trace, call: TracedCall) -> Trace | None:
        return trace.then(call.replay(trace.query_axis), logged=False) if trace.logged else None

    def _dropout(self, trace: Trace, call: TracedCall) -> Trace:
        active = call.argument(2, "training", True) and call.argument(1, "p", 0.5) > 0
        return replace(trace, exact=trace.exact and not active)


def _softmax_over(axis: int, *, logged: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the step of a softmax, or of its logarithm."""
    return lambda x, rows: x.log_softmax(axis) if logged else x.softmax(axis)


def _written(index: Any, target: Tensor) -> Tensor:
    """Return which entries an index stands for, as a bool that broadcasts against the target."""
    *before, last = index_parts(index)
    is_mask = isinstance(last, Tensor) and last.dtype == torch.bool and last.shape == target.shape[-last.dim() :]
    plain = all(part is Ellipsis or (isinstance(part, slice) and part == slice(None)) for part in before)
    if is_mask and plain and (before or last.dim() == target.dim()):
        mask: Tensor = last
        return mask
    mask = torch.zeros(target.shape, dtype=torch.bool, device=target.device)
    mask[index] = True
    return mask
