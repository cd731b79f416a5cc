"""Metrics of the keys, one value per key/value head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnmonitor.functional.keys import (
    key_condition_number,
    key_incoherence,
    key_leverage_max,
    key_norm_participation,
    key_participation_ratio,
    key_rank,
    key_rms,
)
from attnmonitor.functional.ranks import check_fraction
from attnmonitor.metrics.base import HeadMetric

__all__ = [
    "KeyConditionNumber",
    "KeyIncoherence",
    "KeyLeverageMax",
    "KeyNormParticipation",
    "KeyParticipationRatio",
    "KeyRMS",
    "KeyRank",
]


class _KeyMetric(HeadMetric):
    """A statistic of the centered keys."""

    def update(self, key: Tensor, mask: Tensor | None = None) -> None:
        """Add the key heads of one layer: key ``(B, Hkv, L, d)``, mask ``(B, L)`` True where valid."""
        self.accumulate(self._statistic(key, mask))

    def _statistic(self, key: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError


class _EnergyCutMetric(_KeyMetric):
    """A statistic of the subspace that carries a fraction of the key energy.

    Args:
        num_heads: KV heads.
        energy: The fraction, in (0, 1].
        kwargs: Passed on to `torchmetrics.Metric`.

    Raises:
        ValueError: ``num_heads`` is less than 1, or ``energy`` is not in (0, 1].
    """

    def __init__(self, num_heads: int, *, energy: float = 0.9, **kwargs: Any) -> None:
        check_fraction("energy", energy)
        super().__init__(num_heads, setting=(energy,), **kwargs)
        self.energy = energy


class KeyIncoherence(_EnergyCutMetric):
    """Coherence μ of the energy-carrying key subspace."""

    name = "key_incoherence"

    def _statistic(self, key: Tensor, mask: Tensor | None) -> Tensor:
        return key_incoherence(key, mask=mask, energy=self.energy)


class KeyRank(_EnergyCutMetric):
    """Fewest key directions that hold ``energy`` of the variance of the centered keys."""

    name = "key_rank"

    def _statistic(self, key: Tensor, mask: Tensor | None) -> Tensor:
        return key_rank(key, mask=mask, energy=self.energy)


class KeyLeverageMax(_KeyMetric):
    """Largest leverage of one key position in the full key space."""

    name = "key_leverage_max"

    def _statistic(self, key: Tensor, mask: Tensor | None) -> Tensor:
        return key_leverage_max(key, mask=mask)


class KeyParticipationRatio(_KeyMetric):
    """Smooth effective rank of the centered keys, (Σs²)² / Σs⁴."""

    name = "key_participation_ratio"

    def _statistic(self, key: Tensor, mask: Tensor | None) -> Tensor:
        return key_participation_ratio(key, mask=mask)


class KeyConditionNumber(_KeyMetric):
    """Largest over smallest singular value of the centered keys above float32's noise."""

    name = "key_condition_number"

    def _statistic(self, key: Tensor, mask: Tensor | None) -> Tensor:
        return key_condition_number(key, mask=mask)


class KeyNormParticipation(_KeyMetric):
    """Fraction of key positions that carry the key norm."""

    name = "key_norm_participation"

    def _statistic(self, key: Tensor, mask: Tensor | None) -> Tensor:
        return key_norm_participation(key, mask=mask)


class KeyRMS(_KeyMetric):
    """Root mean square entry of the centered keys."""

    name = "key_rms"

    def _statistic(self, key: Tensor, mask: Tensor | None) -> Tensor:
        return key_rms(key, mask=mask)
