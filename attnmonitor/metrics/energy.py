"""Metrics of the energy field, one value per query head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnmonitor.functional.energy import Per, energy_delocalization, energy_spectrum
from attnmonitor.functional.queries import query_rms
from attnmonitor.functional.ranks import check_fraction
from attnmonitor.functional.spectrum import EnergySpectrum, Method
from attnmonitor.metrics.base import HeadMetric

__all__ = [
    "EnergyDelocalization",
    "EnergyEffectiveRank",
    "EnergyParticipationRatio",
    "EnergyRMS",
    "EnergyStableRank",
    "QueryRMS",
]


class _SpectrumMetric(HeadMetric):
    """A statistic of the field's spectrum.

    Args:
        num_heads: Query heads, or KV heads where ``per`` says so.
        scale: Softmax scale; ``d ** -0.5`` by default.
        per: As in `energy_spectrum`.
        method: As in `energy_spectrum`.
        setting: As in `HeadMetric`.
        kwargs: Passed on to `torchmetrics.Metric`.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        scale: float | None = None,
        per: Per = "query_head",
        method: Method = "auto",
        setting: tuple[object, ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, setting=(*setting, scale, per, method), **kwargs)
        self.scale, self.per, self.method = scale, per, method

    def update(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> None:
        """Add the heads of one layer; see `energy_spectrum` for the shapes."""
        spectrum = energy_spectrum(query, key, scale=self.scale, mask=mask, per=self.per, method=self.method)
        self.accumulate(self._statistic(spectrum))

    def _statistic(self, spectrum: EnergySpectrum) -> Tensor:
        raise NotImplementedError


class EnergyEffectiveRank(_SpectrumMetric):
    """Fewest singular components that hold ``fraction`` of the variance (σ²) of the energy field.

    Args:
        num_heads: Query heads, or KV heads where ``per`` says so.
        fraction: In (0, 1].
        kwargs: ``scale``, ``per`` and ``method`` as in `energy_spectrum`; others go to `torchmetrics.Metric`.

    Raises:
        ValueError: ``num_heads`` is less than 1, or ``fraction`` is not in (0, 1].
    """

    name = "energy_effective_rank"

    def __init__(self, num_heads: int, *, fraction: float = 0.9, **kwargs: Any) -> None:
        check_fraction("fraction", fraction)
        super().__init__(num_heads, setting=(fraction,), **kwargs)
        self.fraction = fraction

    def _statistic(self, spectrum: EnergySpectrum) -> Tensor:
        return spectrum.effective_rank(self.fraction)


class EnergyParticipationRatio(_SpectrumMetric):
    """Smooth effective rank of the energy field, (Σσ²)² / Σσ⁴."""

    name = "energy_participation_ratio"

    def _statistic(self, spectrum: EnergySpectrum) -> Tensor:
        return spectrum.participation_ratio


class EnergyStableRank(_SpectrumMetric):
    """Total energy over the energy of the leading component, Σσ² / σ₁²."""

    name = "energy_stable_rank"

    def _statistic(self, spectrum: EnergySpectrum) -> Tensor:
        return spectrum.stable_rank


class EnergyRMS(_SpectrumMetric):
    """Root mean square of the centered logits, in logit units."""

    name = "energy_rms"

    def _statistic(self, spectrum: EnergySpectrum) -> Tensor:
        return spectrum.energy_rms


class EnergyDelocalization(HeadMetric):
    """Fraction of key positions that carry the field's energy."""

    name = "energy_delocalization"

    def update(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> None:
        """Add the heads of one layer; see `energy_delocalization` for the shapes."""
        self.accumulate(energy_delocalization(query, key, mask=mask))


class QueryRMS(HeadMetric):
    """Root mean square entry of the queries."""

    name = "query_rms"

    def update(self, query: Tensor, mask: Tensor | None = None) -> None:
        """Add the heads of one layer: query ``(B, Hq, L, d)``, mask ``(B, L)``."""
        self.accumulate(query_rms(query, mask=mask))
