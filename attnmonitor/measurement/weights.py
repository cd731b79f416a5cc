"""Metrics of each head's weights: the rank of W_Qᵀ W_K, beside the rank of its energy field on the probe.

Weights change slowly and reading them costs more than a sample, so this has a schedule of its own. The projections are
found once, in a few forwards, by their effect; a layer whose projections cannot be found is NaN, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attnmonitor.capture.projections import HeadProjections, discover_projections
from attnmonitor.functional.interaction import interaction_spectrum
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.quiet import quiet
from attnmonitor.metrics.catalog import METRICS
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
        reasons: Reason for each layer whose projections were not found.
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
        self._num_heads = {name: layer.num_query_heads for name, layer in layers.items() if layer.num_query_heads}
        self._metrics = tuple(metrics)
        found: Mapping[str, HeadProjections | str] = dict.fromkeys(self._num_heads, _SHARED)
        if not with_others:
            with quiet(model):
                found = discover_projections(model, lambda: probe.run(model), list(self._num_heads))
        self._projections = {name: one for name, one in found.items() if isinstance(one, HeadProjections)}
        self.reasons = {name: one for name, one in found.items() if isinstance(one, str)}

    def take(self, energy_rank: Mapping[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
        """Measure the weights as they are now.

        Args:
            energy_rank: The effective rank of each layer's energy fields, ``(Hq,)`` on the host, for the spectral gap.

        Returns:
            ``values[metric][layer]``: float32 ``(Hq,)`` on the host.
        """
        values: dict[str, dict[str, Tensor]] = {metric: {} for metric in self._metrics}
        for name, num_heads in self._num_heads.items():
            projections = self._projections.get(name)
            if projections is None:
                for metric in self._metrics:
                    values[metric][name] = torch.full((num_heads,), torch.nan)
                continue
            w_q, w_k = projections.w_q, projections.w_k
            w_k = w_k.repeat_interleave(len(w_q) // len(w_k), dim=0)
            rank = None if energy_rank is None else energy_rank[name].to(w_q.device)
            spectrum = interaction_spectrum(w_q, w_k, energy_rank=rank)
            for metric in self._metrics:
                values[metric][name] = METRICS[metric].formula(spectrum).float().cpu()
        return values
