"""What the operands of a hand-written product of queries and keys are made of."""

from __future__ import annotations

from attnmonitor.capture.ancestries import Ancestries
from attnmonitor.capture.axes import Axis
from attnmonitor.capture.heads import MadeOf, common_lead_axes
from attnmonitor.capture.tracing.products import LabeledProduct, PairwiseProduct

__all__ = ["made_of", "shared_rows"]


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


def _counts_heads(axis: Axis) -> bool:
    return any(is_head for is_head, _ in axis)
