"""The value of each metric for random heads: a reference line for its curves.

An effective rank of 40 or a coherence of 3 says little until one knows what random queries and keys of the same shape
give. Only metrics that do not depend on the size of q and k have such a value.
"""

from __future__ import annotations

from functools import cache

import torch

from attnmonitor.functional.checked_rows import head_similarity
from attnmonitor.functional.queries import query_gram
from attnmonitor.functional.values import value_spread
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.metrics.statistics import LayerHeads, head_statistics

__all__ = ["NULL_METRICS", "null_statistics"]

NULL_METRICS = tuple(name for name, info in METRICS.items() if info.scale_free)
"""Metrics that scaling q and k leaves unchanged."""

_MOST_HEADS, _MOST_NUMBERS = 16, 2**22  # a long probe needs fewer heads for the same mean, and must not fill the memory


@cache
def null_statistics(num_positions: int, head_dim: int) -> dict[str, float]:
    """Mean of each of `NULL_METRICS` over heads whose queries and keys are independent standard normal numbers.

    The numbers are the same each time, and the caller's random state is not touched.

    Args:
        num_positions: Positions L of queries and keys, at least 2.
        head_dim: Size d of a head.

    Example:
        >>> null = null_statistics(128, 32)
        >>> null["energy_effective_rank"] < 32, 1 < null["key_incoherence"] < 4
        (True, True)
    """
    generator = torch.Generator().manual_seed(0)
    num_heads = min(_MOST_HEADS, max(1, _MOST_NUMBERS // (num_positions * head_dim)))
    query, key = torch.randn(2, 1, num_heads, num_positions, head_dim, generator=generator, device="cpu")
    with torch.no_grad():
        [found] = head_statistics([LayerHeads(query_gram(query), key, head_dim**-0.5)], NULL_METRICS)
        values = {**found.values, "head_similarity": head_similarity(query, key), "value_spread": value_spread(key)}
    return {metric: float(values[metric].mean()) for metric in NULL_METRICS}
