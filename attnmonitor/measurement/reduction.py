"""From the attention of each layer, as a forward shows it, to the values of all heads.

A layer's queries and keys are copied when its attention runs; of the queries a GPU keeps the Gram matrix alone. Of the
values a CPU keeps moments, a GPU a copy. With them stay the rows that verification rebuilt. Pending layers are finished
together: a batch of operations and of small eigenproblems costs little more than those of one layer, and right after a
layer torch's own threads still spin and would slow down what is computed then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from attnmonitor.capture import AttentionCall
from attnmonitor.capture.comparison import Comparison
from attnmonitor.functional import query_gram
from attnmonitor.functional.checks import num_positions
from attnmonitor.functional.eigenvalues import Steps, solved
from attnmonitor.functional.host_solver import HostSolver
from attnmonitor.functional.precision import norms_of
from attnmonitor.functional.queries import QueryGram
from attnmonitor.functional.summaries import FROM_ATTENTION, FROM_KEYS, FROM_QUERIES
from attnmonitor.measurement.attention_values import (
    OTHER_OUTPUT,
    UNKNOWN_PROJECTION,
    kept_rows,
    kept_values,
    unknown_reason,
    values_at_once,
)
from attnmonitor.messages import error_text
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.metrics.statistics import HeadStatistics, LayerHeads, head_statistics, summaries_of
from attnmonitor.sample import LayerCoverage

__all__ = ["LARGEST_BATCH_ELSEWHERE", "ReducedLayer", "Reduction", "layer_heads", "pending_limit"]

LARGEST_BATCH = 2**25
"""Bytes that pending layers may hold on a CPU. The more they hold, the more memory the system has to clear for the
layers that follow."""

LARGEST_BATCH_ELSEWHERE = 2**27
"""Bytes that pending layers may hold on another device; on a GPU with idle memory they may hold more."""


@dataclass(frozen=True, eq=False)
class ReducedLayer:
    """What is kept of one layer's attention beside its `HeadStatistics`.

    Attributes:
        coverage: How it was captured.
        precision: The least precise type it was computed in.
        comparisons: Its output in some rows, and as rebuilt from what was captured; none where it is not known.
        num_keys: Keys that are not padding, ``(B, 1)``.
        at_once: Values that were computed while it ran, ``(B, Hq)``.
        gained_bias: Whether a bias acts that did not at the first forward, 0-dim bool; None where none can.
        has_written: Whether what its heads write is known; it is not before the output projection has run.
    """

    coverage: LayerCoverage
    precision: torch.dtype
    comparisons: tuple[Comparison, ...]
    num_keys: Tensor
    at_once: Mapping[str, Tensor]
    gained_bias: Tensor | None = None
    has_written: bool = False

    def why_unknown(self, share: Tensor | None) -> str:
        """Why metrics of the values or of the output are NaN; ``""`` where they are not.

        Args:
            share: `output_share` as it is shown, ``(Hq,)``; None where it is not measured.
        """
        if self.coverage.values_reason or share is None or not bool(share.isnan().all()):
            return self.coverage.values_reason
        return OTHER_OUTPUT if self.has_written else UNKNOWN_PROJECTION

    def values(self, metrics: Sequence[str], found: HeadStatistics) -> dict[str, Tensor]:
        """Values of the metrics, ``(B, H)``, with the query heads in the model's order; NaN for what is not known."""
        known = {**found.values, **self.at_once}
        num_heads = {"query_head": self.coverage.num_query_heads, "kv_head": self.coverage.num_kv_heads}
        values = {}
        for metric in metrics:
            info = METRICS[metric]
            if metric not in known:
                shape = len(self.num_keys), num_heads[info.scope]
                values[metric] = torch.full(shape, torch.nan, device=self.num_keys.device)
            elif self.coverage.tiled and info.scope == "query_head" and info.summary not in FROM_ATTENTION:
                values[metric] = _regrouped(known[metric], self.coverage.num_kv_heads)
            else:
                values[metric] = known[metric]
        return values


