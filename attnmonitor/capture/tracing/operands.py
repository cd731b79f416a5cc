"""What the operands of a hand-written product of queries and keys are made of."""

from __future__ import annotations

import math
from dataclasses import replace

from attnmonitor.capture.ancestries import Ancestries
from attnmonitor.capture.axes import Axis
from attnmonitor.capture.heads import MadeOf, common_lead_axes
from attnmonitor.capture.merged_rows import MergedRows
from attnmonitor.capture.tracing.products import LabeledProduct, PairwiseProduct

__all__ = ["made_of", "merged_rows", "parted_axes", "shared_rows"]


def made_of(ancestries: Ancestries | None, product: LabeledProduct, pair: PairwiseProduct) -> MadeOf | None:
    """Return what queries and keys of a product are made of; None where that is not followed."""
    if ancestries is None:
        return None
    left, right = ancestries.of(product.left), ancestries.of(product.right)
    sides = [(left, product.left_axes, product.left), (right, product.right_axes, product.right)]
    if not pair.left_is_query:
        sides.reverse()
    axes: dict[str, Axis | None] = {}
    of_keys: dict[str, Axis | None] = {}
    for note, labels, operand in reversed(sides):
        for position, (label, size) in enumerate(zip(labels, operand.shape, strict=True)):
            axis = () if size == 1 else None if note.axes is None else note.axes[position]
            if axes.get(label) is None or axis:
                axes[label] = axis
        of_keys = of_keys or dict(axes)
    own, others = (tuple(each.get(label) for label in pair.labels) for each in (axes, of_keys))
    return MadeOf(sides[0][0], sides[1][0], common_lead_axes(own, others))


def shared_rows(made_of: MadeOf, pair: PairwiseProduct) -> int | None:
    """Return the leading axis that counts query positions where heads stand in their place; None for the usual order.

    The key is shared along it. Where it is not known what an axis counts, a query has as many positions as a key.
    """
    *lead, rows, _ = made_of.axes
    if rows is not None and not _counts_heads(rows):
        return None
    shared = [
        axis
        for axis, size in enumerate(pair.batch)
        if pair.key.shape[axis] == 1 < size and not _counts_heads(lead[axis] or ())
    ]
    if rows is None:
        num_keys = pair.key.shape[-2]
        shared = [axis for axis in shared if pair.batch[axis] == num_keys != pair.query.shape[-2]]
    return shared[-1] if shared else None


def merged_rows(made_of: MadeOf) -> MergedRows | None:
    """Return how the rows of queries count positions and heads where those of the keys count positions alone."""
    rows, of_keys = made_of.axes[-2], (made_of.key.axes or (None,) * 2)[-2:]
    if not rows or any(axis is None or len(_kinds(axis)) > 1 for axis in of_keys):
        return None
    kinds = [is_head for is_head, _ in rows]
    if len(set(kinds)) < 2 or sorted(kinds, reverse=kinds[0]) != kinds:
        return None
    return MergedRows(math.prod(size for is_head, size in rows if is_head), heads_first=kinds[0])


def parted_axes(made_of: MadeOf) -> MadeOf:
    """Return what operands are made of, with heads as the last leading axis and positions as rows."""
    *lead, rows, size = made_of.axes
    heads, positions = (tuple(each for each in rows or () if each[0] == is_head) for is_head in (True, False))
    return replace(made_of, axes=(*lead, heads, positions, size))


def _counts_heads(axis: Axis) -> bool:
    return any(is_head for is_head, _ in axis)


def _kinds(axis: Axis) -> set[bool]:
    return {is_head for is_head, _ in axis}
