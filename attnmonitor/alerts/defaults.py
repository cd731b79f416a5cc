"""The rules a monitor watches by unless it is told otherwise, one fault kind each.

Two facts shape them. A head at fault leaves the other heads, so head rules ask both how far it went (the contrast) and
how unusual that is among the heads of this model (its robust z): the first alone is loud where all heads are restless,
the second alone is loud where all are quiet. And whatever hits all heads alike cancels in that comparison, so rules
about the run look at quantiles over all heads, against a short past: at once means within a few samples.

The levels were chosen on the development runs of ``benchmarks/detection`` and reported once on others; the margins
and what stays undetected are in ``docs/alert-evaluation.md``. Nothing here looks at entropy, energy rank, sink mass or
a largest logit: healthy heads reach the extremes of all of them.
"""

from __future__ import annotations

from attnmonitor.alerts.rules import AllOf, AnyOf, FiringShare, Reading, Rule, Signal, Threshold

__all__ = ["DEFAULT_RULES"]


def _left_the_others(
    metric: str, contrast: float, robust_z: float, reading: Reading = "log", *, window: int = 15, gap: int = 8
) -> AllOf:
    """A head that went this far from the others, in the direction of the sign; half way back is healthy again."""
    levels: dict[Signal, float] = {"contrast": contrast, "robust_z": robust_z}
    return AllOf(
        *(
            Threshold(metric, signal, reading, fire_above=level, clear_below=level / 2, window=window, gap=gap)
            if level > 0
            else Threshold(metric, signal, reading, fire_below=level, clear_above=level / 2, window=window, gap=gap)
            for signal, level in levels.items()
        )
    )


def _drifted_away(metric: str, contrast: float, robust_z: float) -> AllOf:
    """The same against a long past: a drift of a few percent per sample takes its short baseline along."""
    return _left_the_others(metric, contrast, robust_z, window=20, gap=40)


NON_FINITE = Threshold("energy_rms", "non_finite", fire_above=0.5, clear_below=0.5)
"""A head's energy is not finite when its queries or its keys are not; one threshold, so that one source is named."""

DEFAULT_RULES: tuple[Rule, ...] = (
    Rule("non_finite", "non_finite", "query_head", NON_FINITE, patience=1, grace=0, hold=0, source_only=True),
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
        "query_grown",
        "logit_blowup",
        "query_head",
        AnyOf(_left_the_others("query_rms", 0.55, 2.8), _drifted_away("query_rms", 0.8, 4.0)),
    ),
    Rule(
        "key_grown",
        "logit_blowup",
        "kv_head",
        AnyOf(_left_the_others("key_rms", 0.6, 2.8), _drifted_away("key_rms", 0.9, 4.0)),
    ),
    # Queries and keys can also turn towards each other, at a size that stays; energy is restless, so it needs more.
    Rule("energy_hot", "logit_blowup", "query_head", _left_the_others("energy_rms", 1.3, 4.0)),
    Rule(
        "query_faded",
        "dead_head",
        "query_head",
        AnyOf(_left_the_others("query_rms", -0.42, -2.2), _drifted_away("query_rms", -0.95, -4.0)),
    ),
    Rule(
        "key_faded",
        "dead_head",
        "kv_head",
        AnyOf(_left_the_others("key_rms", -0.42, -2.5), _drifted_away("key_rms", -0.95, -4.0)),
    ),
    Rule("energy_cold", "dead_head", "query_head", _left_the_others("energy_rms", -1.0, -3.5)),
    Rule(
        "key_sink",
        "key_sink",
        "kv_head",
        AnyOf(
            _left_the_others("key_leverage_max", -0.4, -2.2, "log_slack"),
            _left_the_others("key_incoherence", 0.4, 3.2),
        ),
    ),
    # Each is restless for reasons of its own; a few keys that take over move both. Two witnesses in one sample stand
    # for one witness in two samples, at lower levels and a sample earlier.
    Rule(
        "key_takeover",
        "key_sink",
        "kv_head",
        AllOf(
            _left_the_others("key_leverage_max", -0.3, -1.5, "log_slack"),
            _left_the_others("key_incoherence", 0.2, 1.5),
        ),
        patience=1,
    ),
    Rule("key_rank", "rank_collapse", "kv_head", _left_the_others("key_participation_ratio", -0.8, -5.0, "log_excess")),
    # Rotary positions spread keys of rank 1 over several directions: there only the weights show the collapse.
    Rule(
        "learned_rank",
        "rank_collapse",
        "query_head",
        Threshold("interaction_participation_ratio", "contrast", "log_excess", fire_below=-3.3, clear_above=-1.6),
        optional=True,
    ),
    # Healthy heads earn their sharpness: the levels below are beyond what they reach late in the best high-rate runs,
    # so that they need no window in which to hold, whatever the pace of sampling.
    Rule(
        "broken_start",
        "broken_start",
        "run",
        AnyOf(
            Threshold("energy_rms", "value", "identity", fire_above=65.0, clear_below=45.0, quantile=0.75),
            Threshold("key_norm_participation", "value", "identity", fire_below=0.4, clear_above=0.5, quantile=0.5),
        ),
        grace=0,
    ),
    # Sharp before anything was learned: a matter of the first two samples.
    Rule(
        "hot_start",
        "broken_start",
        "run",
        Threshold("energy_rms", "value", "identity", fire_above=20.0, clear_below=15.0, quantile=0.9),
        grace=0,
        until=2,
    ),
    Rule(
        "mass_shift",
        "mass",
        "run",
        AnyOf(
            Threshold("energy_rms", "change", fire_above=0.55, clear_below=0.3, window=5, gap=2, quantile=0.75),
            Threshold(
                "key_participation_ratio",
                "change",
                "log_excess",
                fire_below=-0.4,
                clear_above=-0.2,
                window=5,
                gap=2,
                quantile=0.25,
            ),
        ),
    ),
    # Head alarms have been patient already.
    Rule("mass", "mass", "run", FiringShare(), patience=1, grace=0),
)
