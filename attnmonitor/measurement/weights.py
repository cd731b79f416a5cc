"""Metrics of each head's weights: the rank of W_Qᵀ W_K, beside the rank of its energy field on the probe.

Weights change slowly and reading them costs more than a sample, so this has a schedule of its own. The projections are
found at attach, in a few forwards, by their effect, and anew for a layer whose modules have changed since: an adapter
added or merged, a projection replaced or quantized. A layer whose projections cannot be found or read is NaN, with the
reason. All of it runs inside `quiet`, like the probe: without dropout, and with counters and buffers restored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attnmonitor.capture.projections import (
    HeadProjections,
    Structure,
    UnreadableError,
    discover_projections,
    structures,
)
from attnmonitor.functional.interaction import interaction_spectrum
from attnmonitor.functional.precision import full_precision
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.quiet import default_torch_state, quiet
from attnmonitor.messages import error_text
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.parallel.collectives import no_collectives
from attnmonitor.sample import LayerCoverage

__all__ = ["WeightMeasurement"]

_SHARED = "the model is spread over processes, and outside of a forward none of them has the whole weights of a layer"


class WeightMeasurement:
    """Measures the metrics of the weights of every head, from the model's current weights.

    Args:
        model: The unwrapped model.
        probe: The batch that the projections are found with.
        layers: Coverage of the layers that have heads.
        metrics: Names out of `attnmonitor.metrics.catalog.WEIGHT_METRICS`.
        with_others: Whether a forward of the model needs other processes.

    Attributes:
        reasons: Reason for each layer whose projections were not found, or could not be read the last time.
        notes: What is left out of the weights of a layer, for those of which something is.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        layers: Mapping[str, LayerCoverage],
        metrics: Sequence[str],
        *,
        with_others: bool = False,
    ) -> None:
        self._model = model
        self._probe = probe
        self._num_heads = {name: layer.num_query_heads for name, layer in layers.items() if layer.num_query_heads}
        self._metrics = tuple(metrics)
        self._with_others = with_others
        self._found: dict[str, HeadProjections | str] = {}
        self._structures: Mapping[str, Structure] = {}
        self.reasons: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self._find()

    def take(self, energy_rank: Mapping[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
        """Measure the weights as they are now.

        Args:
            energy_rank: The effective rank of each layer's energy fields, ``(Hq,)`` on the host, for the spectral gap.

        Returns:
            ``values[metric][layer]``: float32 ``(Hq,)`` on the host.
        """
        values: dict[str, dict[str, Tensor]] = {metric: {} for metric in self._metrics}
        self._find()
        with quiet(self._model), self._probe.without_hooks(self._model):
            for name, num_heads in self._num_heads.items():
                by_metric: Mapping[str, Tensor] = {}
                try:
                    by_metric = self._measured(name, None if energy_rank is None else energy_rank[name])
                except Exception as error:
                    self.reasons[name] = _reason(error)
                for metric in self._metrics:
                    nothing = torch.full((num_heads,), torch.nan, device="cpu")
                    values[metric][name] = by_metric.get(metric, nothing)
        return values

    def _find(self) -> None:
        """Find the projections of the layers whose structure has changed since they were last found."""
        if self._with_others:
            self._found = dict.fromkeys(self._num_heads, _SHARED)
        else:
            now = structures(self._model, {name.partition("#")[0] for name in self._num_heads})
            before, self._structures = self._structures, now
            of_layer = {name: name.partition("#")[0] for name in self._num_heads}
            changed = [name for name, own in of_layer.items() if own not in before or before[own] != now[own]]
            if changed:
                self._found |= self._discovered(changed)
        self.reasons = {name: found for name, found in self._found.items() if isinstance(found, str)}
        self.notes = {
            name: found.note for name, found in self._found.items() if not isinstance(found, str) and found.note
        }

    def _discovered(self, names: Sequence[str]) -> Mapping[str, HeadProjections | str]:
        # In a context of its own: its forwards move the ranges of observers, which the weights are then read with.
        try:
            with quiet(self._model), self._probe.without_hooks(self._model), no_collectives(self._model):
                return discover_projections(self._model, lambda: self._probe.run(self._model), names)
        except Exception as error:
            return dict.fromkeys(names, f"the forward that looks for its projections failed: {error_text(error)}")

    def _measured(self, name: str, energy_rank: Tensor | None) -> Mapping[str, Tensor]:
        """Return the metrics of one layer, each ``(Hq,)`` on the host; none where its projections are not known."""
        projections = self._found[name]
        if isinstance(projections, str):
            return {}
        tensors = (*self._model.parameters(), *self._model.buffers())
        device = next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
        with full_precision(device), no_collectives(self._model):
            w_q, w_k = projections.read()
            with default_torch_state():
                if len(w_q) != self._num_heads[name]:
                    raise UnreadableError(
                        f"{self._num_heads[name]} query heads at attach, {len(w_q)} now: attach again"
                    )
                w_k = w_k.repeat_interleave(len(w_q) // len(w_k), dim=0)
                rank = None if energy_rank is None else energy_rank.to(w_q.device)
                spectrum = interaction_spectrum(w_q, w_k, energy_rank=rank)
                return {metric: METRICS[metric].formula(spectrum).float().cpu() for metric in self._metrics}


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UnreadableError) else f"its weights were not measured: {error_text(error)}"
