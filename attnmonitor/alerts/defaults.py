"""The default rules, at least one for each fault kind.

Two facts shape them. A faulty head moves away from the other heads, so head rules ask both how far it moved (the
contrast) and how unusual that is among the heads of this model (the robust z): the first alone gives false alarms where
all heads fluctuate, the second alone where all are steady. And what hits all heads alike cancels in that comparison, so
rules about the run look at quantiles over all heads, against a short past, to fire within a few samples.

The levels were chosen on the development runs of ``benchmarks/detection`` and reported once on others; the margins
and what stays undetected are in ``docs/alerts.md``. No rule uses entropy, energy rank, sink mass or the largest logit:
healthy heads reach the extremes of all of them.
"""

from __future__ import annotations

from attnmonitor.alerts.rules import GRACE, AllOf, AnyOf, Condition, FiringShare, Reading, Rule, Signal, Threshold

__all__ = ["DEFAULT_RULES"]


OWN_SHARE = 0.25
"""Share of a contrast that a head's own change must make up."""

LEAST_ENERGY = 1.2
"""Standard deviation of the logits, in a quarter of the heads, from which fading and sinks are judged: queries and keys
drawn at random give 0.8 to 1.2. QK-normalized heads of 8 dimensions may stay below it while they learn."""

LEAST_HEADS = 6
"""From so many heads on, their median cancels what all share. With fewer there is only the head's own past."""


def _apart_from_others(
    metric: str,
    contrast: float,
    robust_z: float,
    reading: Reading = "log",
    *,
    offset: float | None = None,
    window: int = 15,
    gap: int = 8,
    skip: int = 0,
) -> AllOf:
    """A head this far from the others, in the direction of the sign; it clears half way back.

    It must have moved itself: where the others leave a head behind, the fault is theirs. With ``offset`` it must also
    have left the median head: one that comes from below and catches up has started late, one that comes down has
    settled.
    """
    levels: dict[Signal, float] = {"contrast": contrast, "robust_z": robust_z, "change": OWN_SHARE * contrast}
    if offset is not None:
        levels["offset"] = offset
    past = {"window": window, "gap": gap, "skip": skip}
    return AllOf(
        *(
            Threshold(metric, signal, reading, fire_above=level, clear_below=level / 2, **past)
            if level > 0
            else Threshold(metric, signal, reading, fire_below=level, clear_above=level / 2, **past)
            for signal, level in levels.items()
        )
    )


def _slow_drift(metric: str, contrast: float, robust_z: float, offset: float) -> AllOf:
    """The same against a longer past: the short baseline follows a drift of a few percent per sample."""
    return _apart_from_others(metric, contrast, robust_z, offset=offset, window=20, gap=40, skip=GRACE)


def _sudden_fall(reading: Reading, level: float) -> Threshold:
    """The keys of three quarters of the heads have fewer directions than some samples ago."""
    metric = "key_participation_ratio"
    return Threshold(metric, "change", reading, fire_below=level, clear_above=level / 2, window=5, gap=2, quantile=0.25)


def _logits_before(window: int, gap: int) -> Threshold:
    """Logits of half of the heads spread by more than 1/e before the change.

    Keys that hardly make a logit turn as they like.
    """
    past = {"window": window, "gap": gap}
    return Threshold("energy_rms", "baseline", "identity", fire_above=0.37, clear_below=0.0, quantile=0.5, **past)


def _zero_beside_the_model(metric: str) -> Threshold:
    """As good as zero beside the model's median head, for layers in which most heads are at fault.

    The first layer of a healthy post-norm model, which reads small embeddings, is at -7 (energy) and -4 (values).
    """
    return Threshold(metric, "offset", fire_below=-10.0, clear_above=-9.0)


def _while_heads_attend(when: Condition) -> AllOf:
    """The same, unless the logits of most heads were as small before as those of a random start.

    Then every head attended nearly uniformly, whatever its queries and keys were, and without anything to learn some
    drift or decay. What they are now does not count: a fault may make them small, drift may make them large.
    """
    sharp = Threshold("energy_rms", "baseline", "identity", fire_above=LEAST_ENERGY, clear_below=0.0, quantile=0.75)
    return AllOf(when, sharp)


LARGE_LOGITS = Threshold("energy_rms", "value", fire_above=0.0, clear_below=-0.7)
"""A head's own logits spread by more than 1: below that it attends nearly uniformly, however much it has grown."""

NON_FINITE = Threshold("energy_rms", "non_finite", fire_above=0.5, clear_below=0.5)
"""A head's energy is not finite when its queries or its keys are not: one threshold names one source."""

