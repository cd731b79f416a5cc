"""Rows of logits that count positions and heads at once.

Code that shares one key among heads may write a single product for all of them: queries ``(B, L·H, d)`` or
``(B, H·L, d)`` with the key ``(B, Lk, d)``. Other code views logits ``(B, H, L, Lk)`` as ``(B·H·L, Lk)`` for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MergedRows"]


@dataclass(frozen=True)
class MergedRows:
    """How an axis of rows counts query positions and heads.

    Attributes:
        num_heads: Rows of one position: its heads, or heads of sequences.
        heads_first: Whether all positions of a head stand side by side, else all heads of a position.
    """

    num_heads: int
    heads_first: bool

    def of(self, rows: Tensor, num_positions: int) -> Tensor:
        """Return the indices ``(H·R,)`` of all rows that belong to positions ``(R,)``."""
        heads = torch.arange(self.num_heads, device=rows.device)
        if self.heads_first:
            return (heads[:, None] * num_positions + rows).flatten()
        return (rows[:, None] * self.num_heads + heads).flatten()

    def on_all(
        self, apply: Callable[[Tensor, Tensor], Tensor], num_positions: int
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function of positions that a function of merged rows is."""
        return lambda x, rows: apply(x, self.of(rows, num_positions))

    def parted(self, x: Tensor, axis: int) -> Tensor:
        """Return a tensor with an axis for heads and one for positions in the place of merged rows."""
        parted: Tensor = x.unflatten(axis, (self.num_heads, -1) if self.heads_first else (-1, self.num_heads))
        return parted
