"""From the queries and keys of layers to the values of the metrics that were asked for.

Each metric's entry in the table names the summary it reads and holds its formula. Here the summaries that the asked-for
metrics name are computed, and their formulas are applied; nothing else is computed.

This happens at the end of a sample, for many layers at once: layers of one shape are joined as if they were sequences
of one layer. A small layer costs the calls of about a hundred small operations; joined, a hundred layers cost little
more.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, groupby
from typing import Any

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, check_query_and_key
from attnmonitor.functional.decisions import product_type
from attnmonitor.functional.eigenvalues import Solvable, Steps, each_step_in, solved
from attnmonitor.functional.key_basis import key_gram
from attnmonitor.functional.positions import share_excess
from attnmonitor.functional.precision import full_precision
from attnmonitor.functional.queries import QueryGram, query_gram
from attnmonitor.functional.row_statistics import CheckedRows, CheckedStatistic
from attnmonitor.functional.spectrum import Method
from attnmonitor.functional.summaries import Summary, layer_summaries
from attnmonitor.functional.values import ValueMoments, Values
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.parallel.workers import map_on_cores, split_for_cores

__all__ = ["HeadStatistics", "LayerHeads", "head_statistics", "summaries_of"]

# 2^18 float64 entries of d×d matrices are 2 MiB, a CPU core's second-level cache. A GPU prefers few launches.
_ENTRIES_AT_A_TIME = 2**18


@dataclass(frozen=True, eq=False)
class LayerHeads:
    """What the metrics of one layer are computed from; None where none reads it, or it is not known.

    Attributes:
        query: ``(B, Hq, Lq, d)``, q as softmax sees it, or its Gram matrix where q is not kept.
        key: ``(B, Hkv, Lk, d)``, never repeated per query head.
        scale: The softmax scale s.
        key_mask: ``(B, Lk)`` bool, True where the position is not padding; None where all are.
        query_mask: ``(B, Lq)`` bool, likewise.
        values: The values, or their moments where they are not kept.
        rows: The rows that verification rebuilds.

    Raises:
        ValueError: The shapes do not fit.
    """

    query: Tensor | QueryGram | None
    key: Tensor | None
    scale: float = 1.0
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    values: Values | ValueMoments | None = None
    rows: CheckedRows | None = None

    def __post_init__(self) -> None:
        if isinstance(self.query, Tensor):
            check_heads("query", self.query, self.query_mask)
        if self.key is not None:
            check_heads("key", self.key, self.key_mask)
            if self.query is not None:
                check_query_and_key(self.query.shape, self.key.shape)

    @property
    def shape(self) -> torch.Size:
        """``(B, H, L, d)`` of the queries, of the keys where there are none, zeros where there are neither."""
        heads = self.key if self.query is None else self.query
        return torch.Size((0, 0, 0, 0)) if heads is None else heads.shape

    @property
    def num_sequences(self) -> int:
        """B; 0 where it holds nothing."""
        tensor = next(self._tensors(), None)
        return 0 if tensor is None else len(tensor)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        tensor = next(self._tensors(), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def nbytes(self) -> int:
        """Memory that they hold."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        query = self.query.gram if isinstance(self.query, QueryGram) else self.query
        values = [] if self.values is None else self.values.tensors
        rows = [] if self.rows is None else self.rows.tensors
        yield from (each for each in (query, self.key, *values, *rows) if each is not None)

    @property
    def kind(self) -> Hashable:
        """What layers agree in that can be joined."""
        types = tuple((tensor.shape, tensor.dtype) for tensor in self._tensors())
        rows = [None] if self.rows is None else self.rows.tensors
        known = tuple(each is not None for each in (self.key, self.key_mask, self.query_mask, *rows))
        values = None if self.values is None else (self.values.num_kv_heads, self.values.tiled)
        return type(self.query), self.shape, types, known, values, self.scale, self.device

    def of(self, sequences: slice) -> LayerHeads:
        """The queries and keys of some of the sequences."""
        return LayerHeads(
            _some(self.query, sequences),
            _some(self.key, sequences),
            self.scale,
            _some(self.key_mask, sequences),
            _some(self.query_mask, sequences),
            _some(self.values, sequences),
            _some(self.rows, sequences),
        )

    @staticmethod
    def joined(layers: Sequence[LayerHeads]) -> LayerHeads:
        """Layers of one kind, as one layer with all of their sequences."""
        first = layers[0]
        if len(layers) == 1:
            return first
        return LayerHeads(
            _all(layer.query for layer in layers),
            _all(layer.key for layer in layers),
            first.scale,
            _all(layer.key_mask for layer in layers),
            _all(layer.query_mask for layer in layers),
            _all(layer.values for layer in layers),
            _all(layer.rows for layer in layers),
        )