KEYS_GATHERED = Threshold(
    "key_norm_participation", "value", "identity", fire_below=0.25, clear_above=0.35, quantile=0.5
)
"""Few positions carry the keys. With QK-norm the keys of a young model become nearly equal for some steps, and few
positions carry what is left: a share of 0.3 is healthy then."""

DEFAULT_RULES: tuple[Rule, ...] = (
    # Three that need no past: a head may be broken from the first sample on. What is dead is far below the other heads
    # of its layer and attends uniformly, which the logits' own size says; in a young model all heads may be that small.
    Rule(
        "dead",
        "dead_head",
        "query_head",
        AnyOf(
            AllOf(
                Threshold("energy_rms", "peers", fire_below=-4.0, clear_above=-3.0),
                Threshold("energy_rms", "value", fire_below=-3.0, clear_above=-2.5),
            ),
            _zero_beside_the_model("energy_rms"),
        ),
        least_heads=LEAST_HEADS,
        patience=1,
        grace=0,
    ),
    Rule(
        "twin",
        "twin_heads",
        "query_head",
        AllOf(
            Threshold("head_similarity", "value", "identity", fire_above=0.9999, clear_below=0.999),
            Threshold("energy_rms", "value", fire_above=-3.0, clear_below=-3.5),
            # Fields of rank 1 are alike without being copies.
            Threshold("energy_participation_ratio", "value", "log_excess", fire_above=-4.6, clear_below=-5.3),
        ),
        patience=1,
        grace=0,
        optional=True,
    ),
    Rule(
        "silent_value",
        "silent_head",
        "kv_head",
        AnyOf(
            Threshold("value_rms", "peers", fire_below=-1.8, clear_above=-1.4),
            _zero_beside_the_model("value_rms"),
            # Whatever the head attends to, it reads the same, and the other heads of its layer do not.
            AllOf(
                Threshold("value_spread", "peers", fire_below=-5.0, clear_above=-4.0),
                Threshold("value_spread", "value", fire_below=-6.9, clear_above=-5.8),
            ),
        ),
        least_heads=LEAST_HEADS,
        grace=0,
        optional=True,
    ),
    Rule(
        "silent_output",
        "silent_head",
        "query_head",
        AnyOf(
            # A share is of squares. In a trained model of 135 million parameters the least head is 3.1 below its peers.
            Threshold("output_share", "peers", fire_below=-4.8, clear_above=-3.8),
            # A head that had written the most is not that far below the others when it falls by as much.
            AllOf(
                Threshold("output_share", "change", fire_below=-3.0, clear_above=-2.0),
                Threshold("output_share", "peers", fire_below=-3.0, clear_above=-2.0),
            ),
            Threshold("output_rms", "peers", fire_below=-2.2, clear_above=-1.6),
            _zero_beside_the_model("output_share"),
        ),
        least_heads=LEAST_HEADS,
        grace=0,
        optional=True,
    ),
    Rule("non_finite", "non_finite", "query_head", NON_FINITE, patience=1, grace=0, hold=0, source_only=True),
    # When every head is hit at once, the source is unknown.
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
        # Queries that grow while their keys, or their overlap with them, shrink are no blowup: the logits must follow.
        AllOf(
            AnyOf(
                AllOf(
                    _apart_from_others("query_rms", 0.55, 2.8, offset=0.2),
                    Threshold("energy_rms", fire_above=0.25, clear_below=0.1),
                ),
                AllOf(
                    _slow_drift("query_rms", 0.8, 4.0, offset=0.2),
                    Threshold("energy_rms", fire_above=0.25, clear_below=0.1, window=20, gap=40, skip=GRACE),
                ),
            ),
            LARGE_LOGITS,
        ),
        least_heads=LEAST_HEADS,
    ),
    Rule(
        "key_grown",
        "logit_blowup",
        "kv_head",
        AnyOf(_apart_from_others("key_rms", 0.6, 2.8, offset=0.2), _slow_drift("key_rms", 0.9, 4.0, offset=0.2)),
        least_heads=LEAST_HEADS,
    ),
    # Queries and keys can also align with each other at constant size; energy fluctuates more, so it needs more.
    Rule(
        "energy_hot",
        "logit_blowup",
        "query_head",
        AllOf(_apart_from_others("energy_rms", 1.3, 4.0, offset=0.2), LARGE_LOGITS),
        least_heads=LEAST_HEADS,
    ),
    Rule(
        "query_faded",
        "dead_head",
        "query_head",
        _while_heads_attend(
            AnyOf(
                _apart_from_others("query_rms", -0.42, -2.2, offset=-0.1),
                _slow_drift("query_rms", -0.95, -4.0, offset=-0.1),
            )
        ),
        least_heads=LEAST_HEADS,
    ),
    Rule(
        "key_faded",
        "dead_head",
        "kv_head",
        _while_heads_attend(
            AnyOf(
                _apart_from_others("key_rms", -0.42, -2.5, offset=-0.1),
                _slow_drift("key_rms", -0.95, -4.0, offset=-0.1),
            )
        ),
        least_heads=LEAST_HEADS,
    ),
    Rule(
        "energy_cold",
        "dead_head",
        "query_head",
        _while_heads_attend(_apart_from_others("energy_rms", -1.0, -3.5, offset=-0.1)),
        least_heads=LEAST_HEADS,
    ),
    Rule(
        "key_sink",
        "key_sink",
        "kv_head",
        _while_heads_attend(
            AnyOf(
                _apart_from_others("key_leverage_max", -0.4, -2.2, "log_slack"),
                # It jumps where the number of directions that hold 90 % of the keys changes by one.
                _apart_from_others("key_incoherence", 0.4, 4.0),
                # Each of the two fluctuates for its own reasons, a few dominant keys move both: lower levels for both.
                AllOf(
                    _apart_from_others("key_leverage_max", -0.3, -1.5, "log_slack"),
                    _apart_from_others("key_incoherence", 0.2, 1.5),
                ),
            )
        ),
        least_heads=LEAST_HEADS,
    ),
    Rule(
        "key_rank",
        "rank_collapse",
        "kv_head",
        _while_heads_attend(_apart_from_others("key_participation_ratio", -0.8, -5.0, "log_excess")),
        least_heads=LEAST_HEADS,
    ),
    # Rotary positions spread keys of rank 1 over several directions: there only the weights show the collapse.
    Rule(
        "learned_rank",
        "rank_collapse",
        "query_head",
        Threshold("interaction_participation_ratio", "contrast", "log_excess", fire_below=-3.3, clear_above=-1.6),
        least_heads=LEAST_HEADS,
        optional=True,
    ),
    # Logits that grow freeze the softmax of most heads, long before the loss tells.
    Rule(
        "logit_growth",
        "logit_blowup",
        "run",
        AnyOf(
            Threshold("attention_tau", "value", "identity", fire_above=2.0, clear_below=1.5, quantile=0.5),
            Threshold("attention_tau", "value", "identity", fire_above=6.0, clear_below=4.0, quantile=0.75),
        ),
        grace=0,
        optional=True,
    ),
    # The tokens of deep layers become one vector: whatever a head attends to, it reads the same. The keys show it too,
    # but not under rotary positions, which turn one key into many. A model that has nothing to learn comes to tell its
    # tokens apart by e^-7 only; where signals die with depth they fall below e^-9 within ten samples.
    Rule(
        "depth_collapse",
        "rank_collapse",
        "layer",
        Threshold("value_spread", "value", fire_below=-8.0, clear_above=-6.9, quantile=1.0),
        grace=0,
        optional=True,
    ),
    # Healthy heads become sharp late, while they learn. The levels below are beyond what they reach in the best
    # high-rate runs, so the rule may fire at any time and at any sampling rate.
    Rule(
        "broken_start",
        "broken_start",
        "run",
        AnyOf(
            Threshold("energy_rms", "value", "identity", fire_above=65.0, clear_below=45.0, quantile=0.75),
            AllOf(KEYS_GATHERED, _logits_before(window=15, gap=8)),
            # All heads are dead. Queries that are zero at initialization are not, from the first steps on.
            Threshold("energy_rms", "value", fire_below=-14.0, clear_above=-13.0, quantile=1.0),
        ),
        grace=0,
    ),
    # Without a past. Later, where a model has learned nothing, keys that were nearly equal part one after the other.
    Rule("keys_gathered", "broken_start", "run", KEYS_GATHERED, grace=0, until=GRACE),
    Rule(
        "tokens_alike",
        "broken_start",
        "run",
        Threshold("value_spread", "value", fire_below=-8.0, clear_above=-6.9, quantile=0.25),
        grace=0,
        optional=True,
    ),
    # Sharp before anything was learned: only in the first two samples.
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
            AllOf(
                Threshold("energy_rms", "change", fire_above=0.55, clear_below=0.3, window=5, gap=2, quantile=0.75),
                # Heads that learn at once grow too. ln 4: where the softmax of 3,000 Gaussian logits freezes.
                Threshold("energy_rms", "value", fire_above=1.39, clear_below=1.1, quantile=0.75),
            ),
            # Near 1 the excess changes by much where the ratio hardly does.
            AllOf(_sudden_fall("log_excess", -0.4), _sudden_fall("log", -0.25), _logits_before(window=5, gap=2)),
        ),
    ),
    # Head alarms have had their patience and grace already.
    Rule("mass", "mass", "run", FiringShare(), patience=1, grace=0),
)
