"""Sums added to logits while their positions are viewed in other axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

__all__ = ["Split", "joined"]


@dataclass(frozen=True, eq=False)
class Split:
    """Logits whose positions are viewed in other axes.

    Attributes:
        source: The logits before.
        part: The slices of them that are viewed; None for all.
        added: Tensors added since, each with the shape it was added to.
    """

    source: Tensor
    part: tuple[Any, ...] | None = None
    added: tuple[tuple[Tensor, tuple[int, ...]], ...] = ()

    def plus(self, added: Tensor, shape: Sequence[int]) -> Split:
        """Return the split after one more sum."""
        return replace(self, added=(*self.added, (added, tuple(shape))))

    def latest(self) -> Split:
        """Return the split with its latest sum alone."""
        return replace(self, added=self.added[-1:])

    def bias(self, like: Tensor) -> Tensor:
        """Return all that was added as a bias on the logits, of the shape they had before."""
        total = like.new_zeros(self.source.shape)
        target = total if self.part is None else total[self.part]
        for added, shape in self.added:
            target += added.expand(shape).reshape(target.shape)
        return total


def joined(split: Split, shape: Sequence[int]) -> bool:
    """Return whether logits of this shape are back in the axes they had before the split."""
    return split.part is None and tuple(shape[-2:]) == tuple(split.source.shape[-2:])
