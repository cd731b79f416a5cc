"""What the tensors of a layer must look like, and what to say when they do not."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_heads", "check_query_and_key", "num_positions", "query_padding"]


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


def check_query_and_key(query: torch.Size, key: torch.Size) -> None:
    """Raise unless queries and keys have one batch and head size and the key heads divide the query heads."""
    fits = len(query) == len(key) and query[0] == key[0] and query[-1] == key[-1]
    if not fits or query[1] % key[1]:
        raise ValueError(
            f"query {tuple(query)} and key {tuple(key)}: expected one number of sequences, one head size and query "
            "heads that are a multiple of the key heads"
        )


def num_positions(heads: Tensor, mask: Tensor | None) -> Tensor:
    """How many positions of each sequence are not padding, ``(B, 1)`` float64."""
    if mask is None:
        return torch.full((heads.shape[0], 1), float(heads.shape[2]), dtype=torch.float64, device=heads.device)
    return mask.sum(-1, keepdim=True, dtype=torch.float64)


def query_padding(query: Tensor, mask: Tensor | None, query_mask: Tensor | None) -> Tensor | None:
    """The queries' mask: ``query_mask`` where given, else the keys' ``mask``.

    Raises:
        ValueError: The keys' mask is taken, and does not fit the queries.
    """
    if query_mask is None and mask is not None and mask.shape[-1] != query.shape[2]:
        raise ValueError(
            f"mask {tuple(mask.shape)} masks the keys and does not fit query {tuple(query.shape)}: pass query_mask "
            "as well, bool (sequences, queries)"
        )
    return mask if query_mask is None else query_mask
