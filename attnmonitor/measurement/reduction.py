"""From the attention of each layer, as a forward shows them, to the statistics of all heads.

Queries are reduced the moment a layer's attention runs. Its keys are read once more in the basis that was found: on a
GPU at once; on a CPU a copy of them waits, for right after a layer torch's own threads still spin, waiting for the
next operation, and would take their share of the machine from what is done then. What waits is finished together: on a
GPU in one batch of small eigenproblems, on a CPU each core some of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attnmonitor.capture import AttentionCall
from attnmonitor.functional import (
    HeadCores,
    HeadStatistics,
    attention_row_statistics,
    head_cores,
    head_statistics,
    query_gram,
)
from attnmonitor.functional.checks import num_positions
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.parallel.workers import map_on_cores, split_for_cores
from attnmonitor.sample import LayerCoverage

__all__ = ["LARGEST_BATCH", "ReducedLayer", "Reduction"]

LARGEST_BATCH = 2**27
"""Bytes at which what waits is finished: the cores of 1,024 heads of d = 128 and 4 sequences would be 0.5 GB."""


@dataclass(frozen=True, eq=False)
class ReducedLayer:
    """One layer's attention after its queries and keys are gone; its statistics are kept apart from it.

    Attributes:
        coverage: How it was captured.
        precision: The least precise type it was computed in.
        error: Deviation of its output from what was captured, 0-dim; None where it cannot be told.
        num_keys: Keys that are not padding, ``(B, 1)``.
        rows: Statistics of attention rows, by metric, ``(B, Hq)``.
    """

    coverage: LayerCoverage
    precision: torch.dtype
    error: Tensor | None
    num_keys: Tensor
    rows: dict[str, Tensor]

    def in_the_models_order(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Statistics of the cores, ``(B, H)``, with the query heads as the model counts them."""
        if not self.coverage.tiled:
            return values
        return {
            metric: _regrouped(heads, self.coverage.num_kv_heads) if METRICS[metric].scope == "query_head" else heads
            for metric, heads in values.items()
        }


def _regrouped(x: Tensor, num_groups: int) -> Tensor:
    """Heads ``(B, H, ...)`` in equal groups: first the first of every group, then the second of every group, ..."""
    regrouped: Tensor = x.unflatten(1, (num_groups, -1)).transpose(1, 2).flatten(1, 2)
    return regrouped


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A layer that waits to be finished.

    Attributes:
        cores: Gives its cores.
        nbytes: What is held for them.
        multiplications: What finishing it takes, roughly.
        device: Where.
    """

    cores: Callable[[], HeadCores]
    nbytes: int
    multiplications: int
    device: torch.device


class Reduction:
    """One forward of the probe, layer by layer: what is left of each, or the reason why nothing is.

    Args:
        metrics: What is to be known of every head.
        target_ranks: Columns of the sketch that sufficed for a layer, by name.
        strict: Raise what goes wrong with one layer; otherwise only that layer is lost.

    Attributes:
        layers: What is known of each layer.
        statistics: Of its heads, for every layer in ``layers`` after `finish`.
        troubles: Why a layer is not there.
    """

    def __init__(self, metrics: Sequence[str], target_ranks: Mapping[str, int], *, strict: bool = False) -> None:
        self._metrics = metrics
        self._target_ranks = target_ranks
        self._strict = strict
        self._waiting: dict[str, _Waiting] = {}
        self.layers: dict[str, ReducedLayer] = {}
        self.statistics: dict[str, HeadStatistics] = {}
        self.troubles: dict[str, str] = {}

    def take(self, call: AttentionCall) -> None:
        """Reduce one attention; its queries and keys may go afterwards."""
        with self._one_layer(call.layer):
            self.layers[call.layer], self._waiting[call.layer] = self._reduced(call), self._waits(call)
        if sum(layer.nbytes for layer in self._waiting.values()) > LARGEST_BATCH:
            self.finish()

    def finish(self) -> None:
        """Take the statistics of the layers that wait, each layer's with the columns that sufficed for it."""
        waiting = list(self._waiting.items())
        self._waiting.clear()
        if not waiting:
            return

        def of(part: slice) -> dict[str, HeadStatistics]:
            cores: dict[str, HeadCores] = {}
            for name, layer in waiting[part]:
                with self._one_layer(name):
                    cores[name] = layer.cores()
            target_ranks = [self._target_ranks.get(name) for name in cores]
            return dict(zip(cores, head_statistics(list(cores.values()), target_rank=target_ranks), strict=True))

        multiplications = sum(layer.multiplications for _, layer in waiting)
        for found in map_on_cores(of, split_for_cores(len(waiting), multiplications, waiting[0][1].device)):
            self.statistics.update(found)

    @contextmanager
    def _one_layer(self, name: str) -> Iterator[None]:
        """Let what goes wrong with one layer cost that layer."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._strict:
                raise
            self.layers.pop(name, None)
            self.troubles[name] = f"measuring failed: {type(error).__name__}: {error}"

    def _reduced(self, call: AttentionCall) -> ReducedLayer:
        by_rows = [name for name in self._metrics if METRICS[name].source == "rows"]
        rows: dict[str, Tensor] = {}
        if by_rows:
            rows = attention_row_statistics(
                call.logit_rows,
                call.query.shape[2],
                query_mask=call.query_mask,
                key_mask=call.key_mask,
                metrics=by_rows,
                device=call.query.device,
            )
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
        )
        return ReducedLayer(coverage, call.precision, call.error, num_positions(call.key, call.key_mask), rows)

    def _waits(self, call: AttentionCall) -> _Waiting:
        # The cores take the query heads that share a key head side by side.
        query = _regrouped(call.query, call.query.shape[1] // call.key.shape[1]) if call.tiled else call.query
        queries, device = query_gram(query, call.query_mask), call.key.device
        multiplications = queries.shape.numel() * queries.shape[-1]
        waits = device.type == "cpu"
        key = call.key.clone() if waits else call.key  # the model may write into what it is done with
        cores = partial(head_cores, queries, key, scale=call.scale, key_mask=call.key_mask, metrics=self._metrics)
        if waits:
            return _Waiting(cores, queries.gram.nbytes + key.nbytes, multiplications, device)
        found = cores()
        return _Waiting(lambda: found, found.fields.core.nbytes, multiplications, device)
