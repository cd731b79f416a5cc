"""The queries' half of an energy field: their Gram matrix, which is all that its spectrum needs of them.

The queries themselves can be freed as soon as `query_gram` returns.

Letters: B sequences, Hq query heads, L positions, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, num_positions
from attnmonitor.functional.precision import Rounding, fits_float32, full_precision, gram_of, position_blocks

__all__ = ["QueryGram", "query_gram", "query_rms"]


@dataclass(frozen=True, eq=False)
class QueryGram:
    r"""The Gram matrix of each head's queries.

    Attributes:
        shape: ``(B, Hq, L, d)`` of the queries.
        gram: :math:`q^\top q`, ``(B, Hq, d, d)`` float64.
        num_queries: Queries that are not padding, ``(B, 1)`` float64.
        rounding: How the Gram matrix was rounded.
        query: q where products are in float32, so that it can be read again; else None.
        query_mask: ``(B, L)`` bool, True where the position is not padding; None where all are, or where q is not kept.
    """

    shape: torch.Size
    gram: Tensor
    num_queries: Tensor
    rounding: Rounding
    query: Tensor | None = None
    query_mask: Tensor | None = None

    @cached_property
    def energy(self) -> Tensor:
        r""":math:`\|q\|_F^2`, ``(B, Hq)`` float64; NaN for a head that is not finite."""
        energy = self.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        return energy + 0 * energy  # NaN where it is infinite

    def of(self, sequences: slice) -> QueryGram:
        """The Gram matrices of some of the sequences."""
        gram = self.gram[sequences]
        return replace(
            self,
            shape=torch.Size((len(gram), *self.shape[1:])),
            gram=gram,
            num_queries=self.num_queries[sequences],
            query=None if self.query is None else self.query[sequences],
            query_mask=None if self.query_mask is None else self.query_mask[sequences],
        )

    def of_heads(self, sequence: Tensor, head: Tensor) -> QueryGram:
        """The Gram matrices of single heads, ``(N,)`` and ``(N,)``, as those of one head in N sequences."""
        assert self.query is not None
        query = self.query[sequence, head][:, None]
        return replace(
            self,
            shape=query.shape,
            gram=self.gram[sequence, head][:, None],
            num_queries=self.num_queries[sequence],
            query=query,
            query_mask=None if self.query_mask is None else self.query_mask[sequence],
        )

    @staticmethod
    def joined(layers: Sequence[QueryGram]) -> QueryGram:
        """The Gram matrices of layers of one shape, as those of more sequences; the queries are not kept."""
        gram = torch.cat([layer.gram for layer in layers])
        return QueryGram(
            torch.Size((len(gram), *layers[0].shape[1:])),
            gram,
            torch.cat([layer.num_queries for layer in layers]),
            layers[0].rounding,
        )


def query_gram(query: Tensor, query_mask: Tensor | None = None, *, dtype: torch.dtype = torch.float64) -> QueryGram:
    """Form the Gram matrix of the queries, a block of positions at a time.

    Args:
        query: ``(B, Hq, L, d)``.
        query_mask: ``(B, L)`` bool, True where the position is not padding; None where all are.
        dtype: Type of the products. In float32 heads that it cannot hold are read again in float64, for which a GPU
            would have to wait.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_heads("query", query, query_mask)
    with full_precision(query.device):
        gram = gram_of(query, (block for _, block in position_blocks(query, query_mask, dtype, read_only=True)))
    found = QueryGram(query.shape, gram, num_positions(query, query_mask), Rounding.of(query, dtype))
    if dtype == torch.float64:
        return found
    again = (~fits_float32(found.energy)).nonzero()
    if len(again):
        sequence, head = again.unbind(-1)
        exact = query_gram(query[sequence, head][:, None], None if query_mask is None else query_mask[sequence])
        gram[sequence, head] = exact.gram[:, 0]
    return replace(found, query=query, query_mask=query_mask)  # of which the energy is not known yet


def query_rms_of(queries: QueryGram) -> Tensor:
    """Root mean square entry of the queries, ``(B, Hq)``."""
    return (queries.energy / (queries.num_queries * queries.shape[-1])).sqrt()


def query_rms(query: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Root mean square entry of the queries, in their own unit.

    Args:
        query: ``(B, Hq, L, d)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hq)`` float64; NaN for a head that is not finite.

    Raises:
        ValueError: The shapes do not fit.
    """
    return query_rms_of(query_gram(query, mask))
