"""Random queries and keys in the shapes that tests try, with the directions and the mean of trained ones."""

from __future__ import annotations

import torch
from torch import Tensor

# Sequences, query heads, key heads, positions, head size.
Shape = tuple[int, int, int, int, int]

SHAPES: dict[str, Shape] = {
    "one head": (1, 1, 1, 20, 8),
    "several heads and sequences": (2, 4, 4, 48, 16),
    "grouped queries": (2, 6, 2, 48, 16),
    "shorter than the head size": (2, 2, 1, 7, 16),
    "as long as the head size": (1, 2, 2, 16, 16),
    "several blocks of positions": (8, 8, 4, 300, 32),
}

PADDINGS = ("all valid", "right padded", "left padded")


def draw(
    shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, key_offset: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Queries ``(B, Hq, L, d)`` and keys ``(B, Hkv, L, d)`` with decaying directions and a mean that dominates."""
    batch, num_query_heads, num_kv_heads, length, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -1.5, head_dim)
    query = torch.randn(batch, num_query_heads, length, head_dim, generator=generator) * decay
    key = torch.randn(batch, num_kv_heads, length, head_dim, generator=generator) * decay + key_offset
    return query.to(dtype), key.to(dtype)


def padding_mask(padding: str, batch: int, length: int) -> Tensor | None:
    """``(B, L)`` bool, True where valid: a quarter of the first sequence is padding; None where all are valid."""
    if padding == "all valid":
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, -max(2, length // 4) :] = False
    return mask if padding == "right padded" else mask.flip(1)
