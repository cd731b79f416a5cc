"""Recognize hand-written attention by following a product of queries and keys to its softmax and its values.

Hand-written attention has no name of its own but a known computation: a product ``q kᵀ`` of two activations is scaled,
masked, biased and reshaped, goes through a softmax over the keys, and the softmax weights a third activation. A `Trace`
is a note on the tensor that holds the logits; every known operation puts it on its output with one more `Step`, any
other operation ends it. The layer is reported only where the trace reaches the values, and all its steps can then be
replayed on a few rows. A router, a contrastive loss, a bilinear form or linear attention never reaches values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from attnmonitor.capture.ancestries import Ancestries
from attnmonitor.capture.axes import index_parts
from attnmonitor.capture.feature_axes import NEW
from attnmonitor.capture.function_call import FunctionCall, Observer
from attnmonitor.capture.heads import Lead
from attnmonitor.capture.layouts import Layout
from attnmonitor.capture.modules import Frames
from attnmonitor.capture.tensor_notes import Notes
from attnmonitor.capture.tracing.beginnings import Beginnings
from attnmonitor.capture.tracing.endings import MIXING, Endings
from attnmonitor.capture.tracing.operations import (
    ADDITIONS,
    IN_PLACE,
    PERMUTATIONS,
    SOFTMAXES,
    Operations,
)
from attnmonitor.capture.tracing.products import (
    PRODUCTS,
    LabeledProduct,
    is_weight,
    labeled,
)
from attnmonitor.capture.tracing.repeats import Repeated
from attnmonitor.capture.tracing.split import Split
from attnmonitor.capture.tracing.sums import sum_of_products, sum_of_weights
from attnmonitor.capture.tracing.trace import ByHead, Trace, values_by_head
from attnmonitor.capture.tracing.traced_call import TracedCall, size_along
from attnmonitor.capture.tracing.views import (
    CASTS,
    RESHAPES,
    in_split,
    with_bias,
)

__all__ = ["Tracer"]

PICKS = {"topk", "sort"}
_SEVERAL = "its logits are the sum of several query-key products"


def _of_several(trace: Trace, name: str, *, is_one: bool) -> str:
    """Return why what a function makes of several logits, or weights, cannot be measured.

    Args:
        trace: The trace of the first of them.
        name: The name of the function.
        is_one: Whether all are of one query-key product.
    """
    is_after = trace.stage == "after"
    if is_one and not is_after:
        return f"its logits are combined with themselves by {name}, which cannot be followed"
    what, of = ("weights", "softmaxes") if is_after else ("logits", "query-key products")
    if name in ADDITIONS:
        return f"its {what} are the sum of several {of}"
    return f"its {what} are made of several {of} by {name}, which cannot be followed"


class Tracer:
    """Follows products of activations through one forward.

    Args:
        frames: The running module calls.
        repeated: Returns a key as it was before it was repeated per query head; None if it was not.
        ancestries: What tensors are made of; None where it is not followed.
        found: Called with ``(trace, output, row axis of output, values by head)`` for each attention.
        missed: Called with ``(layer, reason)`` when an attention was recognized but cannot be measured.
        known: Returns what is known of a layer from the first forward; None in that one.

    Attributes:
        endings: Why traces ended.
        observers: Called by the mode with each function of these names.
    """

    def __init__(
        self,
        frames: Frames,
        repeated: Callable[[Tensor], Repeated | None],
        ancestries: Ancestries | None,
        found: Callable[[Trace, Tensor, int, Callable[[Lead], ByHead]], None],
        missed: Callable[[str, str], None],
        known: Callable[[str], Layout | None],
    ) -> None:
        self._frames = frames
        self._ancestries = ancestries
        self._repeated = repeated
        self._known = known
        self._begun = Beginnings(repeated, ancestries, known).trace_of
        self._found = found
        self._missed = missed
        self._traces = Notes[Trace]()
        self._operations = Operations(self._with_keys_first)
        self._untraced = Notes[bool]()
        self.endings = Endings(frames, ancestries, missed)
        self.observers: dict[str, Observer] = dict.fromkeys(self._operations.follow, self._observe)
        self.observers |= dict.fromkeys(PRODUCTS, self._observe_product)
        self._follow = {**self._operations.follow, "baddbmm": self._operations.add_input}
        self.observers |= self._operations.numbers.observers
        self.observers |= {"logsumexp": self._observe_normalizer, "__setitem__": self._observe_write}
        self.observers |= dict.fromkeys(("amax", "max", *CASTS, *RESHAPES), self._observe_maximum)

    # Observers of torch functions.

    def _observe(self, call: FunctionCall) -> None:
        self._note_untraced(call)
        if not self._traces or not isinstance(call.output, Tensor):
            return
        if all(self._traces.get(x) is None for x in call.arguments()):
            return
        traced = TracedCall(call)
        trace = self._operand_of(traced)
        if trace is None:
            return
        total = self._sum(traced)
        if total is not None:
            self._traces.put(call.output, total)
            return
        moved = self._follow[call.name](trace, traced) if trace.split is None else in_split(trace, trace.split, traced)
        traced.drop_traced(call.output)
        if moved is None:
            self.endings.end(trace, call.name)
            return
        # After the softmax it is known which operand holds the keys, and the calls are no longer needed.
        calls = () if moved.stage == "after" else (*moved.calls, traced)
        self._traces.put(call.output, replace(moved, calls=calls))
        if moved.split is not None and getattr(call.func, "__name__", "") in IN_PLACE:
            self._write_through(moved.split)

    def _note_untraced(self, call: FunctionCall) -> None:
        """Note weights of unknown logits: their product with values begins no attention."""
        x = call.args[0] if call.args else None
        if call.name in SOFTMAXES and call.args and self._traces.get(x) is None:
            self._untraced.put(call.output, True)
            self.endings.note_unseen_logits(x)
        elif self._untraced.get(x) and (call.name in CASTS or call.name == "dropout"):
            self._untraced.put(call.output, True)

    def _operand_of(self, call: TracedCall) -> Trace | None:
        """Set the slot of a call's operand that is followed, and return its trace; None if there is none."""
        name, operands, shape = call.name, call.operands, call.output.shape
        slots = [slot for slot, x in enumerate(operands) if self._traces.get(x) is not None]
        if name in ADDITIONS:  # one that is broadcast is a bias: a product with a table of relative positions
            slots = [slot for slot in slots if operands[slot].shape == shape] or slots
        if name in CASTS or name in RESHAPES:  # the other operand only names a type or a shape
            slots = [slot for slot in slots if slot == 0]
        if not slots:
            return None
        plain = [slot for slot in slots if not self._is_of_table(operands[slot])] if name in ADDITIONS else []
        slots = plain if len(plain) == 1 else slots  # a product with a table of relative positions is a bias
        call.slot = slots[0]
        traced = operands[call.slot]
        elementwise = name not in PERMUTATIONS and name not in RESHAPES and name not in ("cat", "pad", "__getitem__")
        if elementwise and shape != traced.shape:
            return None
        trace = self._traces.get(traced)
        others = [self._traces.get(operands[slot]) for slot in slots if operands[slot] is not traced]
        if trace is not None and others:
            is_one = all(other is not None and other.origin is trace.origin for other in others)
            trace = replace(trace, ambiguity=_of_several(trace, name, is_one=is_one))
        return trace

    def _is_of_table(self, logits: Tensor) -> bool:
        """Return whether logits are a product of activations with something that no input of the model is a part of."""
        trace = self._traces.get(logits)
        if trace is None:
            return False
        made_of, known = trace.origin.made_of, self._known(trace.origin.layer)
        if made_of is not None:
            return not (made_of.query.inputs and made_of.key.inputs)
        product = trace.origin.product
        return known is not None and {*known.product_axes} != {product.query_axis, product.key_axis}

    def _observe_product(self, call: FunctionCall) -> None:
        product = labeled(call)
        if product is None or not isinstance(call.output, Tensor):
            return
        for each in (product, product.exchanged()):
            trace = self._traces.get(each.left)
            # Features turned by one matrix for all sequences (a Hadamard one in a buffer) have begun no attention.
            if trace is not None and (trace.stage == "after" or not trace.origin.is_by_matrix):
                self._reach_product(trace, call, each)
                return
            if is_weight(each.right):
                self._frames.note_projection(each.left)
        layer, frame = self._frames.current_layer()
        for operand in (product.left, product.right):
            self.endings.note_unseen_weights(layer, operand)
        is_untraced = self._untraced.get(product.left) or self._untraced.get(product.right)
        trace = None if is_untraced else self._begun(product, layer, frame, call.output.dtype)
        if trace is None:
            return
        if call.name == "baddbmm":
            trace = self._with_input(trace, TracedCall(call))
        self._traces.put(call.output, trace)
        self.endings.note_logits(layer, call.output)

    def _reach_product(self, trace: Trace, call: FunctionCall, product: LabeledProduct) -> None:
        """Report the attention of a trace whose weights are the left operand of a product, or why there is none."""
        is_over_keys = product.contracted == {product.left_axes[trace.key_axis]}
        if trace.stage != "after" or trace.logged or trace.origin.values_reached:
            self.endings.end(trace, call.name)
            is_rollout = self._traces.get(product.right) is not None  # a product of two layers' weights
            if trace.origin.values_reached and is_over_keys and not is_rollout:
                self.endings.note_reuse(trace, call.output)
        elif trace.ambiguity:
            self._missed(trace.origin.layer, trace.ambiguity)
        elif is_over_keys:
            self._finish(trace, TracedCall(call), call.output, product)
        elif product.contracted == {product.left_axes[trace.query_axis]}:
            self._missed(trace.origin.layer, "its softmax does not run over the positions its values come from")
        else:
            self.endings.end(trace, call.name)

    def observe_other(self, call: FunctionCall) -> None:
        """Note that logits or weights went into a function that is not followed."""
        if not self._traces or call.name in NEW:
            return
        output = call.output[0] if call.name in PICKS else call.output
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        for x in (*call.args, *call.kwargs.values()):
            trace = self._traces.get(x)
            if trace is not None and (output.numel() >= x.numel() or call.name in PICKS):
                self.endings.end(trace, call.name)
                if call.name in MIXING and trace.stage != "after":
                    self._operations.mixed.put(output, trace.origin)

    def _observe_normalizer(self, call: FunctionCall) -> None:
        trace = self._traces.get(call.args[0]) if call.args else None
        if trace is not None and isinstance(call.output, Tensor) and size_along(call.output, trace.key_axis) == 1:
            self._operations.normalizers.put(call.output, trace.origin)

    def _observe_maximum(self, call: FunctionCall) -> None:
        """Note the largest logits of rows, which code subtracts before the softmax."""
        if call.name != "amax":
            self._observe(call)
        if not self._traces or not call.args:
            return
        x, largest = call.args[0], call.output[0] if isinstance(call.output, tuple) else call.output
        trace, origin = self._traces.get(x), self._operations.maxima.get(x)
        if trace is not None and largest.numel() < x.numel():
            origin = trace.origin
        if origin is not None:
            self._operations.maxima.put(largest, origin)

    def _observe_write(self, call: FunctionCall) -> None:
        """Follow a number written into logits, and a bias on a part of them that is written back."""
        target, index, value = call.args
        trace, part = self._traces.get(target), self._traces.get(value)
        if trace is not None and part is None:
            written = self._operations.written(trace, target, index, value)
            if written is not None:
                self._traces.put(target, written)
        if trace is None or part is None or part.origin is not trace.origin:
            return
        if part.split is None:
            if value.shape == target.shape:
                self._traces.put(target, part)
        elif repr(part.split.part) == repr(index_parts(index)):
            self._traces.put(target, with_bias(trace, part.split.bias(target), target))

    def _sum(self, call: TracedCall) -> Trace | None:
        """Return the trace of a sum of two products, or weights, of one layer; None for another operation."""
        if call.name not in ADDITIONS or call.operands[0] is call.operands[1]:
            return None
        first, second = (self._traces.get(x) for x in call.operands[:2])
        factor = call.kwargs.get("alpha", 1)
        if first is None or second is None:
            return None
        factor = factor if call.name == "add" else -factor
        return sum_of_products(first, second, factor) or sum_of_weights(first, second, factor)

    def _with_input(self, trace: Trace, call: TracedCall) -> Trace:
        """Return the trace of a product with what ``baddbmm`` adds to it, which may be another product."""
        added, beta = self._traces.get(call.operands[0]), call.kwargs.get("beta", 1)
        if added is None or beta == 0:
            return replace(self._operations.add_input(trace, call), calls=(call,))
        scaled = replace(trace, scale=trace.scale * call.kwargs.get("alpha", 1))
        return sum_of_products(scaled, added, beta) or replace(scaled, ambiguity=_SEVERAL)

    def _write_through(self, split: Split) -> None:
        """Follow a bias that is added to a view of the logits in place."""
        trace = self._traces.get(split.source)
        if trace is not None:
            self._traces.put(split.source, with_bias(trace, split.latest().bias(split.source), split.source))

    def _with_keys_first(self, trace: Trace) -> Trace | None:
        """Return the same trace with queries and keys exchanged, as for ``k qᵀ`` with a softmax over its rows."""
        origin = trace.origin
        mirrored: Trace | None
        if origin.summands is None:
            mirrored = self._begun(origin.labeled, origin.layer, origin.frame, origin.dtype, keys_first=True)
        else:
            first, second = (self._with_keys_first(each) for each in origin.summands[:2])
            mirrored = first and second and sum_of_products(first, second, origin.summands[2])
        for call in trace.calls:
            mirrored = mirrored and self._follow[call.name](mirrored, call)
        if mirrored and not self._frames.is_of_running_layer(origin.frame):
            mirrored.origin.values_reached = origin.values_reached
        return mirrored and replace(mirrored, calls=trace.calls, ambiguity=trace.ambiguity)

    # The end of a trace.

    def _finish(self, trace: Trace, call: TracedCall, output: Tensor, product: LabeledProduct) -> None:
        """Report the attention that a product of weights, on its left, and values completes."""
        trace.origin.values_reached = True
        before = self._repeated(product.right)
        values = product.right if before is None else before.source
        query, key = product.left_axes[trace.query_axis], product.left_axes[trace.key_axis]
        batch = [axis for axis in product.left_axes if axis not in (query, key)]
        out_axes, merged = product.out_axes, trace.merged
        row_axis = out_axes.index(query)
        trace = trace.then(call.replay(trace.query_axis, product.left))
        if merged is not None:
            if self._ancestries is not None and trace.origin.made_of is not None:
                self._ancestries.attend(output, trace.origin.made_of.query)
            trace = replace(trace, merged=None).then(lambda x, rows: merged.parted(x, row_axis))
            output, heads = merged.parted(output, row_axis), "*"  # as the label of an axis
            batch.append(heads)
            out_axes = out_axes.replace(query, heads + query if merged.heads_first else query + heads)

        def by_head(lead: Lead) -> ByHead:
            in_parts = trace.origin.summands is not None and len({*product.right_axes} - {*product.left_axes}) > 1
            if trace.mixes_heads or in_parts:  # it has fewer outputs than heads, or these are a part of its values
                return None, None
            return values_by_head(values, product.right_axes, (batch, query, key), out_axes, lead)

        self._found(trace, output, out_axes.index(query), by_head)