def _regrouped(x: Tensor, num_groups: int) -> Tensor:
    """Reorder heads ``(B, H, ...)`` in equal groups: the first of every group, then the second of every group, …"""
    regrouped: Tensor = x.unflatten(1, (num_groups, -1)).transpose(1, 2).flatten(1, 2)
    return regrouped


class Reduction:
    """Reduces one forward of the probe layer by layer: the values of each layer, or the reason for a failure.

    Args:
        metrics: Names of the metrics to compute.
        target_ranks: Columns of the sketch that sufficed for a layer, by its name.
        strict: Raise an error in one layer; otherwise only that layer fails.
        on_host: Have the eigenproblems of tensors on a GPU solved by the host's cores.
        takes: Whether a layer, by its name, is reduced here; other processes reduce the others.
        keep: Called with each attention, and with the copy of its queries and keys where it is reduced here.

    Attributes:
        layers: What is known of each layer.
        statistics: Values of its heads, for every layer in ``layers`` after `finish`.
        failures: Reason for each layer that could not be measured.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        target_ranks: Mapping[str, int],
        *,
        strict: bool = False,
        on_host: bool = False,
        takes: Callable[[str], bool] = lambda layer: True,
        keep: Callable[[AttentionCall, LayerHeads | None], None] = lambda call, heads: None,
    ) -> None:
        self._metrics = metrics
        self._summaries = summaries_of(metrics)
        self._target_ranks = target_ranks
        self._strict = strict
        self._on_host = on_host
        self._takes = takes
        self._keep = keep
        self._solver: HostSolver[None] | None = None
        self._pending: dict[str, LayerHeads] = {}
        self.layers: dict[str, ReducedLayer] = {}
        self.statistics: dict[str, HeadStatistics] = {}
        self.failures: dict[str, str] = {}

    def take(self, call: AttentionCall) -> None:
        """Reduce one layer's attention; its queries and keys can be freed afterwards."""
        # What the heads of the layer before write is known by now.
        held = sum(heads.nbytes for heads in self._pending.values())
        if held > LARGEST_BATCH and held > pending_limit(call.query.device):
            self._start()
        heads = None
        if self._takes(call.layer):
            with self._contained(call.layer):
                self.layers[call.layer], heads = self._reduced(call), layer_heads(call, self._summaries)
                self._pending[call.layer] = heads
            if "output_share" in self._metrics and call.rows.output is not None:
                call.when_written.append(partial(self._take_written, call.layer))
        self._keep(call, heads)

    def _take_written(self, layer: str, written: Tensor | None) -> None:
        """Keep the size of what the heads of a layer write, if all of it is known."""
        heads, known = self._pending.get(layer), self.layers.get(layer)
        if known is None:
            return
        if heads is not None and heads.rows is not None:
            rows = replace(heads.rows, written=None if written is None else norms_of(written))
            self._pending[layer] = replace(heads, rows=rows)
            self.layers[layer] = replace(known, has_written=written is not None)
        else:  # more acts on it when its share has been computed already
            shape = len(known.num_keys), known.coverage.num_query_heads
            unknown = torch.full(shape, torch.nan, device=known.num_keys.device)
            self.layers[layer] = replace(known, at_once={**known.at_once, "output_share": unknown})

    def advance(self) -> bool:
        """Go on with the layers as far as no wait is needed; return whether all are finished."""
        self._start()
        return self._solver is None or self._solver.advance()

    def finish(self) -> None:
        """Compute the values of the pending layers, each with the sketch columns that sufficed for it before."""
        self._start()
        if self._solver is not None:
            self._solver.result()

    def _start(self) -> None:
        """Compute the pending layers; where the host's cores solve for it, up to what they have to solve first."""
        if not self._pending:
            return
        if self._solver is not None:
            self._solver.result()  # layers that came before, so that no more than two batches are held
        pending = dict(self._pending)
        self._pending.clear()
        if self._on_host:
            self._solver = HostSolver(self._finished(pending))
        else:
            solved(self._finished(pending))

    def _finished(self, pending: Mapping[str, LayerHeads]) -> Steps[None]:
        try:
            yield from self._computed(pending)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if self._strict:
                raise
            for name, heads in pending.items():  # each alone, so that only those fail that are the reason
                with self._contained(name):
                    yield from self._computed({name: heads})

    def _computed(self, pending: Mapping[str, LayerHeads]) -> Steps[None]:
        target_ranks = [self._target_ranks.get(name) for name in pending]
        found = yield from head_statistics.steps(list(pending.values()), self._metrics, target_rank=target_ranks)
        self.statistics.update(zip(pending, found, strict=True))

    @contextmanager
    def _contained(self, name: str) -> Iterator[None]:
        """Turn an error in one layer into a failure of that layer."""
        try:
            yield
        except torch.OutOfMemoryError:  # the whole measurement is tried again with half of the probe
            raise
        except Exception as error:
            if self._strict:
                raise
            self.layers.pop(name, None)
            self.failures[name] = f"measuring failed: {error_text(error)}"

    def _reduced(self, call: AttentionCall) -> ReducedLayer:
        """How a layer was captured, and the values that are read while it runs."""
        coverage = LayerCoverage(
            layer=call.layer,
            how=call.how,
            kind=call.kind,
            num_query_heads=call.query.shape[1],
            num_kv_heads=call.key.shape[1],
            head_dim=call.query.shape[3],
            scale=call.scale,
            outside=call.outside,
            num_keys=call.key.shape[2],
            tiled=call.tiled,
            values_reason=unknown_reason(call, self._metrics),
            sees=call.layout.sees,
            future_mass=call.layout.future_mass,
            padding_mass=call.layout.padding_mass,
            reach_back=call.layout.reach_back,
            reach_ahead=call.layout.reach_ahead,
            reaches_evenly=call.layout.reaches_evenly,
            remarks=call.layout.remarks,
            documents=0 if call.layout.documents is None else call.layout.documents.count,
        )
        num_keys = num_positions(call.key, call.key_mask)
        at_once = values_at_once(call, self._metrics)
        return ReducedLayer(coverage, call.precision, call.rows.comparisons, num_keys, at_once, call.gained_bias)