def _some(heads: Any, sequences: slice) -> Any:
    if heads is None:
        return None
    return heads[sequences] if isinstance(heads, Tensor) else heads.of(sequences)


def _all(parts: Iterable[Any]) -> Any:
    """What is known of the sequences, one after the other; None where it is None."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return torch.cat(known) if isinstance(known[0], Tensor) else type(known[0]).joined(known)


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """Every value of one layer's heads, on the device that measured them.

    Attributes:
        values: By metric name, ``(B, Hq)`` or ``(B, Hkv)`` float32 as the table's scope says; none of a metric that is
            computed from what is not known.
        certified: ``(B, Hq)`` bool: the effective rank is proved equal to what a full SVD gives. None where no
            spectrum was computed.
        decided: ``(B, Hq)`` bool: it is, unless rounding errors conspire. None where no spectrum was computed.
        invariant_residual: ``(B,)`` float32: the worst violation, relative, of what holds for any input (no share above
            its leverage; no energy past the trace; ``1 ≤ stable rank ≤ participation ratio ≤ d``). Rounding error
            unless something is wrong. None where nothing was computed that could be checked.
        counted: For some metrics, the sequences that have a value, ``(B, H)`` bool; all have one of the others.
    """

    values: dict[str, Tensor]
    certified: Tensor | None
    decided: Tensor | None
    invariant_residual: Tensor | None
    counted: dict[str, Tensor] = field(default_factory=dict)

    def of(self, sequences: slice) -> HeadStatistics:
        """The values of some of the sequences."""
        return HeadStatistics(
            {name: value[sequences] for name, value in self.values.items()},
            _some(self.certified, sequences),
            _some(self.decided, sequences),
            _some(self.invariant_residual, sequences),
            {name: counted[sequences] for name, counted in self.counted.items()},
        )

    @staticmethod
    def joined(parts: Sequence[HeadStatistics]) -> HeadStatistics:
        """The values of sequences one after the other."""
        if len(parts) == 1:
            return parts[0]
        return HeadStatistics(
            {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
            _all(part.certified for part in parts),
            _all(part.decided for part in parts),
            _all(part.invariant_residual for part in parts),
            {name: torch.cat([part.counted[name] for part in parts]) for name in parts[0].counted},
        )


def summaries_of(metrics: Sequence[str]) -> frozenset[Summary]:
    """The summaries that the metrics' formulas read."""
    return frozenset(METRICS[name].summary for name in metrics)


@Solvable
def head_statistics(
    layers: Sequence[LayerHeads],
    metrics: Sequence[str],
    *,
    method: Method = "auto",
    target_rank: int | Sequence[int | None] | None = None,
) -> Steps[list[HeadStatistics]]:
    """Values of every layer.

    Nothing but the eigenproblems waits for the device, so heads that fail to be certified cannot
    be tried again here: the caller reads ``certified`` with its next transfer and asks for a larger ``target_rank``
    next time.

    Args:
        layers: The layers of a sample, or some of them.
        metrics: Names from the table; those of attention rows and of weights are left out.
        method: How the spectra are computed, see `core_spectrum`.
        target_rank: Columns of the sketch, one for all layers or one per layer; clamped to the head size.

    Returns:
        One `HeadStatistics` per layer, in order.

    Raises:
        ValueError: ``target_rank`` is a sequence of another length than ``layers``.
    """
    per_layer = (
        [target_rank] * len(layers) if target_rank is None or isinstance(target_rank, int) else list(target_rank)
    )
    if len(per_layer) != len(layers):
        raise ValueError(
            f"target_rank: got {len(per_layer)} values for {len(layers)} layers; give one per layer, or one"
        )
    groups: dict[Hashable, list[int]] = {}
    for index, (layer, columns) in enumerate(zip(layers, per_layer, strict=True)):
        groups.setdefault((layer.kind, columns), []).append(index)
    multiplications = sum(layer.shape.numel() * layer.shape[-1] for layer in layers)
    device = layers[0].device if layers else torch.device("cpu")
    num_cores = len(split_for_cores(sum(layer.num_sequences for layer in layers), multiplications, device))
    parts = [
        (group, part) for group in groups.values() for part in _parts([layers[index] for index in group], num_cores)
    ]

    def measured(some: slice) -> Steps[list[HeadStatistics]]:
        found = []
        for group, part in parts[some]:
            joined = _joined([layers[index] for index in group], part)
            steps = _statistics(joined, metrics, method, per_layer[group[0]])
            found.append((yield from each_step_in(partial(full_precision, joined.device), steps)))
        return found

    split = split_for_cores(len(parts), multiplications, device)
    if len(split) == 1:
        measured_parts = yield from measured(split[0])
    else:  # each core solves its own
        measured_parts = list(chain.from_iterable(map_on_cores(lambda some: solved(measured(some)), split)))
    found: dict[int, HeadStatistics] = {}
    for group, of_group in groupby(zip(parts, measured_parts, strict=True), lambda each: each[0][0]):
        together = HeadStatistics.joined([each for _, each in of_group])
        size = layers[group[0]].num_sequences
        found |= {index: together.of(slice(i * size, (i + 1) * size)) for i, index in enumerate(group)}
    return [found[index] for index in range(len(layers))]


