"""What the tensors of a layer must look like, and what to say when they do not."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_heads", "check_query_and_key", "query_padding"]


def check_heads(argument: str, heads: Tensor, mask: Tensor | None) -> None:
    """Raise unless ``heads`` is floating ``(B, H, L, d)`` and ``mask``, if any, is bool ``(B, L)``."""
    if heads.ndim != 4 or not heads.is_floating_point():
        raise ValueError(
            f"{argument}: got {heads.dtype} of shape {tuple(heads.shape)}, expected floating (sequences, heads, "
            "positions, head size); split the heads with view(B, L, H, d).transpose(1, 2)"
        )
    expected = (heads.shape[0], heads.shape[2])
    if mask is not None and (mask.dtype != torch.bool or mask.shape != expected):
        raise ValueError(
            f"mask: got {mask.dtype} of shape {tuple(mask.shape)}, expected bool {expected} for {argument} "
            f"{tuple(heads.shape)}; True where the position is not padding"
        )


def check_query_and_key(query: Tensor, key: Tensor) -> None:
    """Raise unless queries and keys have one batch and head size and the key heads divide the query heads."""
    fits = query.ndim == key.ndim and query.shape[0] == key.shape[0] and query.shape[-1] == key.shape[-1]
    if not fits or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}: expected one number of sequences, one head size "
            "and query heads that are a multiple of the key heads"
        )


def query_padding(query: Tensor, mask: Tensor | None, query_mask: Tensor | None) -> Tensor | None:
    """The queries' mask: ``query_mask`` where given, else the keys' ``mask``, which then must fit the queries."""
    if query_mask is None and mask is not None and mask.shape[-1] != query.shape[2]:
        raise ValueError(
            f"mask {tuple(mask.shape)} masks the keys and does not fit query {tuple(query.shape)}: pass query_mask "
            "as well, bool (sequences, queries)"
        )
    return mask if query_mask is None else query_mask
