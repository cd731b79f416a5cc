"""From the queries and keys of layers to the values of the metrics that were asked for.

Each metric's entry in the table names the summary it reads and holds its formula. Here the summaries that the asked-for
metrics name are computed once per layer, and their formulas are applied; nothing else is computed.

This has two stages. `head_cores` takes one layer as soon as its attention ran, and gives all values but those of the
energy spectrum. `head_statistics` then solves the d×d eigenproblems of many layers at once, which a GPU does far better
than one layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, check_query_and_key
from attnmonitor.functional.cores import FieldCores, joined_cores
from attnmonitor.functional.positions import share_excess
from attnmonitor.functional.precision import full_precision
from attnmonitor.functional.queries import QueryGram
from attnmonitor.functional.spectrum import EnergySpectrum, Method, core_spectrum
from attnmonitor.functional.summaries import Summary, layer_summaries
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.parallel.workers import map_on_cores, split_for_cores

__all__ = ["HeadCores", "HeadStatistics", "batch_statistics", "head_cores", "head_statistics", "summaries_of"]


@dataclass(frozen=True, eq=False)
class HeadCores:
    """What is kept of one layer: values, and cores for those that need a spectrum.

    Attributes:
        metrics: The metrics asked for.
        values: Those that need no spectrum, by name, ``(B, H)`` float32.
        fields: The cores of its energy fields; None where no metric needs a spectrum.
        share_excess: 0-dim: the most by which a position's share of the energy exceeds its leverage; None where not
            both were computed.
    """

    metrics: tuple[str, ...]
    values: dict[str, Tensor]
    fields: FieldCores | None
    share_excess: Tensor | None


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """Every value of one layer's heads, on the device that measured them.

    Attributes:
        values: By metric name, ``(B, Hq)`` or ``(B, Hkv)`` float32 as the table's scope says.
        certified: ``(B, Hq)`` bool: the effective rank is proved equal to what a full SVD gives. None where no
            spectrum was computed.
        invariant_residual: 0-dim float32: the worst violation, relative, of what holds for any input (no share above
            its leverage; no energy past the trace; ``1 ≤ stable rank ≤ participation ratio ≤ d``). Rounding error
            unless something is wrong. None where nothing was computed that could be checked.
    """

    values: dict[str, Tensor]
    certified: Tensor | None
    invariant_residual: Tensor | None


def summaries_of(metrics: Sequence[str]) -> frozenset[Summary]:
    """The summaries that the metrics' formulas read."""
    return frozenset(METRICS[name].summary for name in metrics)


def head_cores(
    queries: QueryGram | None,
    key: Tensor | None,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    metrics: Sequence[str],
) -> HeadCores:
    """Reduce one layer's queries and keys to what ``metrics`` need of them.

    Keeps no reference to k, and needs memory for one block of positions beside it.

    Args:
        queries: Of q as softmax sees it, from `query_gram`; None where no metric reads a summary in `FROM_QUERIES`.
        key: ``(B, Hkv, Lk, d)``, never repeated per query head; None where no metric reads a summary in `FROM_KEYS`.
        scale: The softmax scale s.
        key_mask: ``(B, Lk)`` bool, True where valid.
        metrics: Names from the table; those of attention rows and of weights are left out.

    Raises:
        ValueError: The shapes do not fit.
    """
    if key is not None:
        check_heads("key", key, key_mask)
        if queries is not None:
            check_query_and_key(queries.shape, key.shape)
    wanted = summaries_of(metrics)

    def reduced(sequences: slice) -> HeadCores:
        found = layer_summaries(
            None if queries is None else queries.of(sequences),
            None if key is None else key[sequences],
            wanted,
            scale=scale,
            key_mask=None if key_mask is None else key_mask[sequences],
        )
        excess = None
        if "energy_shares" in found and "leverage" in found:
            excess = share_excess(found["energy_shares"], found["leverage"])
        return HeadCores(tuple(metrics), _values(metrics, found), found.get("cores"), excess)

    heads = key if queries is None else queries.gram
    if heads is None:
        return HeadCores(tuple(metrics), {}, None, None)
    multiplications = math.prod(heads.shape if queries is None else queries.shape) * heads.shape[-1]
    with full_precision(heads.device):
        return _joined(map_on_cores(reduced, split_for_cores(len(heads), multiplications, heads.device)))


