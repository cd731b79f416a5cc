"""Products of two activations, read the same way however written: ``a @ b``, ``torch.bmm``, ``torch.einsum``.

Each of these is a product of operands with labeled axes, some of which are summed over. A product of queries and keys
contracts a single axis (the head size) and keeps one position axis of each operand; the axes that both share, or that
one of them broadcasts, are sequences and heads.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from attnmonitor.capture.function_call import FunctionCall
from attnmonitor.capture.merged_rows import MergedRows

__all__ = [
    "PRODUCTS",
    "LabeledProduct",
    "PairwiseProduct",
    "is_weight",
    "labeled",
    "ordered",
    "pairwise_product",
    "parted_product",
    "with_rows_at",
]

PRODUCTS = {"matmul", "bmm", "mm", "baddbmm", "einsum", "inner", "tensordot"}
"""The functions that `labeled` reads."""


@dataclass(frozen=True)
class LabeledProduct:
    """A product of two tensors and the label of every axis: ``einsum(f"{left_axes},{right_axes}->{out_axes}")``."""

    left: Tensor
    right: Tensor
    left_axes: str
    right_axes: str
    out_axes: str

    def exchanged(self) -> LabeledProduct:
        """Return the same product with its operands named in the other order."""
        return LabeledProduct(self.right, self.left, self.right_axes, self.left_axes, self.out_axes)

    @property
    def contracted(self) -> set[str]:
        """Labels that are summed over."""
        return (set(self.left_axes) & set(self.right_axes)) - set(self.out_axes)


@dataclass(frozen=True, eq=False)
class PairwiseProduct:
    """Every row position of one operand times every row position of the other.

    Attributes:
        query: ``(*batch, Lq, d)``; an axis of ``batch`` has size 1 where this operand is broadcast.
        key: ``(*batch, Lk, d)``, likewise.
        batch: Sizes of the leading axes of the product: sequences, heads, or both in one.
        query_axis: Axis of the query positions in the product.
        key_axis: Axis of the key positions in the product.
        labels: Labels of the leading axes, of the query positions, and of the axis that is summed over.
        left_is_query: Whether the product's left operand holds the queries.
        rows_at: Leading axis that the query positions were taken from, where heads stood in their place; else None.
    """

    query: Tensor
    key: Tensor
    batch: tuple[int, ...]
    query_axis: int
    key_axis: int
    labels: str
    left_is_query: bool
    rows_at: int | None = None


def is_weight(x: Any) -> bool:
    """Return whether ``x`` is a parameter or a view of one: a product with it is a projection, not attention."""
    return isinstance(x, nn.Parameter) or (isinstance(x, Tensor) and isinstance(x._base, nn.Parameter))


def labeled(call: FunctionCall) -> LabeledProduct | None:
    """Return a product of two tensors with labeled axes, by the name of its function; None for another form."""
    args = call.args
    if call.name == "inner":
        return _read_dims(args[0], args[1], ([-1], [-1]))
    if call.name == "tensordot":
        return _read_dims(args[0], args[1], call.argument(2, "dims", 2))
    if call.name == "einsum":
        operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
        return _read_equation(args[0], operands) if isinstance(args[0], str) and len(operands) == 2 else None
    tensors = [x for x in call.arguments() if isinstance(x, Tensor)]
    if len(tensors) < 2 or min(x.dim() for x in tensors[-2:]) < 2:
        return None
    left, right = tensors[-2:]
    num_batch = max(left.dim(), right.dim()) - 2
    batch = string.ascii_uppercase[:num_batch]
    return LabeledProduct(
        left,
        right,
        batch[num_batch - left.dim() + 2 :] + "ic",
        batch[num_batch - right.dim() + 2 :] + "cj",
        batch + "ij",
    )


def _read_dims(left: Tensor, right: Tensor, dims: Any) -> LabeledProduct | None:
    if isinstance(dims, int):
        dims = range(left.dim() - dims, left.dim()), range(dims)
    if not isinstance(dims, list | tuple):
        return None
    labels = iter(string.ascii_letters)
    left_axes = [next(labels) for _ in range(left.dim())]
    right_axes = [next(labels) for _ in range(right.dim())]
    for ours, theirs in zip(*dims, strict=True):
        right_axes[theirs] = left_axes[ours]
    out = [axis for axis in (*left_axes, *right_axes) if (axis in left_axes) != (axis in right_axes)]
    return LabeledProduct(left, right, *("".join(axes) for axes in (left_axes, right_axes, out)))


def _read_equation(equation: str, operands: Sequence[Any]) -> LabeledProduct | None:
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or not all(isinstance(x, Tensor) for x in operands):
        return None
    if not arrow:
        letters = sorted(set(inputs) - set(".,"))
        out = "".join(["..." * ("..." in inputs), *(letter for letter in letters if inputs.count(letter) == 1)])
    free = [letter for letter in string.ascii_uppercase if letter not in equation]
    hidden = [
        x.dim() - len(term.replace("...", "")) if "..." in term else 0 for x, term in zip(operands, terms, strict=True)
    ]
    ellipsis = "".join(free[: max(hidden)])
    left, right = (
        term.replace("...", ellipsis[len(ellipsis) - count :]) for term, count in zip(terms, hidden, strict=True)
    )
    out = out.replace("...", ellipsis)
    if any(len(set(axes)) != len(axes) for axes in (left, right, out)):
        return None
    return LabeledProduct(operands[0], operands[1], left, right, out)


def pairwise_product(product: LabeledProduct, *, keys_first: bool = False) -> PairwiseProduct | None:
    """Return the product as queries times keys; None where it has another form or one operand is a weight.

    In the result's axes rows come before columns, and rows are taken for queries unless ``keys_first``. Which is right
    is known only at the softmax, which runs over the keys.
    """
    if is_weight(product.left) or is_weight(product.right) or not product.left.is_floating_point():
        return None
    out = product.out_axes
    left_only = [axis for axis in out if axis in product.left_axes and axis not in product.right_axes]
    right_only = [axis for axis in out if axis in product.right_axes and axis not in product.left_axes]
    summed = [axis for axis in product.left_axes if axis in product.contracted]
    if not summed or not left_only or not right_only:
        return None
    rows, columns = left_only[-1], right_only[-1]
    operands = [(product.left, product.left_axes), (product.right, product.right_axes)]
    left_is_query = (out.index(rows) > out.index(columns)) == keys_first
    if not left_is_query:
        rows, columns = columns, rows
        operands.reverse()
    batch_axes = [axis for axis in out if axis not in (rows, columns)]
    query = ordered(*operands[0], [*batch_axes, rows, *summed]).flatten(-len(summed))
    key = ordered(*operands[1], [*batch_axes, columns, *summed]).flatten(-len(summed))
    batch = tuple(max(a, b) for a, b in zip(query.shape[:-2], key.shape[:-2], strict=True))
    labels = "".join((*batch_axes, rows, summed[-1]))
    return PairwiseProduct(query, key, batch, out.index(rows), out.index(columns), labels, left_is_query)


def with_rows_at(pair: PairwiseProduct, axis: int) -> PairwiseProduct:
    """Return the product with a leading axis, along which the key is shared, as its query positions.

    One key for all heads leaves two axes to the queries alone, and in ``(B, L, H, d)`` heads are the last of them.
    """
    axes = range(len(pair.batch) + 2)
    before = [place for place in axes if place not in (pair.query_axis, pair.key_axis)]
    query_axis = before[axis]
    leading = [place for place in axes if place not in (query_axis, pair.key_axis)]
    order = [[*before, pair.query_axis].index(place) for place in (*leading, query_axis)]
    return replace(
        pair,
        query=pair.query.permute(*order, -1),
        key=pair.key.movedim(axis, leading.index(pair.query_axis)),
        batch=tuple((*pair.batch, pair.query.shape[-2])[place] for place in order[:-1]),
        query_axis=query_axis,
        labels="".join(pair.labels[place] for place in (*order, -1)),
        rows_at=axis,
    )


def parted_product(pair: PairwiseProduct, merged: MergedRows) -> PairwiseProduct | None:
    """Return the product with heads as its last leading axis; None for another order of axes than ``(*batch, L, Lk)``.

    Its axes are those that it has once the merged rows are viewed apart.
    """
    at = len(pair.batch)
    if (pair.query_axis, pair.key_axis) != (at, at + 1) or pair.query.shape[-2] % merged.num_heads:
        return None
    query = merged.parted(pair.query, -2)
    return replace(
        pair,
        query=query if merged.heads_first else query.transpose(-2, -3),
        key=pair.key.unsqueeze(-3),
        batch=(*pair.batch, merged.num_heads),
        query_axis=at + merged.heads_first,
        key_axis=at + 2,
    )


def ordered(x: Tensor, axes: str, wanted: Sequence[str]) -> Tensor:
    """Return ``x`` with its axes in the order ``wanted``, a missing one as an axis of size 1."""
    present = [axes.index(axis) for axis in wanted if axis in axes]
    x = x.permute(present)
    for position, axis in enumerate(wanted):
        if axis not in axes:
            x = x.unsqueeze(position)
    return x