def _parts(group: Sequence[LayerHeads], num_cores: int) -> list[slice]:
    """Sequences of layers of one shape to compute at a time, as slices of all of their sequences.

    Of about one size, and as many for each core, so that none waits for another.
    """
    _, num_heads, _, head_dim = group[0].shape
    count = len(group) * group[0].num_sequences
    size = count
    if group[0].device.type == "cpu":
        most = max(1, _ENTRIES_AT_A_TIME // max(1, num_heads * head_dim**2))
        for_each_core = -(-count // (most * num_cores))
        size = -(-count // max(1, for_each_core * num_cores))
    return [slice(start, min(start + size, count)) for start in range(0, count, max(size, 1))] or [slice(0, 0)]


def _joined(group: Sequence[LayerHeads], sequences: slice) -> LayerHeads:
    """Some of the sequences of layers of one shape, as one layer."""
    size = group[0].num_sequences
    if not size or sequences == slice(0, size) == slice(0, len(group) * size):
        return group[0]
    some = [
        layer.of(slice(max(0, sequences.start - start), min(size, sequences.stop - start)))
        for start, layer in zip(count(0, size), group)
        if start < sequences.stop and start + size > sequences.start
    ]
    return LayerHeads.joined(some)


def _statistics(
    layer: LayerHeads, metrics: Sequence[str], method: Method, target_rank: int | None
) -> Steps[HeadStatistics]:
    """The values of one layer."""
    wanted = summaries_of(metrics)
    queries = layer.query
    if isinstance(queries, Tensor):
        queries = query_gram(queries, layer.query_mask, dtype=product_type(queries, method))
    found = yield from layer_summaries.steps(
        queries,
        None if layer.key is None else key_gram(layer.key, layer.key_mask),
        wanted,
        scale=layer.scale,
        method=method,
        target_rank=target_rank and min(target_rank, layer.shape[-1]),
    )
    moments = layer.values.moments() if isinstance(layer.values, Values) else layer.values
    found |= {"values": moments, "checked_rows": layer.rows}
    values, counted = _values(metrics, found)
    residuals = []
    if "energy_shares" in found and "leverage" in found:
        residuals.append(share_excess(found["energy_shares"], found["leverage"]))
    spectrum = found.get("energy_spectrum")
    if spectrum is not None:
        residuals.append(spectrum.violation().amax(-1))
    certified = None if spectrum is None else spectrum.certified()
    return HeadStatistics(
        _in_float32(values),
        certified,
        certified if spectrum is None or spectrum.margin is spectrum.error else spectrum.decided(),
        torch.stack(residuals).amax(0).to(torch.float32) if residuals else None,
        counted,
    )


def _values(metrics: Sequence[str], found: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The metrics whose summary is known, and which sequences have a value of them where not all may."""
    values: dict[str, Tensor] = {}
    counted: dict[str, Tensor] = {}
    for name in metrics:
        summary, formula = found.get(METRICS[name].summary), METRICS[name].formula
        if isinstance(formula, CheckedStatistic) and summary is not None:
            if getattr(summary, formula.reads) is None:
                continue
            counted[name] = formula.counted(summary)
        if summary is not None:
            values[name] = formula(summary)
    return values, counted


def _in_float32(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All values of one shape and type converted at once."""
    found = {name: value for name, value in values.items() if value.dtype == torch.float32}
    for kind in {(value.shape, value.dtype) for name, value in values.items() if name not in found}:
        some = {name: value for name, value in values.items() if (value.shape, value.dtype) == kind}
        found |= zip(some, torch.stack(list(some.values())).to(torch.float32).unbind(), strict=True)
    return {name: found[name] for name in values}
