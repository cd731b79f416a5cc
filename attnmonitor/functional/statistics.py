"""From the cores of many layers to every statistic of every head, in one batch per head size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.functional.cores import HeadCores
from attnmonitor.functional.counting import count_to_fraction
from attnmonitor.functional.spectrum import EnergySpectrum, Method, core_spectrum

__all__ = ["HeadStatistics", "head_statistics"]


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """Every statistic of one layer's heads, on the device that measured them.

    Attributes:
        values: By metric name, ``(B, Hq)`` or ``(B, Hkv)`` float32 as the catalog's scope says.
        certified: ``(B, Hq)`` bool: the effective rank is proved equal to what a full SVD gives.
        invariant_residual: 0-dim: the worst violation of what must hold for any input; rounding noise if all is well.
    """

    values: dict[str, Tensor]
    certified: Tensor
    invariant_residual: Tensor


def head_statistics(
    cores: Sequence[HeadCores], *, method: Method = "auto", target_rank: int | None = None
) -> list[HeadStatistics]:
    """Statistics of every layer, batched over the layers whose heads have one size.

    Args:
        cores: One per layer, from `head_cores`.
        method: How the spectra are computed, see `energy_spectrum`.
        target_rank: Columns of the sketch of the randomized route.

    Returns:
        One `HeadStatistics` per layer, in order. Nothing waits for the device.
    """
    found: dict[int, HeadStatistics] = {}
    sizes = [layer.field_core.shape[-1] for layer in cores]
    for size in dict.fromkeys(sizes):
        members = [index for index, other in enumerate(sizes) if other == size]
        batch = torch.cat([cores[index].field_core.flatten(0, 1) for index in members])
        entries = [cores[index].num_queries * cores[index].num_keys for index in members]
        heads = [cores[index].field_core.shape[:2] for index in members]
        num_entries = torch.cat([n.expand(shape).flatten() for n, shape in zip(entries, heads, strict=True)])
        spectrum = core_spectrum(batch, num_entries, method=method)
        columns = _field_values(spectrum)
        certified = spectrum.certified()
        start = 0
        for index, shape in zip(members, heads, strict=True):
            stop = start + shape.numel()
            values = {name: column[start:stop].view(shape) for name, column in columns.items()}
            values |= _key_values(cores[index]) | cores[index].per_position
            found[index] = HeadStatistics(
                {name: value.to(torch.float32) for name, value in values.items()},
                certified[start:stop].view(shape),
                cores[index].share_excess,
            )
            start = stop
    return [found[index] for index in range(len(cores))]


def _field_values(spectrum: EnergySpectrum) -> dict[str, Tensor]:
    return {
        "energy_effective_rank": spectrum.effective_rank(),
        "energy_participation_ratio": spectrum.participation_ratio,
        "energy_stable_rank": spectrum.stable_rank,
        "energy_rms": spectrum.energy_rms,
    }


def _key_values(cores: HeadCores) -> dict[str, Tensor]:
    variances = cores.key_eigenvalues  # (B, Hkv, d)
    total = variances.sum(-1)
    head_dim = variances.shape[-1]
    rank = count_to_fraction(variances, total, 0.9)
    return {
        "key_rank": torch.where(total.isfinite(), rank, torch.nan),
        "key_participation_ratio": torch.where(total == 0, 0, total.square() / variances.square().sum(-1)),
        "query_rms": (cores.query_energy / (cores.num_queries * head_dim)).sqrt(),
        "key_rms": (total / (cores.num_keys * head_dim)).sqrt(),
    }
