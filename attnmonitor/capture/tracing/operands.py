"""What the operands of a hand-written product of queries and keys are made of."""

from __future__ import annotations

from attnmonitor.capture.ancestries import Ancestries
from attnmonitor.capture.axes import Axis
from attnmonitor.capture.heads import MadeOf, common_lead_axes
from attnmonitor.capture.tracing.products import LabeledProduct, PairwiseProduct

__all__ = ["made_of"]


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
