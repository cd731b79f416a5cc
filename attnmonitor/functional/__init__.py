"""Pure functions on tensors: spectra of energy fields, incoherence of keys, attention rows, learned interactions."""

from attnmonitor.functional.attention import attention_row_statistics, row_logits
from attnmonitor.functional.cores import HeadCores, head_cores
from attnmonitor.functional.energy import energy_delocalization, energy_effective_rank, energy_spectrum
from attnmonitor.functional.interaction import (
    interaction_effective_rank,
    interaction_participation_ratio,
    spectral_gap,
)
from attnmonitor.functional.keys import (
    key_incoherence,
    key_leverage_max,
    key_norm_participation,
    key_participation_ratio,
    key_rank,
    key_rms,
    leverage_scores,
)
from attnmonitor.functional.queries import QueryGram, query_gram, query_rms
from attnmonitor.functional.spectrum import EnergySpectrum
from attnmonitor.functional.statistics import HeadStatistics, head_statistics

__all__ = [
    "EnergySpectrum",
    "HeadCores",
    "HeadStatistics",
    "QueryGram",
    "attention_row_statistics",
    "energy_delocalization",
    "energy_effective_rank",
    "energy_spectrum",
    "head_cores",
    "head_statistics",
    "interaction_effective_rank",
    "interaction_participation_ratio",
    "key_incoherence",
    "key_leverage_max",
    "key_norm_participation",
    "key_participation_ratio",
    "key_rank",
    "key_rms",
    "leverage_scores",
    "query_gram",
    "query_rms",
    "row_logits",
    "spectral_gap",
]
