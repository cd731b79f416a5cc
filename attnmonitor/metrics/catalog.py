"""The one table of what is measured: each metric's name, what it belongs to, and what it means.

Everything that speaks of a metric (the torchmetrics classes, the record, alerts, charts, W&B keys, the report) reads
its name, scope and wording here, so that a metric is called the same and read the same wherever it is met.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from attnmonitor.messages import did_you_mean
from attnmonitor.sample import HEAD_NOUNS, Scope

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

Source = Literal["cores", "rows", "weights"]


@dataclass(frozen=True)
class MetricInfo:
    """What a metric is called, which heads it has a value for, and how to read it.

    Attributes:
        name: The key used in the API, the record, W&B and the report.
        scope: ``"query_head"`` or ``"kv_head"``: what the index into its values counts.
        unit: Unit of a value; ``"1"`` where it has none.
        meaning: One sentence for a reader of a chart.
        log_scale: Whether differences are read as ratios, so that charts use a logarithmic axis.
        source: What it is computed from: ``"cores"``, the d×d products of queries and keys; ``"rows"`` of the L×L
            matrix; or the layer's ``"weights"``, which have a schedule of their own.
        opt_in: Whether it is measured only where it is asked for by name.
        scale_free: Whether no change in the size of queries and keys moves it, so that random heads have a value to
            hold a curve against.
    """

    name: str
    scope: Scope
    unit: str
    meaning: str
    log_scale: bool = False
    source: Source = "cores"
    opt_in: bool = False
    scale_free: bool = False


_TABLE = (
    MetricInfo(
        "energy_effective_rank",
        "query_head",
        "components",
        "Fewest singular components that hold 90 % of the variance (σ²) of the energy field.",
        scale_free=True,
    ),
    MetricInfo(
        "energy_participation_ratio",
        "query_head",
        "components",
        "Smooth effective rank of the energy field, (Σσ²)² / Σσ⁴.",
        log_scale=True,
        scale_free=True,
    ),
    MetricInfo(
        "energy_stable_rank",
        "query_head",
        "components",
        "Total energy over the energy of the leading component, Σσ² / σ₁².",
        log_scale=True,
        scale_free=True,
    ),
    MetricInfo(
        "energy_rms",
        "query_head",
        "logit units",
        "Root mean square of the centred logits: how sharply softmax can discriminate.",
        log_scale=True,
    ),
    MetricInfo(
        "energy_delocalization",
        "query_head",
        "fraction of positions",
        "Share of key positions that carry the field's energy: 1 is spread evenly, 1/L is one position.",
        log_scale=True,
        scale_free=True,
    ),
    MetricInfo(
        "key_incoherence",
        "kv_head",
        "1",
        "Coherence μ of the energy-carrying key subspace: 1 is perfectly incoherent, large means few keys rule.",
        log_scale=True,
        scale_free=True,
    ),
    MetricInfo(
        "key_rank",
        "kv_head",
        "components",
        "Fewest key directions that hold 90 % of the variance of the centred keys.",
        scale_free=True,
    ),
    MetricInfo(
        "key_leverage_max",
        "kv_head",
        "1",
        "Largest leverage of one key position in the full key space; near 1 one position owns a direction.",
        scale_free=True,
    ),
    MetricInfo(
        "key_participation_ratio",
        "kv_head",
        "components",
        "Smooth effective rank of the centred keys, (Σs²)² / Σs⁴.",
        log_scale=True,
        scale_free=True,
    ),
    MetricInfo(
        "key_norm_participation",
        "kv_head",
        "fraction of positions",
        "Share of key positions that carry the key norm: 1 is spread evenly, 1/L is one position.",
        log_scale=True,
        scale_free=True,
    ),
    MetricInfo("query_rms", "query_head", "1", "Root mean square entry of the queries.", log_scale=True),
    MetricInfo("key_rms", "kv_head", "1", "Root mean square entry of the centred keys.", log_scale=True),
    MetricInfo(
        "attention_entropy",
        "query_head",
        "nats",
        "Mean entropy of the attention rows: 0 is one key, ln(visible keys) is uniform attention.",
        source="rows",
        opt_in=True,
    ),
    MetricInfo(
        "max_logit",
        "query_head",
        "logit units",
        "Largest logit that enters the softmax.",
        source="rows",
        opt_in=True,
    ),
    MetricInfo(
        "sink_mass",
        "query_head",
        "probability",
        "Mean attention probability on position 0.",
        source="rows",
        opt_in=True,
    ),
    MetricInfo(
        "interaction_effective_rank",
        "query_head",
        "components",
        "Fewest components that hold 90 % of the variance of W_Qᵀ W_K: what the head has learned to tell apart.",
        source="weights",
        opt_in=True,
    ),
    MetricInfo(
        "interaction_participation_ratio",
        "query_head",
        "components",
        "Smooth effective rank of W_Qᵀ W_K.",
        log_scale=True,
        source="weights",
        opt_in=True,
    ),
    MetricInfo(
        "spectral_gap",
        "query_head",
        "ratio",
        "Learned rank over energy rank: how much of what was learned the text leaves unused.",
        log_scale=True,
        source="weights",
        opt_in=True,
    ),
)

METRICS: dict[str, MetricInfo] = {info.name: info for info in _TABLE}
"""Every metric by name, in the order in which charts and tables show them."""

WEIGHT_METRICS: tuple[str, ...] = tuple(info.name for info in _TABLE if info.source == "weights")
"""Metrics of the weights: they change slowly and run on a schedule of their own."""

OPT_IN_METRICS: tuple[str, ...] = tuple(info.name for info in _TABLE if info.opt_in and info.source != "weights")
"""Measured with every sample where they are asked for by name: those from rows of the L×L matrix cost time."""

DEFAULT_METRICS: tuple[str, ...] = tuple(info.name for info in _TABLE if not info.opt_in)
"""What a monitor measures when it is not told otherwise."""


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


def head_noun(metric: str | None) -> str:
    """What a metric counts: heads, or the KV heads that several of them share."""
    return HEAD_NOUNS[metric_scope(metric) or "query_head"]


def metric_scope(metric: str | None) -> Scope | None:
    """What the index into a metric's values counts; None for a metric that is not in the table."""
    return METRICS[metric].scope if metric in METRICS else None


def is_log(metric: str | None) -> bool:
    """Whether differences of a metric are read as ratios."""
    return metric in METRICS and METRICS[metric].log_scale
