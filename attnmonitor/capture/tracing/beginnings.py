"""The beginning of a trace: whether a product is one of queries and keys, and what its operands are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnmonitor.capture.ancestries import Ancestries
from attnmonitor.capture.heads import Lead
from attnmonitor.capture.layouts import Layout
from attnmonitor.capture.merged_rows import MergedRows
from attnmonitor.capture.modules import Frame
from attnmonitor.capture.tracing.operands import made_of, merged_rows, parted_axes, shared_rows
from attnmonitor.capture.tracing.products import (
    LabeledProduct,
    PairwiseProduct,
    pairwise_product,
    parted_product,
    with_rows_at,
)
from attnmonitor.capture.tracing.repeats import Repeated
from attnmonitor.capture.tracing.trace import Origin, Trace

__all__ = ["Beginnings"]


class Beginnings:
    """Begins the traces of one forward.

    Args:
        repeated: Returns a key as it was before it was repeated per query head; None if it was not.
        ancestries: What tensors are made of; None where it is not followed.
        known: Returns what is known of a layer's next attention; None before the first forward has shown it.
    """

    def __init__(
        self,
        repeated: Callable[[Tensor], Repeated | None],
        ancestries: Ancestries | None,
        known: Callable[[str], Layout | None],
    ) -> None:
        self._repeated = repeated
        self._ancestries = ancestries
        self._known = known

    def trace_of(
        self, product: LabeledProduct, layer: str, frame: Frame | None, dtype: torch.dtype, *, keys_first: bool = False
    ) -> Trace | None:
        """Return the trace that a product begins; None where it is none of queries and keys.

        Args:
            product: The product.
            layer: The layer that computes it.
            frame: The running call of the layer; None where none has its own.
            dtype: The type of its result.
            keys_first: Whether the rows of the result are keys.
        """
        pair = pairwise_product(product, keys_first=keys_first)
        if pair is None:
            return None
        merged = self._merged_rows(product, pair, layer)
        parted = merged and parted_product(pair, merged)
        if merged and parted:
            return self._with_parted_rows(product, pair, merged, Origin(product, parted, None, layer, frame, dtype))
        pair = self._with_positions_as_rows(product, pair, layer)
        if not (pair.batch or self._is_of_positions(product, layer, frame)):
            return None
        repeated = self._key_before_repetition(product, pair, keys_first)
        origin = Origin(product, pair, repeated, layer, frame, dtype, made_of(self._ancestries, product, pair))
        num_axes = len(pair.batch) + 2
        return Trace(origin, pair.query_axis - num_axes, pair.key_axis - num_axes)

    def _merged_rows(self, product: LabeledProduct, pair: PairwiseProduct, layer: str) -> MergedRows | None:
        """Return how the rows of a product count positions and heads; None where they count positions alone."""
        if self._ancestries is None:
            known = self._known(layer)
            return None if known is None else known.merged
        made = made_of(self._ancestries, product, pair)
        return None if made is None else merged_rows(made)

    def _with_parted_rows(
        self, product: LabeledProduct, pair: PairwiseProduct, merged: MergedRows, origin: Origin
    ) -> Trace:
        """Return the trace of a product whose heads have an axis of their own; its first step merges them again."""
        made, parted = made_of(self._ancestries, product, pair), origin.product
        origin = replace(origin, made_of=made and parted_axes(made), merged=merged)
        num_axes, first = len(parted.batch) + 2, len(pair.batch)
        trace = Trace(origin, parted.query_axis - num_axes, parted.key_axis - num_axes)
        return trace.then(
            lambda x, rows: x.flatten(first, first + 1), rearranges=True, merged=merged, query_axis=-2, key_axis=-1
        )

    def _with_positions_as_rows(self, product: LabeledProduct, pair: PairwiseProduct, layer: str) -> PairwiseProduct:
        """Return the product with positions as its rows where heads, which share one key, stood in their place."""
        if self._ancestries is None:
            known = self._known(layer)
            axis = None if known is None else known.rows_at
            if axis is not None and pair.key.shape[:-2][axis : axis + 1] != (1,):
                axis = None
        else:
            made = made_of(self._ancestries, product, pair)
            axis = None if made is None else shared_rows(made, pair)
        return pair if axis is None else with_rows_at(pair, axis)

    def _is_of_positions(self, product: LabeledProduct, layer: str, frame: Frame | None) -> bool:
        """Return whether a product of two matrices may be one of queries and keys, of one sequence at a time.

        Not where an operand is computed from weights alone, nor where the rows count the sequences of a batch.
        """
        if self._ancestries is None:
            known = self._known(layer)
            return known is not None and known.lead == Lead(())
        hidden = frame.inputs[0] if frame is not None and frame.inputs else None
        if hidden is not None and hidden.dim() > 2 and len(product.left) == len(hidden):
            return False
        return all(self._ancestries.of(x).inputs for x in (product.left, product.right))

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
