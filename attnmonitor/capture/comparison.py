"""How far rebuilt output is from a layer's own, for the layers of a model in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Comparison", "deviation_where_finite", "deviations"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Rows of a layer's output, to be compared when there is time: the layers of a model in one batch.

    Attributes:
        expected: As rebuilt, in the code's layout; NaN in a row that sees no key. What is not finite is not compared.
        actual: As the layer computed them, of the same shape.
    """

    expected: Tensor
    actual: Tensor


def deviations(layers: Sequence[Sequence[Comparison]]) -> list[Tensor]:
    """Return the largest deviation of each layer's comparisons, 0-dim float32; made without a wait.

    Args:
        layers: For each layer one comparison or more; each is relative to the largest actual entry in it.
    """
    found = iter(_deviations([each for comparisons in layers for each in comparisons]))
    own = [[next(found) for _ in comparisons] for comparisons in layers]
    return [each[0] if len(each) == 1 else torch.stack(each).amax() for each in own]


def deviation_where_finite(comparisons: Sequence[Comparison]) -> float:
    """Return a layer's largest deviation among the rebuilt entries that are finite in its output too; waits.

    A kernel that adds its causal mask spreads a NaN of a key into rows that do not see the key.

    Returns:
        NaN where its output is not finite although all that was rebuilt is, and where nothing is left to compare.
    """
    spoiled = any(not each.expected.isfinite().all() for each in comparisons)
    left = [
        replace(each, expected=each.expected.masked_fill(~each.actual.isfinite(), torch.nan)) for each in comparisons
    ]
    if not spoiled or not any(each.expected.isfinite().any() for each in left):
        return torch.nan
    return float(deviations([left])[0])


def _deviations(comparisons: Sequence[Comparison]) -> list[Tensor]:
    groups: dict[object, list[int]] = {}
    for index, each in enumerate(comparisons):
        kind = each.expected.shape, each.expected.dtype, each.actual.dtype, each.expected.device
        groups.setdefault(kind, []).append(index)
    found: dict[int, Tensor] = {}
    for group in groups.values():
        expected = torch.stack([comparisons[index].expected for index in group]).flatten(1)
        actual = torch.stack([comparisons[index].actual for index in group]).flatten(1).to(expected.dtype)
        left_out = (expected - expected).isnan()  # in fewer launches than by isfinite
        gap, size = torch.stack([expected - actual, actual]).masked_fill_(left_out, 0.0).abs_().amax(-1).unbind()
        relative = gap / size.clamp_min(torch.finfo(size.dtype).tiny)
        found |= zip(group, relative.float().unbind(), strict=True)
    return [found[index] for index in range(len(comparisons))]
