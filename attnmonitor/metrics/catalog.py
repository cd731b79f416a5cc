"""The table of metrics: each metric's name, what it belongs to, its formula, and what it means.

Everything that names a metric (the measurement, the torchmetrics classes, the record, alerts, charts, W&B keys, the
report) reads it here, so a metric has one formula, one name and one wording everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnmonitor.functional import attention, energy, interaction, keys, queries, values
from attnmonitor.functional.row_statistics import CHECKED_STATISTICS
from attnmonitor.functional.spectrum import EnergySpectrum
from attnmonitor.functional.summaries import Summary
from attnmonitor.messages import did_you_mean
from attnmonitor.sample import LayerCoverage, Scope, scope_noun

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "OPT_IN_METRICS",
    "WEIGHT_METRICS",
    "MetricInfo",
    "check_metric_names",
    "head_noun",
    "is_log",
    "metric_scope",
    "metric_title",
    "metric_unit",
]


@dataclass(frozen=True)
class MetricInfo:
    """What a metric is called, which heads it has a value for, and how to read it.

    Attributes:
        name: The key used in the API, the record, W&B and the report.
        scope: ``"query_head"`` or ``"kv_head"``: what the index into its values counts.
        unit: Unit of a value; ``"1"`` where it has none.
        meaning: One sentence for a reader of a chart.
        summary: The summary of a layer that it is computed from; see `attnmonitor.functional.summaries`. Metrics of
            ``"rows"`` need rows of the L×L matrix, metrics of the ``"weights"`` have a schedule of their own.
        formula: Its value from that summary: ``(B, H)``, or one value per row from ``"rows"``, or ``(H,)`` from
            ``"weights"``. From ``"checked_rows"`` a statistic that also says which sequences have a value.
        log_scale: Whether differences are read as ratios, so that charts use a logarithmic axis.
        opt_in: Whether it is measured only where it is asked for by name.
        scale_free: Whether scaling queries and keys leaves it unchanged, so that random heads give a value to compare
            a curve with.
        head_curves: Whether trackers get a curve of every head, also where their number is limited; otherwise the heads
            of a large model are in the charts and the record only.
    """

    name: str
    scope: Scope
    unit: str
    meaning: str
    summary: Summary
    formula: Callable[[Any], Tensor]
    log_scale: bool = False
    opt_in: bool = False
    scale_free: bool = False
    head_curves: bool = True


_TABLE = (
    MetricInfo(
        "energy_effective_rank",
        "query_head",
        "components",
        "Fewest singular components that hold 90 % of the variance (σ²) of the energy field.",
        "energy_spectrum",
        EnergySpectrum.effective_rank,
        scale_free=True,
    ),
    MetricInfo(
        "energy_participation_ratio",
        "query_head",
        "components",
        "Smooth effective rank of the energy field, (Σσ²)² / Σσ⁴.",
        "field_moments",
        lambda moments: moments.participation_ratio,
        log_scale=True,
        scale_free=True,
    ),
    MetricInfo(
        "energy_stable_rank",
        "query_head",
        "components",
        "Total energy over the energy of the leading component, Σσ² / σ₁².",
        "energy_spectrum",
        lambda spectrum: spectrum.stable_rank,
        log_scale=True,
        scale_free=True,
        head_curves=False,
    ),
    MetricInfo(
        "energy_rms",
        "query_head",
        "logit units",
        "Root mean square of the centered logits: how sharply softmax can discriminate.",
        "field_moments",
        lambda moments: moments.energy_rms,
        log_scale=True,
    ),
    MetricInfo(
        "energy_delocalization",
        "query_head",
        "fraction of positions",
        "Share of key positions that carry the field's energy: 1 is spread evenly, 1/L is one position.",
        "energy_shares",
        energy.energy_delocalization_of,
        log_scale=True,
        scale_free=True,
    ),
    MetricInfo(
        "key_incoherence",
        "kv_head",
        "1",
        "Coherence μ of the energy-carrying key subspace: 1 is perfectly incoherent, large means few keys dominate.",
        "leading_leverage",
        keys.key_incoherence_of,
        log_scale=True,
        scale_free=True,
    ),
    MetricInfo(
        "key_rank",
        "kv_head",
        "components",
        "Fewest key directions that hold 90 % of the variance of the centered keys.",
        "key_spectrum",
        keys.key_rank_of,
        scale_free=True,
    ),
    MetricInfo(
        "key_leverage_max",
        "kv_head",
        "1",
        "Largest leverage of one key position in the full key space; near 1 one position owns a direction.",
        "leverage",
        keys.key_leverage_max_of,
        scale_free=True,
    ),
    MetricInfo(
        "key_participation_ratio",
        "kv_head",
        "components",
        "Smooth effective rank of the centered keys, (Σs²)² / Σs⁴.",
        "key_spectrum",
        keys.key_participation_ratio_of,
        log_scale=True,
        scale_free=True,
    ),
    MetricInfo(
        "key_norm_participation",
        "kv_head",
        "fraction of positions",
        "Share of key positions that carry the key norm: 1 is spread evenly, 1/L is one position.",
        "norm_shares",
        keys.key_norm_participation_of,
        log_scale=True,
        scale_free=True,
    ),
    MetricInfo(
        "query_rms",
        "query_head",
        "1",
        "Root mean square entry of the queries.",
        "queries",
        queries.query_rms_of,
        log_scale=True,
    ),
    MetricInfo(
        "key_rms",
        "kv_head",
        "1",
        "Root mean square entry of the centered keys.",
        "keys",
        keys.key_rms_of,
        log_scale=True,
    ),
    MetricInfo(
        "value_rms",
        "kv_head",
        "1",
        "Root mean square entry of the values.",
        "values",
        values.value_rms_of,
        log_scale=True,
        head_curves=False,
    ),
    MetricInfo(
        "value_spread",
        "kv_head",
        "share",
        "Share of the values' energy that differs between positions: near 0 all positions have the same value.",
        "values",
        values.value_spread_of,
        log_scale=True,
        scale_free=True,
        head_curves=False,
    ),
    MetricInfo(
        "output_rms",
        "query_head",
        "1",
        "Root mean square entry of what the head writes, before the output projection.",
        "checked_rows",
        CHECKED_STATISTICS["output_rms"],
        log_scale=True,
        head_curves=False,
    ),
    MetricInfo(
        "output_share",
        "query_head",
        "share",
        "Share of the head in what its layer writes through the output projection; 1/H where all H write as much.",
        "checked_rows",
        CHECKED_STATISTICS["output_share"],
        log_scale=True,
        head_curves=False,
    ),
    MetricInfo(
        "head_similarity",
        "query_head",
        "cosine",
        "Largest cosine of the energy field with another head's of the layer: 1 is a twin.",
        "checked_rows",
        CHECKED_STATISTICS["head_similarity"],
        scale_free=True,
        head_curves=False,
    ),
    MetricInfo(
        "attention_tau",
        "query_head",
        "ratio",
        "Spread of the logits over √(2 ln keys): from 1 on softmax condenses on a few keys, however many there are.",
        "checked_rows",
        CHECKED_STATISTICS["attention_tau"],
        log_scale=True,
        head_curves=False,
    ),
    MetricInfo(
        "key_condition_number",
        "kv_head",
        "ratio",
        "Largest over smallest singular value of the centered keys, among those above float32's noise.",
        "key_spectrum",
        keys.key_condition_number_of,
        log_scale=True,
        opt_in=True,
        scale_free=True,
    ),
    MetricInfo(
        "attention_entropy",
        "query_head",
        "nats",
        "Mean entropy of the attention rows: 0 is one key, ln(visible keys) is uniform attention.",
        "rows",
        attention.ROW_STATISTICS["attention_entropy"],
        opt_in=True,
    ),
    MetricInfo(
        "max_logit",
        "query_head",
        "logit units",
        "Largest logit that enters the softmax.",
        "rows",
        attention.ROW_STATISTICS["max_logit"],
        opt_in=True,
    ),
    MetricInfo(
        "sink_mass",
        "query_head",
        "probability",
        "Mean attention probability on position 0.",
        "rows",
        attention.ROW_STATISTICS["sink_mass"],
        opt_in=True,
    ),
    MetricInfo(
        "interaction_effective_rank",
        "query_head",
        "components",
        "Fewest components that hold 90 % of the variance of W_Qᵀ W_K: what the head has learned to tell apart.",
        "weights",
        interaction.interaction_effective_rank_of,
        opt_in=True,
    ),
    MetricInfo(
        "interaction_participation_ratio",
        "query_head",
        "components",
        "Smooth effective rank of W_Qᵀ W_K.",
        "weights",
        interaction.interaction_participation_of,
        log_scale=True,
        opt_in=True,
    ),
    MetricInfo(
        "spectral_gap",
        "query_head",
        "ratio",
        "Learned rank over energy rank: how much of what was learned the text leaves unused.",
        "weights",
        interaction.spectral_gap_of,
        log_scale=True,
        opt_in=True,
    ),
)

METRICS: dict[str, MetricInfo] = {info.name: info for info in _TABLE}
"""Every metric by name, in the order in which charts and tables show them."""

WEIGHT_METRICS: tuple[str, ...] = tuple(info.name for info in _TABLE if info.summary == "weights")
"""Metrics of the weights: they change slowly and run on a schedule of their own."""

OPT_IN_METRICS: tuple[str, ...] = tuple(info.name for info in _TABLE if info.opt_in and info.summary != "weights")
"""Measured with every sample, but only where they are asked for by name."""

DEFAULT_METRICS: tuple[str, ...] = tuple(info.name for info in _TABLE if not info.opt_in)
"""What a monitor measures by default."""


def check_metric_names(names: Iterable[str], *, argument: str = "metrics") -> tuple[str, ...]:
    """Return ``names`` as a tuple in table order, without repeats.

    Raises:
        ValueError: A name is not in `METRICS`; the message quotes it and the nearest known names.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in METRICS:
            raise ValueError(f"{argument}: unknown metric {name!r}; {did_you_mean(name, METRICS, otherwise='known:')}")
    return tuple(name for name in METRICS if name in wanted)


def metric_title(metric: str | None) -> str:
    """Name of a metric in words."""
    return "value per head" if metric is None else metric.replace("_", " ")


def metric_unit(metric: str | None) -> str:
    """Unit of a metric, empty where it has none."""
    unit = METRICS[metric].unit if metric in METRICS else "1"
    return "" if unit == "1" else unit


def head_noun(metric: str | None, coverage: Mapping[str, LayerCoverage] | None = None) -> str:
    """What a metric has one value per: a head, or a KV head where several heads may share one.

    Args:
        metric: Name of the metric.
        coverage: How the layers were captured; without it KV heads are taken to be shared.
    """
    scope, layers = metric_scope(metric), [layer for layer in (coverage or {}).values() if layer.measured]
    return max((scope_noun(scope, layer) for layer in layers), key=len, default=scope_noun(scope))


def metric_scope(metric: str | None) -> Scope | None:
    """What a metric has one value per; None for a metric that is not in the table."""
    return METRICS[metric].scope if metric in METRICS else None


def is_log(metric: str | None) -> bool:
    """Whether differences of a metric are read as ratios."""
    return metric in METRICS and METRICS[metric].log_scale
