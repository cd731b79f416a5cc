"""The rules a monitor watches by unless it is told otherwise, one fault kind each.

Natural logarithms throughout. The levels were chosen on the development runs of ``benchmarks/collapse.py`` and reported
once on others; ``docs/alerts.md`` has the tables. Nothing here looks at entropy, energy rank, sink mass or a largest
logit: healthy heads reach the extremes of all of them.
"""

from __future__ import annotations

from attnmonitor.alerts.rules import AllOf, AnyOf, FiringShare, Rule, Threshold

__all__ = ["DEFAULT_RULES"]

DEFAULT_RULES: tuple[Rule, ...] = (
    # A head's energy is not finite when its queries or its keys are not; one rule, so that one source is named.
    Rule(
        "non_finite",
        "non_finite",
        "query_head",
        Threshold("energy_rms", "non_finite", fire_above=0.5, clear_below=0.5),
        patience=1,
        grace=0,
        hold=0,
        source_only=True,
    ),
    # When every head is hit at once, the source cannot be told.
    Rule(
        "non_finite_run",
        "non_finite",
        "run",
        Threshold("energy_rms", "non_finite", fire_above=0.5, clear_below=0.5, quantile=0.0),
        patience=1,
        grace=0,
        hold=0,
    ),
    Rule(
        "energy_hot",
        "logit_blowup",
        "query_head",
        AllOf(
            Threshold("energy_rms", "contrast", fire_above=1.4, clear_below=0.7),
            Threshold("energy_rms", "value", fire_above=1.8, clear_below=1.4),
        ),
    ),
    Rule(
        "energy_cold",
        "dead_head",
        "query_head",
        Threshold("energy_rms", "change", fire_below=-0.92, clear_above=-0.5),
    ),
    Rule("query_faded", "dead_head", "query_head", Threshold("query_rms", "change", fire_below=-0.6, clear_above=-0.3)),
    Rule("key_faded", "dead_head", "kv_head", Threshold("key_rms", "change", fire_below=-0.6, clear_above=-0.3)),
    Rule(
        "key_sink",
        "key_sink",
        "kv_head",
        AnyOf(
            Threshold("key_leverage_max", "contrast", "log_slack", fire_below=-1.0, clear_above=-0.5),
            AllOf(
                Threshold("key_incoherence", "change", fire_above=1.1, clear_below=0.6),
                Threshold("key_incoherence", "contrast", fire_above=0.9, clear_below=0.5),
            ),
        ),
    ),
    Rule(
        "key_rank",
        "rank_collapse",
        "kv_head",
        Threshold("key_participation_ratio", "contrast", "log_excess", fire_below=-2.3, clear_above=-1.2),
    ),
    Rule(
        "learned_rank",
        "rank_collapse",
        "query_head",
        Threshold("interaction_participation_ratio", "contrast", "log_excess", fire_below=-3.3, clear_above=-1.6),
        optional=True,
    ),
    Rule(
        "broken_start",
        "broken_start",
        "run",
        AnyOf(
            Threshold("energy_rms", "value", "identity", fire_above=9.0, clear_below=7.0, quantile=0.9),
            Threshold("key_norm_participation", "value", "identity", fire_below=0.5, clear_above=0.6, quantile=0.5),
        ),
        grace=0,
        until=20,
    ),
    Rule("mass", "mass", "run", FiringShare(), patience=1, grace=0),
)
