"""What of a forward's attention is kept until its sample was judged, so that an alarm has its evidence.

Which head alarms is known only when the sample is judged, and then its queries and keys would be gone. They are at
hand for a while anyway, until the layers are finished; so up to `MOST_BYTES` of them are simply not freed before the
judgment, and a sample without an alarm pays nothing else. Layers that are likely to be asked about come first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnmonitor.capture import AttentionCall
from attnmonitor.capture.comparison import Comparison, deviations
from attnmonitor.capture.documents import Documents
from attnmonitor.functional.queries import QueryGram
from attnmonitor.measurement.reduction import layer_heads
from attnmonitor.measurement.trust import mismatch
from attnmonitor.messages import error_text
from attnmonitor.metrics.statistics import LayerHeads

__all__ = ["MOST_BYTES", "Keeper", "KeptLayer", "kept_once"]

MOST_BYTES = 2**27
"""Of all layers kept of one forward."""


@dataclass(frozen=True, eq=False)
class KeptLayer:
    """One layer's attention in one forward.

    Attributes:
        heads: Its queries and keys; the query heads that share a key head stand side by side.
        logits: What the softmax of some rows is taken of, ``(B, Hq, R, Lk)``, query heads in the model's order.
        is_log_probability: Whether ``logits`` are the logarithm of that softmax.
        rows: Positions of these rows, ``(R,)``.
        tiled: Whether query head h reads KV head h % Hkv, in the model's order.
        kind: ``"self"`` or ``"cross"``.
        documents: The documents that the rows of the probe were cut into; None where they were not.
        size: Rows of the probe, and key positions in one.
        on_positions: Whether the keys are positions, not features.
        comparisons: Its output in these rows, and as rebuilt from what was captured; none where it is not known.
        precision: The least precise type it was computed in.
    """

    heads: LayerHeads
    logits: Tensor
    is_log_probability: bool
    rows: Tensor
    tiled: bool
    kind: str
    documents: Documents | None
    size: tuple[int, int]
    on_positions: bool
    comparisons: tuple[Comparison, ...]
    precision: torch.dtype

    @property
    def nbytes(self) -> int:
        """Memory that is held because it is kept."""
        return self.heads.nbytes + 2 * self.logits.nbytes

    @property
    def query(self) -> Tensor | QueryGram:
        """The queries or their Gram matrix."""
        assert self.heads.query is not None
        return self.heads.query

    @property
    def key(self) -> Tensor:
        """The keys, ``(B, Hkv, Lk, d)``."""
        assert self.heads.key is not None
        return self.heads.key

    @property
    def num_heads(self) -> dict[str, int]:
        """Heads of each scope."""
        return {"query_head": self.query.shape[1], "kv_head": self.key.shape[1]}

    @classmethod
    def of(cls, call: AttentionCall, heads: LayerHeads) -> KeptLayer:
        """Keep an attention whose queries and keys were copied."""
        logits, is_log_probability = call.rows.attention_logits()
        documents = call.layout.documents
        return cls(
            heads=replace(heads, values=None, rows=None),
            logits=logits,
            is_log_probability=is_log_probability,
            rows=call.rows.rows,
            tiled=call.tiled,
            kind=call.kind,
            documents=None if documents is None else documents.to(call.query.device),
            size=call.layout.positions if documents is not None else (len(call.key), call.key.shape[2]),
            on_positions=not call.layout.between_channels,
            comparisons=call.rows.comparisons,
            precision=call.precision,
        )


class Keeper:
    """Keeps layers of a forward for a while.

    Attributes:
        layers: What is kept, by name of the layer.
        failures: Why a layer is not kept, by its name.
    """

    def __init__(self) -> None:
        self.layers: dict[str, KeptLayer] = {}
        self.failures: dict[str, str] = {}
        self._wanted: Collection[str] | None = None

    @contextmanager
    def keeping(self, wanted: Collection[str]) -> Iterator[None]:
        """Keep what the forwards in this context compute; of these layers first."""
        self._wanted = wanted
        try:
            yield
        finally:
            self._wanted = None

    def drop(self) -> None:
        """Free what is kept."""
        self.layers, self.failures = {}, {}

    def take(self, call: AttentionCall, heads: LayerHeads | None) -> None:
        """Keep one layer's attention if it is wanted or there is room.

        Args:
            call: The attention.
            heads: Its queries and keys as the sample has copied them; None where another process reduces this layer.
        """
        if self._wanted is None:
            return
        is_wanted = call.layer in self._wanted
        try:
            if heads is None or heads.query is None or heads.key is None:
                if not is_wanted:
                    return
                heads = layer_heads(call)
            self._add(call.layer, KeptLayer.of(call, heads), is_wanted=is_wanted)
        except Exception as error:  # memory among them: the sample itself must not fail
            self.failures[call.layer] = error_text(error)

    def _add(self, name: str, layer: KeptLayer, *, is_wanted: bool) -> None:
        others = [each for each in self.layers if self._wanted is not None and each not in self._wanted]
        room = MOST_BYTES - sum(each.nbytes for each in self.layers.values())
        while is_wanted and room < layer.nbytes and others:
            room += self.layers.pop(others.pop()).nbytes
        if layer.nbytes <= room:
            self.layers[name] = layer
        elif is_wanted:
            self.failures[name] = "its queries and keys are too large to be kept beside those of other layers"


def kept_once(layer: str, run: Callable[[Callable[[AttentionCall], None]], Mapping[str, str]]) -> KeptLayer:
    """Run a forward to keep one layer of it.

    Args:
        layer: Name of the layer.
        run: Runs the forward, calls its argument with each attention, and returns the reason for each that was missed.

    Raises:
        RuntimeError: The layer's attention did not run, could not be captured, or does not give its output.
    """
    keeper = Keeper()

    def keep(call: AttentionCall) -> None:
        if call.layer == layer:
            keeper.take(call, None)

    with keeper.keeping({layer}):
        failures = {**run(keep), **keeper.failures}
    if layer not in keeper.layers:
        raise RuntimeError(f"{layer}: {failures.get(layer, 'its attention did not run this time')}")
    kept = keeper.layers[layer]
    if kept.comparisons and (reason := mismatch(float(deviations([kept.comparisons])[0]), kept.precision)):
        raise RuntimeError(f"{layer}: {reason}")
    return kept