def pending_limit(device: torch.device) -> int:
    """Bytes that pending layers may hold before they are finished.

    On a GPU that may be half of what torch's allocator holds and does not use, if this is more: finishing them in the
    middle of the forward makes the host wait for their eigenproblems. After a training step the memory of its
    activations is idle; the process does not grow by it.
    """
    if device.type == "cpu":
        return LARGEST_BATCH
    if device.type != "cuda":
        return LARGEST_BATCH_ELSEWHERE
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(LARGEST_BATCH_ELSEWHERE, idle // 2)


def layer_heads(call: AttentionCall, summaries: Collection[str] = FROM_QUERIES | FROM_KEYS) -> LayerHeads:
    """A copy of what the summaries need of a layer, because the model may overwrite it later."""
    query: Tensor | QueryGram | None = None
    if not FROM_QUERIES.isdisjoint(summaries):
        # The cores need the query heads that share a key head side by side.
        query = _regrouped(call.query, call.query.shape[1] // call.key.shape[1]) if call.tiled else call.query
        # On a GPU the Gram matrix is in float64, and the queries are not read again.
        query = query.clone() if query.device.type == "cpu" else query_gram(query, call.query_mask)
    key = None if FROM_KEYS.isdisjoint(summaries) else call.key.clone()
    values = kept_values(call) if "values" in summaries else None
    rows = kept_rows(call) if "checked_rows" in summaries else None
    return LayerHeads(query, key, call.scale, call.key_mask, call.query_mask, values, rows)