def _values(metrics: Sequence[str], summaries: dict[str, Any]) -> dict[str, Tensor]:
    """Apply the formulas of the metrics whose summary is there, float32."""
    return {
        name: METRICS[name].formula(summaries[METRICS[name].summary]).to(torch.float32)
        for name in metrics
        if METRICS[name].summary in summaries
    }


def _joined(parts: Sequence[HeadCores]) -> HeadCores:
    """The cores of one layer out of those of some of its sequences each."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return HeadCores(
        first.metrics,
        {name: torch.cat([part.values[name] for part in parts]) for name in first.values},
        _joined_fields([part.fields for part in parts if part.fields is not None]),
        None if first.share_excess is None else _largest([part.share_excess for part in parts]),
    )


def _joined_fields(parts: Sequence[FieldCores]) -> FieldCores | None:
    if not parts:
        return None
    return FieldCores(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(FieldCores)))


def _largest(residuals: Sequence[Tensor | None]) -> Tensor | None:
    """The largest of the 0-dim residuals that are there, float32."""
    known = [residual.to(torch.float32) for residual in residuals if residual is not None]
    return torch.stack(known).amax() if known else None


def head_statistics(
    cores: Sequence[HeadCores], *, method: Method = "auto", target_rank: int | Sequence[int | None] | None = None
) -> list[HeadStatistics]:
    """Values of every layer; on a GPU, layers of one head size and target rank go in one batch.

    Nothing waits for the device (unless ``method`` is ``"exact"`` on CUDA), so heads that fail to be certified cannot
    be tried again here: the caller reads ``certified`` with its next transfer and asks for a larger ``target_rank``
    next time.

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
    found = [HeadStatistics(layer.values, None, _largest([layer.share_excess])) for layer in cores]
    batches: dict[tuple[int, ...], list[int]] = {}
    multiplications, device = 0, torch.device("cpu")
    for index, (layer, columns) in enumerate(zip(cores, per_layer, strict=True)):
        if layer.fields is not None:
            head_dim, device = layer.fields.core.shape[-1], layer.fields.core.device
            multiplications += layer.fields.core.numel() * head_dim
            alone = index if device.type == "cpu" else -1  # one layer's cores at a time stay in a CPU's cache
            batches.setdefault((head_dim, min(columns or 0, head_dim), alone), []).append(index)

    def solved(part: slice) -> list[tuple[int, HeadStatistics]]:
        solutions: list[tuple[int, HeadStatistics]] = []
        for (_, columns, _), members in list(batches.items())[part]:
            layers = [cores[index] for index in members]
            batch = joined_cores([layer.fields for layer in layers if layer.fields is not None])
            spectrum = core_spectrum(batch, method=method, target_rank=columns or None)
            solutions += zip(members, batch_statistics(layers, spectrum), strict=True)
        return solutions

    if batches:
        for solutions in map_on_cores(solved, split_for_cores(len(batches), multiplications, device)):
            for index, layer_statistics in solutions:
                found[index] = layer_statistics
    return found


def batch_statistics(layers: Sequence[HeadCores], spectrum: EnergySpectrum) -> list[HeadStatistics]:
    """Split the values of a batch of layers, whose spectra are ``(N, ...)``, by layer.

    Args:
        layers: Layers with cores, asked for any metrics.
        spectrum: Of their cores, joined by `joined_cores`.
    """
    names = dict.fromkeys(name for layer in layers for name in layer.metrics)
    batch = _values(list(names), {"energy_spectrum": spectrum})
    certified, violation = spectrum.certified(), spectrum.violation()
    found, start = [], 0
    for layer in layers:
        assert layer.fields is not None
        shape = layer.fields.error.shape
        heads = slice(start, start + shape.numel())
        values = {name: value[heads].view(shape) for name, value in batch.items() if name in layer.metrics}
        residual = _largest([violation[heads].amax(), layer.share_excess])
        found.append(HeadStatistics(layer.values | values, certified[heads].view(shape), residual))
        start = heads.stop
    return found
