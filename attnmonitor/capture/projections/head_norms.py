"""Norms between a projection and the product of queries and keys (QK-norm): which gain acts on which coordinate.

A norm of each head divides by the size of the vector and multiplies each coordinate by a gain. The gain is a diagonal
matrix between projection and product, so it belongs to what the head has learned. To find which entry of which norm
acts on a coordinate, one more forward runs with noise for the projections, in which every norm multiplies by a pattern
of its own. Where the coordinates show the pattern of one norm, in order, its gain is multiplied in; the mean that a
layer norm removes is left out, as everywhere.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.capture.projections.noise import Draws, Patterns
from attnmonitor.capture.projections.weights import Coordinates, HeadGain

__all__ = ["Gained", "with_head_gain"]

_NEAR = 0.02  # a pattern changes by factors of 2; bfloat16 rounds by 0.4 %


@dataclass(frozen=True)
class Gained:
    """Coordinates with the gain of the norm that follows their projection, or why it was left out."""

    coordinates: Coordinates
    left_out: str = ""


def with_head_gain(coordinates: Coordinates, patterned: Tensor, draws: Draws, patterns: Patterns) -> Gained:
    """Add to coordinates the gain of the norm that acts on them, if one does.

    Args:
        coordinates: From `match_columns`, ``(H, d)``.
        patterned: The same coordinates in the forward with patterns, ``(B, H, d)``.
        draws: The noise of that forward.
        patterns: The pattern of each norm that ran.
    """
    expected = coordinates.drawn(draws)
    if expected is None:
        return Gained(coordinates)
    found = patterned.flatten(1).to(expected)
    factor = (found * expected).sum(0) / expected.square().sum(0)
    if bool(((factor - 1).abs() < _NEAR).all()):
        return Gained(coordinates)
    for norm, pattern in patterns.items():
        copies, rest = divmod(len(factor), len(pattern))
        if rest == 0 and bool(((factor / pattern.to(factor).repeat(copies) - 1).abs() < _NEAR).all()):
            index = torch.arange(len(pattern)).repeat(copies)
            return Gained(coordinates.with_gain(HeadGain(weakref.ref(norm), index, draws.hooks)))
    left_out = "the gain of a norm between its projections and their product is left out: it is no diagonal on a head"
    return Gained(coordinates, left_out)
