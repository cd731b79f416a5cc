"""The operations from a product of queries and keys to its softmax, and the steps that replay them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.heads import Lead, MadeOf
from attnmonitor.capture.merged_rows import MergedRows
from attnmonitor.capture.modules import Frame
from attnmonitor.capture.tracing.products import LabeledProduct, PairwiseProduct, ordered
from attnmonitor.capture.tracing.repeats import Repeated
from attnmonitor.capture.tracing.split import Split
from attnmonitor.capture.tracing.traced_call import Apply, TracedCall, rows_of
from attnmonitor.capture.verify import Attention, Step

__all__ = [
    "ByHead",
    "Origin",
    "Trace",
    "as_attention",
    "values_by_head",
]

ByHead = tuple[Tensor, Callable[[Tensor], Tensor]] | tuple[None, None]


@dataclass(eq=False)
class Origin:
    """The start of a trace: the product, the key ``(*batch, Lk, d)`` before repetition, the layer that computed it.

    ``made_of``: what its operands are made of, where this was followed. ``values_reached``: its softmax has weighted
    values already; further uses of the weights are ignored. ``summands``: the two products that it is the sum of, and
    the factor of the second, where it is one. ``merged``: how its rows count positions and heads.
    """

    labeled: LabeledProduct
    product: PairwiseProduct
    repeated_key: Repeated | None
    layer: str
    frame: Frame | None
    dtype: torch.dtype
    made_of: MadeOf | None = None
    values_reached: bool = False
    summands: tuple[Trace, Trace, float] | None = None
    merged: MergedRows | None = None

    @property
    def is_by_matrix(self) -> bool:
        """Whether one of the operands has leading axes and the other is a single matrix."""
        fewer, more = sorted((self.labeled.left.dim(), self.labeled.right.dim()))
        return fewer == 2 < more


@dataclass(frozen=True, eq=False)
class Trace:
    """The operations on a product so far; a note on the tensor that holds the result.

    Attributes:
        origin: The product.
        query_axis: Axis of the query positions, counted from the right.
        key_axis: Axis of the key positions, counted from the right.
        scale: Product of the plain numbers by which it was multiplied.
        factors: Tensors by which it was multiplied, constant along the keys, ``(*batch, Lq or 1, 1)``.
        stage: ``"affine"`` before the first nonlinear step, ``"nonlinear"`` up to the softmax, ``"after"`` from it on.
        steps: The operations, each with its stage.
        calls: The calls of these operations.
        first_column: Index of the first key among the columns.
        merged: How the query axis counts positions and heads at once; None where it counts positions alone.
        softmax_axes: ``(query_axis, key_axis, first_column, merged)`` where the softmax ran.
        outside: What acts on the logits outside the product.
        visible: The keys that each mask shows to at least one query, ``(*batch, Lk)``.
        has_added: Whether a tensor was added.
        masked_by: The masks among its operands.
        exact: Whether a replay gives what the model computed: False after dropout.
        logged: Whether the weights are still logarithms.
        split: Set while the positions are viewed in other axes.
        fused_bias: Whether a bias was added within the product, before any rounding.
        mixes_heads: Whether the weights of several heads were added up.
        ambiguity: Why this cannot be measured, ``""`` if it can.
    """

    origin: Origin
    query_axis: int
    key_axis: int
    scale: float = 1.0
    factors: tuple[Tensor, ...] = ()
    stage: str = "affine"
    steps: tuple[tuple[str, Step], ...] = ()
    calls: tuple[TracedCall, ...] = ()
    first_column: int = 0
    merged: MergedRows | None = None
    softmax_axes: tuple[int, int, int, MergedRows | None] = (-2, -1, 0, None)
    outside: frozenset[str] = frozenset()
    visible: tuple[Tensor, ...] = ()
    has_added: bool = False
    masked_by: tuple[Tensor, ...] = ()
    exact: bool = True
    logged: bool = False
    split: Split | None = None
    fused_bias: bool = False
    mixes_heads: bool = False
    ambiguity: str = ""

    def then(self, apply: Apply, *, rearranges: bool = False, shifts: bool = False, **changes: Any) -> Trace:
        """Return the trace after one more step."""
        trace = replace(self, **changes)
        step = Step(self._of_positions(apply), rearranges, shifts)
        return replace(trace, steps=(*trace.steps, (trace.stage, step)))

    @property
    def axes(self) -> tuple[int, int, int, MergedRows | None]:
        """What `softmax_axes` is if the softmax runs now."""
        return self.query_axis, self.key_axis, self.first_column, self.merged

    def _of_positions(self, apply: Apply) -> Apply:
        num_positions = self.origin.product.query.shape[-2]
        return apply if self.merged is None else self.merged.on_all(apply, num_positions)

    def times(self, number: float) -> Trace:
        """Return the trace before a step that multiplies by a number, or turns the sign.

        After a nonlinear step the number is a part of the scale all the same: ``c · tanh(x / c)`` has the logits x, and
        ``c · clamp(x)`` those of ``clamp(c · x)``. So the logits are multiplied before that step, which undoes it.
        """
        if self.stage == "after":
            return self
        trace = self
        if self.stage == "nonlinear" and number not in (0, 1):
            trace = self._before_nonlinear(lambda x, rows: x * number, lambda x, rows: x / number)
        return replace(trace, scale=trace.scale * number)

    def times_each(self, factor: Tensor, logits: Tensor) -> Trace:
        """Return the trace before a step that multiplies by a tensor which is constant along the keys.

        Args:
            factor: The tensor, ``logits``'s shape or broadcast to it.
            logits: The result of the step.
        """
        trace, axis, num_rows = self, self.query_axis, logits.shape[self.query_axis]
        if self.stage == "nonlinear":
            if any(step.rearranges for step in self.steps_of("nonlinear")):
                return replace(self, ambiguity="a tensor scales its logits after they were rearranged")
            trace = self._before_nonlinear(
                lambda x, rows: x * rows_of(factor, rows, axis, num_rows),
                lambda x, rows: x / rows_of(factor, rows, axis, num_rows),
            )
        return replace(trace, factors=(*self.factors, _as_batch(factor, self, logits)))

    def _before_nonlinear(self, apply: Apply, undo: Apply) -> Trace:
        """Return the trace with a last affine step that the first nonlinear step undoes."""
        first = next(at for at, (stage, _) in enumerate(self.steps) if stage == "nonlinear")
        moved = (
            ("affine", Step(self._of_positions(apply))),
            ("nonlinear", Step(self._of_positions(undo))),
        )
        return replace(self, steps=(*self.steps[:first], *moved, *self.steps[first:]))

    def steps_of(self, stage: str) -> list[Step]:
        """Return the steps of one stage, in order."""
        return [step for at, step in self.steps if at == stage]

    def without_last_shift(self) -> Trace:
        """Return the trace without shifts of whole rows right before the softmax, which does not notice them."""
        before = [number for number, (stage, _) in enumerate(self.steps) if stage != "after"]
        steps = list(self.steps)
        for number in reversed(before):
            step = steps[number][1]
            if step.shifts:
                del steps[number]
            elif not step.rearranges:
                break
        return replace(self, steps=tuple(steps))


def _parted(x: Tensor, axes: tuple[int, int, int, MergedRows | None]) -> Tensor:
    """Return logits, or what is constant along their keys, as ``(*batch, L, Lk)``."""
    query_axis, key_axis, _, merged = axes
    if merged is not None:
        x = merged.parted(x, query_axis)
        key_axis -= key_axis < query_axis
        query_axis -= not merged.heads_first
    return x.movedim((query_axis, key_axis), (-2, -1))


def _as_batch(factor: Tensor, trace: Trace, logits: Tensor) -> Tensor:
    """Return a factor that is constant along the keys as ``(*batch of the product, Lq or 1, 1)``."""
    shape = [1 if axis - logits.dim() == trace.key_axis else size for axis, size in enumerate(logits.shape)]
    full = _parted(factor.expand(shape), trace.axes)
    return full.reshape(*trace.origin.product.batch, full.shape[-2], 1)


def as_attention(trace: Trace, lead: Lead) -> Attention:
    """Return the attention of a finished trace, with operands ``(B, H, L, d)``."""
    trace = trace.without_last_shift()
    origin, product = trace.origin, trace.origin.product
    num_rows, num_keys = product.query.shape[-2], product.key.shape[-2]
    query = product.query
    for factor in trace.factors:
        query = query * factor
    query = lead.split(query.expand(*product.batch, num_rows, query.shape[-1]))
    code_axes = (product.query_axis, product.key_axis)
    _, softmax_key_axis, first, _ = trace.softmax_axes

    def arrange(x: Tensor) -> Tensor:
        return lead.join(x).movedim((-2, -1), code_axes)

    def restore(x: Tensor) -> Tensor:
        return lead.split(_parted(x, trace.softmax_axes))[..., first : first + num_keys]

    repeated = origin.repeated_key
    before = lead.resized(repeated.source.shape[:-2], heads=True) if repeated is not None else None
    if repeated is None or before is None:
        key, tiled = lead.keys(product.key), False
    else:
        key, tiled = before.split(repeated.source), repeated.tiled
    return Attention(
        query=query,
        key=key,
        scale=trace.scale,
        tiled=tiled,
        lead=lead,
        rows_at=product.rows_at,
        merged=origin.merged,
        product_axes=code_axes,
        arrange=arrange,
        restore=restore,
        affine=trace.steps_of("affine"),
        nonlinear=trace.steps_of("nonlinear"),
        after=trace.steps_of("after"),
        key_axis=softmax_key_axis,
        outside=set(trace.outside),
        visible=[lead.of_sequences(seen.reshape(*lead.sizes, num_keys)) for seen in trace.visible],
        operands_in=origin.dtype,
        logits_in=None if trace.fused_bias else origin.dtype,
        has_added=trace.has_added,
        masked_by=trace.masked_by,
    )


def values_by_head(
    values: Tensor, axes: str, weights_axes: tuple[list[str], str, str], out_axes: str, lead: Lead
) -> ByHead:
    """Return what attention weights are multiplied with, by head, and how to read the product by head.

    Args:
        values: The values before they were repeated, with axes in the order of the repeated ones.
        axes: Labels of their axes.
        weights_axes: Labels of the weights: their leading axes, the query axis and the key axis.
        out_axes: Labels of the product.
        lead: Which leading axes count heads.

    Returns:
        ``(B, Hv, Lk, dv)`` and a function from rows of the product to ``(B, Hq, R, dv)``; None for another form.
    """
    batch, query, key = weights_axes
    if query in axes and values.shape[axes.index(query)] == 1:  # one set of values for all positions
        values, axes = values.squeeze(axes.index(query)), axes.replace(query, "")
    sizes = [axis for axis in axes if axis not in (*batch, query, key)]
    if not sizes or values.dim() != len(axes):
        return None, None

    def joined(x: Tensor, labels: str, positions: str) -> Tensor:  # an axis of the weights that it lacks: size 1
        return ordered(x, labels, [*batch, positions, *sizes]).flatten(-len(sizes))

    by_head = lead.values(joined(values, axes, key))
    if by_head is None:
        return None, None
    return by_head, lambda x: lead.split(joined(x, out_axes, query))
