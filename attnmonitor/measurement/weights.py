"""The learned side of each head: what W_Qᵀ W_K could tell apart, beside what the probe's text makes of it.

Weights change slowly and reading them costs more than a probe's own statistics, so this runs on a slower clock than
the samples. The projections are discovered once, by what they do in a few forwards; a layer whose projections cannot be
found is NaN, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attnmonitor.capture.projections import HeadProjections, discover_projections
from attnmonitor.functional import interaction_effective_rank, interaction_participation_ratio, spectral_gap
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.quiet import quiet
from attnmonitor.parallel.sharding import is_sharded
from attnmonitor.sample import LayerCoverage

__all__ = ["LearnedSide"]

_OF_WEIGHTS = {
    "interaction_effective_rank": interaction_effective_rank,
    "interaction_participation_ratio": interaction_participation_ratio,
}

_SHARDED = "the model's weights are spread over processes, and outside of a forward none of them has a layer's whole"


class LearnedSide:
    """Ranks of W_Qᵀ W_K of every head, read from the live weights.

    Args:
        model: The unwrapped model.
        probe: The batch that the projections are discovered with.
        layers: Coverage of the layers that have heads.
        metrics: Names out of `attnmonitor.metrics.catalog.WEIGHT_METRICS`.

    Attributes:
        reasons: For each layer whose projections were not found, why.
    """

    def __init__(
        self, model: nn.Module, probe: Probe, layers: Mapping[str, LayerCoverage], metrics: Sequence[str]
    ) -> None:
        self._num_heads = {name: layer.num_query_heads for name, layer in layers.items() if layer.num_query_heads}
        self._metrics = tuple(metrics)
        found: Mapping[str, HeadProjections | str] = dict.fromkeys(self._num_heads, _SHARDED)
        if not is_sharded(model):
            with quiet(model):
                found = discover_projections(model, lambda: probe.run(model), list(self._num_heads))
        self._projections = {name: one for name, one in found.items() if isinstance(one, HeadProjections)}
        self.reasons = {name: one for name, one in found.items() if isinstance(one, str)}

    def take(self, energy_rank: Mapping[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
        """Measure now.

        Args:
            energy_rank: The energy-field effective rank of each layer, ``(Hq,)`` on the host, for the spectral gap.

        Returns:
            ``values[metric][layer]``: float32 ``(Hq,)`` on the host.
        """
        values: dict[str, dict[str, Tensor]] = {metric: {} for metric in self._metrics}
        for name, num_heads in self._num_heads.items():
            unknown = torch.full((num_heads,), torch.nan)
            found = dict.fromkeys((*_OF_WEIGHTS, "spectral_gap"), unknown)
            if name in self._projections:
                w_q, w_k = self._projections[name].w_q, self._projections[name].w_k
                w_k = w_k.repeat_interleave(len(w_q) // len(w_k), dim=0)
                found |= {metric: rank(w_q, w_k).float().cpu() for metric, rank in _OF_WEIGHTS.items()}
                if energy_rank is not None:
                    found["spectral_gap"] = spectral_gap(found["interaction_effective_rank"], energy_rank[name])
            for metric in self._metrics:
                values[metric][name] = found[metric]
        return values
