"""From the cores of many layers to every statistic of every head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.functional.cores import FieldCores, HeadCores
from attnmonitor.functional.ranks import effective_rank, participation_ratio
from attnmonitor.functional.spectrum import EnergySpectrum, Method, core_spectrum
from attnmonitor.parallel.workers import map_on_cores, split_for_cores

__all__ = ["HeadStatistics", "head_statistics"]


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """Every statistic of one layer's heads, on the device that measured them.

    Attributes:
        values: By metric name, ``(B, Hq)`` or ``(B, Hkv)`` float32 as the catalog's scope says.
        certified: ``(B, Hq)`` bool: the effective rank is proved equal to what a full SVD gives.
        invariant_residual: 0-dim float32: the worst violation, relative, of what holds for any input (no share above
            its leverage; no energy past the trace; ``1 ≤ stable rank ≤ participation ratio ≤ d``). Rounding noise if
            all is well.
    """

    values: dict[str, Tensor]
    certified: Tensor
    invariant_residual: Tensor


def head_statistics(
    cores: Sequence[HeadCores], *, method: Method = "auto", target_rank: int | Sequence[int | None] | None = None
) -> list[HeadStatistics]:
    """Statistics of every layer; on a GPU, layers of one head size and target rank go in one batch.

    Nothing waits for the device (unless ``method`` is ``"exact"`` on CUDA), so heads that fail to be certified cannot
    be tried again here: the caller sees ``certified`` in its next transfer and asks for a larger ``target_rank`` next
    time.

    Args:
        cores: One per layer, from `head_cores`.
        method: How the spectra are computed, see `core_spectrum`.
        target_rank: Columns of the sketch, one for all layers or one per layer; clamped to the head size.

    Returns:
        One `HeadStatistics` per layer, in order.

    Raises:
        ValueError: ``target_rank`` is a sequence of another length than ``cores``.
    """
    per_layer = [target_rank] * len(cores) if target_rank is None or isinstance(target_rank, int) else list(target_rank)
    if len(per_layer) != len(cores):
        raise ValueError(
            f"target_rank: got {len(per_layer)} values for {len(cores)} layers; give one per layer, or one"
        )
    if not cores:
        return []
    batches: dict[tuple[int, ...], list[int]] = {}
    for index, (layer, wanted) in enumerate(zip(cores, per_layer, strict=True)):
        head_dim = layer.fields.core.shape[-1]
        columns = 0 if wanted is None else min(wanted, head_dim)
        alone = index if layer.fields.core.device.type == "cpu" else -1  # a core at a time stays in a CPU's cache
        batches.setdefault((head_dim, columns, alone), []).append(index)

    def of(part: slice) -> list[tuple[int, HeadStatistics]]:
        found: list[tuple[int, HeadStatistics]] = []
        for (_, columns, _), members in list(batches.items())[part]:
            layers = [cores[index] for index in members]
            spectrum = core_spectrum(_batched(layers), method=method, target_rank=columns or None)
            found += zip(members, _statistics(layers, spectrum), strict=True)
        return found

    cubes = sum(layer.fields.core.numel() * layer.fields.core.shape[-1] for layer in cores)
    parts = split_for_cores(len(batches), cubes, cores[0].fields.core.device)
    found = dict(each for part in map_on_cores(of, parts) for each in part)
    return [found[index] for index in range(len(cores))]


def _batched(layers: Sequence[HeadCores]) -> FieldCores:
    """The fields of several layers as one batch of heads, ``(N, ...)``."""
    fields = [layer.fields for layer in layers]
    heads = [each.error.shape for each in fields]
    return FieldCores(
        _joined([each.core.flatten(0, 1) for each in fields]),
        _joined([each.error.flatten() for each in fields]),
        _joined([each.query_energy.flatten() for each in fields]),
        _joined([each.num_queries.expand(shape).flatten() for each, shape in zip(fields, heads, strict=True)]),
        _joined([each.num_keys.expand(shape).flatten() for each, shape in zip(fields, heads, strict=True)]),
    )


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts end to end, without a copy of a part that is alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _statistics(layers: Sequence[HeadCores], spectrum: EnergySpectrum) -> list[HeadStatistics]:
    """Deal the batch's statistics back to its layers."""
    batch = {
        "energy_effective_rank": spectrum.effective_rank(),
        "energy_participation_ratio": spectrum.participation_ratio,
        "energy_stable_rank": spectrum.stable_rank,
        "energy_rms": spectrum.energy_rms,
    }
    certified, violation = spectrum.certified(), _violation(spectrum)
    found, start = [], 0
    for layer in layers:
        shape = layer.fields.error.shape
        heads = slice(start, start + shape.numel())
        values = {name: value[heads].view(shape) for name, value in batch.items()}
        values |= _sizes_and_ranks(layer) | layer.per_position
        residual = torch.maximum(violation[heads].amax().to(torch.float32), layer.share_excess.to(torch.float32))
        values = {name: value.to(torch.float32) for name, value in values.items()}
        found.append(HeadStatistics(values, certified[heads].view(shape), residual))
        start = heads.stop
    return found


def _sizes_and_ranks(layer: HeadCores) -> dict[str, Tensor]:
    """What follows from the energies and the key spectrum alone."""
    variances, fields = layer.key_variances, layer.fields
    energy, head_dim = variances.sum(-1), variances.shape[-1]
    return {
        "key_rank": torch.where(energy.isfinite(), effective_rank(variances, 0.9), torch.nan),
        "key_participation_ratio": participation_ratio(variances),
        "query_rms": (fields.query_energy / (fields.num_queries * head_dim)).sqrt(),
        "key_rms": (energy / (fields.num_keys * head_dim)).sqrt(),
    }


def _violation(spectrum: EnergySpectrum) -> Tensor:
    """How far each spectrum breaks what every spectrum obeys, ``(N,)``; 0 for heads that are zero or not finite."""
    stable, participation = spectrum.stable_rank, spectrum.participation_ratio
    past_trace = spectrum.variances.sum(-1) / spectrum.energy - 1
    worst = torch.stack([1 - stable, stable / participation - 1, participation / spectrum.max_rank - 1, past_trace])
    return torch.where(worst.isfinite() & (spectrum.energy > 0), worst, 0).amax(0).clamp_min(0)
