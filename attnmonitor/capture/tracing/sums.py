"""Sums of products, and of weights, of one layer.

The sum of two query-key products is one product: ``q₁ k₁ᵀ + q₂ k₂ᵀ = [q₁ q₂] [k₁ k₂]ᵀ``.

Code multiplies parts of the features apart where only some are rotated or others stay compressed (multi-head latent
attention), and adds up the rows of an alignment that share their weights.

Differential attention subtracts the weights of one half of the heads from those of the other. Each head has its own
queries, keys and softmax all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from attnmonitor.capture.tracing.operations import ADDITIONS, PERMUTATIONS, SCALINGS
from attnmonitor.capture.tracing.products import PairwiseProduct
from attnmonitor.capture.tracing.repeats import Repeated
from attnmonitor.capture.tracing.trace import Trace
from attnmonitor.capture.tracing.traced_call import TracedCall
from attnmonitor.capture.tracing.views import CASTS, RESHAPES
from attnmonitor.capture.verify import Step

__all__ = ["sum_of_products", "sum_of_weights"]

_SCALED = {*SCALINGS, *CASTS, *RESHAPES, "neg"}
_REARRANGING = {*PERMUTATIONS, "__getitem__"}


def sum_of_products(first: Trace, second: Trace, factor: float) -> Trace | None:
    """Return the trace of ``first + factor · second``; None where they are not two products of one layer."""
    if factor == 1 and _is_reshaped(second) and not _is_scaled(second):
        first, second = second, first
    ours, theirs = first.origin.product, _in_axes_of(first, second)
    if (
        theirs is None
        or first.origin.frame is not second.origin.frame
        or not (_is_affine(first) and _is_affine(second))
        or first.scale == 0
    ):
        return None
    ratio = factor * second.scale / first.scale
    made_of = [trace.origin.made_of for trace in (first, second)]
    origin = replace(
        first.origin,
        product=replace(ours, query=_beside(ours.query, theirs.query * ratio), key=_beside(ours.key, theirs.key)),
        repeated_key=_repeated(first, second),
        dtype=torch.promote_types(first.origin.dtype, second.origin.dtype),
        made_of=max((each for each in made_of if each), key=lambda each: sum(map(bool, each.axes)), default=None),
        values_reached=False,
        summands=(first, second, factor),
    )
    total = replace(first, origin=origin, calls=(), has_added=first.has_added or not _is_scaled(first))
    return total if _is_scaled(second) else _with_bias_of(total, second, factor)


def _with_bias_of(total: Trace, second: Trace, factor: float) -> Trace:
    """Return the trace of a sum with the bias and the masks that its second product had before."""

    def apply(x: Tensor, rows: Tensor) -> Tensor:
        return x + factor * _replayed(second.steps, torch.zeros_like(x), rows)

    masks = (second.visible, second.masked_by) if factor > 0 else ((), ())
    return replace(
        total,
        visible=(*total.visible, *masks[0]),
        masked_by=(*total.masked_by, *masks[1]),
        has_added=True,
    ).then(apply)


def sum_of_weights(first: Trace, second: Trace, factor: float) -> Trace | None:
    """Return the trace of ``first + factor · second``; None where they are not parts of the same weights."""
    if first.origin is not second.origin or (first.stage, second.stage) != ("after", "after") or first.logged:
        return None
    pairs = zip(first.steps, second.steps, strict=False)
    num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], pairs))
    own, others = (trace.steps[num_shared:] for trace in (first, second))
    if not num_shared or first.steps[num_shared - 1][0] != "after":
        return None

    def apply(x: Tensor, rows: Tensor) -> Tensor:
        return _replayed(own, x, rows) + factor * _replayed(others, x, rows)

    exact = first.exact and second.exact
    mixes = bool(first.ambiguity or second.ambiguity)
    shared = replace(first, steps=first.steps[:num_shared], exact=exact, mixes_heads=mixes, ambiguity="")
    return replace(shared, steps=(*shared.steps, (shared.stage, Step(apply))))  # each step knows its own rows


def _replayed(steps: Sequence[tuple[str, Step]], x: Tensor, rows: Tensor) -> Tensor:
    for _, step in steps:
        x = step.apply(x, rows)
    return x


def _in_axes_of(first: Trace, second: Trace) -> PairwiseProduct | None:
    """Return the second's product with the leading axes that the first's has; None where that is not known.

    Code adds the product of one layout to that of another after a reshape: ``(B, H, L, L)`` as ``(B·H, L, L)``.
    """
    ours, theirs = first.origin.product, second.origin.product
    if not (_is_reshaped(first) or _is_reshaped(second)):
        is_same = (first.query_axis, first.key_axis, ours.batch) == (second.query_axis, second.key_axis, theirs.batch)
        return theirs if is_same else None
    in_order = all(
        (each.query_axis, each.key_axis, each.origin.product.query_axis) == (-2, -1, len(each.origin.product.batch))
        for each in (first, second)
    )
    if not in_order or not _is_scaled(second) or math.prod(ours.batch) != math.prod(theirs.batch):
        return None
    query, key = (
        x.expand(*theirs.batch, *x.shape[-2:]).reshape(*ours.batch, *x.shape[-2:]) for x in (theirs.query, theirs.key)
    )
    return replace(theirs, query=query, key=key, batch=ours.batch)


def _is_reshaped(trace: Trace) -> bool:
    return any(step.rearranges for _, step in trace.steps)


def _is_affine(trace: Trace) -> bool:
    """Return whether a product was scaled by numbers, biased and masked alone, and its leading axes reshaped."""
    moved = trace.factors or trace.split or trace.ambiguity or any(call.name in _REARRANGING for call in trace.calls)
    return trace.stage == "affine" and not moved


def _is_scaled(trace: Trace) -> bool:
    is_plain = not trace.has_added and not trace.visible
    return is_plain and all(call.name in _SCALED or _adds_nothing(call) for call in trace.calls)


def _adds_nothing(call: TracedCall) -> bool:
    """Return whether it is the sum with zero that a running total begins with."""
    other = call.operands[1 - call.slot]
    return call.name in ADDITIONS and isinstance(other, int | float) and other == 0


def _repeated(first: Trace, second: Trace) -> Repeated | None:
    """Return the keys of both before they were repeated; a key of all heads needs no repetition."""
    one, other = first.origin.repeated_key, second.origin.repeated_key
    sources = [
        each.source if each is not None else trace.origin.product.key for each, trace in ((one, first), (other, second))
    ]
    known = one or other
    if known is None or (one and other and one.tiled != other.tiled):
        return None
    lead = known.source.shape[:-2]
    if not all(_broadcasts(source.shape[:-2], lead) for source in sources):
        return None
    return replace(known, source=_beside(*sources))


def _broadcasts(sizes: Sequence[int], lead: Sequence[int]) -> bool:
    return len(sizes) == len(lead) and all(size in (1, own) for size, own in zip(sizes, lead, strict=True))


def _beside(one: Tensor, other: Tensor) -> Tensor:
    """Return ``(*batch, L, d1 + d2)`` from operands of which each may be broadcast along axes of ``batch``."""
    rows = torch.broadcast_shapes(one.shape[:-1], other.shape[:-1])
    return torch.cat([x.expand(*rows, x.shape[-1]) for x in (one, other)], -1)
