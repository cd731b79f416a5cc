"""What a sample sends to the host: means and spreads over the probe's sequences, and the checks, of all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnmonitor.capture.comparison import deviations
from attnmonitor.functional.averages import mean_of_sums, sequence_sums, spread_of_sums
from attnmonitor.measurement.reduction import Reduction

__all__ = ["Key", "collected"]

Key = tuple[str, ...]
"""``("mean", metric, layer)``, ``("spread", metric, layer)``, or a check and a layer."""


def collected(forward: Reduction, metrics: Sequence[str]) -> dict[Key, Tensor]:
    """Average over sequences what all layers of a finished forward have given; still on the device."""
    compared = {name: layer.comparisons for name, layer in forward.layers.items() if layer.comparisons}
    errors = deviations(list(compared.values()))
    on_device: dict[Key, Tensor] = {("error", name): error for name, error in zip(compared, errors, strict=True)}
    by_sequence: dict[Key, Tensor] = {}
    counted: dict[Key, Tensor] = {}
    for name, layer in forward.layers.items():
        found = forward.statistics[name]
        checks = {
            "certified": found.certified,
            "decided": found.decided,
            "residual": found.invariant_residual,
            "bias": layer.gained_bias,
            "keys": layer.num_keys,
        }
        on_device |= {(check, name): values for check, values in checks.items() if values is not None}
        by_sequence |= {(metric, name): heads for metric, heads in layer.values(metrics, found).items()}
        counted |= {(metric, name): which for metric, which in found.counted.items()}
    return on_device | _averaged(by_sequence, counted)


def _averaged(by_sequence: Mapping[Key, Tensor], counted: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Mean and spread over sequences of every ``(B, H)``, all of one B at once; some values may not count."""
    by_batch: dict[int, dict[Key, Tensor]] = {}  # more than one only in windowed vision models
    for key, values in by_sequence.items():
        by_batch.setdefault(len(values), {})[key] = values
    averaged: dict[Key, Tensor] = {}
    for several in by_batch.values():
        device = next(iter(several.values())).device
        all_count = torch.ones(1, 1, dtype=torch.bool, device=device)
        every = [counted.get(key, all_count.expand(values.shape)) for key, values in several.items()]
        joined, counts = (torch.cat([each.to(device) for each in parts], dim=1) for parts in (several.values(), every))
        sums = sequence_sums(joined, counts)
        widths = [values.shape[1] for values in several.values()]
        for which, average in (("mean", mean_of_sums), ("spread", spread_of_sums)):
            for key, heads in zip(several, torch.split(average(sums), widths), strict=True):
                averaged[(which, *key)] = heads
    return averaged
