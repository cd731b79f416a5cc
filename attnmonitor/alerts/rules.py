"""Alert rules as data.

A rule names a fault and says when a head, a layer or the run shows it: a tree of `AllOf` and `AnyOf` over `Threshold`
leaves. A threshold reads one metric, usually in logarithms, and compares it with the head's own past or with the
change of the other heads. It has two levels: one at which it fires, and one on the healthy side of it at which it
clears. Rules hold no state and no code, so they can be printed, stored as JSON, edited by hand and replayed over a
recorded run.

Letters: ``x`` is the metric as it is read (``reading``), ``base`` the median of ``x`` over the ``window`` samples that
ended ``gap`` samples ago (without the gap, a slow ramp would become part of its own baseline), ``rel = x − base``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from attnmonitor.messages import nearest, whole_argument
from attnmonitor.metrics.catalog import METRICS, check_metric_names
from attnmonitor.sample import AlarmScope

__all__ = [
    "AllOf",
    "AnyOf",
    "Condition",
    "FiringShare",
    "Reading",
    "Rule",
    "Signal",
    "Threshold",
    "check_rules",
    "leaves",
]

Signal = Literal["value", "baseline", "peers", "change", "offset", "contrast", "robust_z", "non_finite"]
Reading = Literal["identity", "log", "log_slack", "log_excess"]

GRACE = 25
"""Samples in which heads start to learn, not all at once: no head is named then, and no drift is measured from then."""


@dataclass(frozen=True)
class Threshold:
    """One signal of one metric, with the level at which it fires and the level at which it clears.

    Attributes:
        metric: Name from `attnmonitor.metrics.catalog.METRICS`.
        signal: What is compared with the levels: ``"value"`` is x; ``"baseline"`` is base; ``"peers"`` is x minus that
            of its peers in the same sample, which for a head is the 75 % quantile of its layer's other heads, and for a
            layer the largest one; ``"change"`` is rel; ``"offset"`` is x minus its median over the heads of the model,
            and ``"contrast"`` rel minus its median over them; ``"robust_z"`` is the contrast over its robust spread,
            ``1.4826 MAD + 0.1`` plus a third of that median; ``"non_finite"`` is 1 where the metric is NaN or infinite
            and 0 elsewhere.
        reading: How x is computed from the metric m: ``"identity"`` m, ``"log"`` ln m, ``"log_slack"`` ln(1 − m),
            ``"log_excess"`` ln(m − 1). Ignored by ``"non_finite"``.
        fire_above: The condition holds above this level.
        clear_below: An alarm clears below this level; at most `fire_above`.
        fire_below: For the other direction: the condition holds below this level.
        clear_above: An alarm clears above this level; at least `fire_below`.
        window: Samples in the baseline.
        gap: Samples between the baseline's end and now.
        quantile: In rules of scope ``"layer"`` and ``"run"``: the quantile over the heads that is used; between two
            heads, the one that is further from firing. In a rule about heads, with signal ``"value"`` or
            ``"baseline"``: the quantile over all heads of the model, the same for each.
        skip: Samples at the beginning of a head's past that belong to no baseline.
    """

    metric: str
    signal: Signal = "contrast"
    reading: Reading = "log"
    fire_above: float | None = None
    clear_below: float | None = None
    fire_below: float | None = None
    clear_above: float | None = None
    window: int = 15
    gap: int = 8
    quantile: float | None = None
    skip: int = 0

    def check(self, scope: AlarmScope) -> None:
        """Raise ValueError when the threshold cannot work in a rule of that scope."""
        check_metric_names([self.metric], argument="metric")
        _check_choice("signal", self.signal, get_args(Signal))
        _check_choice("reading", self.reading, get_args(Reading))
        if self.signal == "peers" and scope == "run":
            raise ValueError("signal='peers': the run has no peers; use a rule about heads or layers")
        _check_levels(self)
        _make_whole(self, "window", 1)
        _make_whole(self, "gap", 1)
        _make_whole(self, "skip", 0)
        if self.quantile is not None and not 0.0 <= self.quantile <= 1.0:
            raise ValueError(f"quantile={self.quantile!r}: must be in [0, 1]")
        if scope in ("layer", "run"):
            if self.quantile is None:
                raise ValueError(f"quantile=None: a rule of scope {scope!r} needs a quantile in [0, 1]")
        elif self.quantile is not None:
            if self.signal not in ("value", "baseline"):
                way_out = "in a rule about heads it needs signal='value' or 'baseline'"
                raise ValueError(f"quantile={self.quantile!r}: {way_out}")
        elif METRICS[self.metric].scope != scope:
            raise ValueError(f"scope={scope!r}: {self.metric} belongs to scope {METRICS[self.metric].scope!r}")

    @property
    def levels(self) -> tuple[float, float, float]:
        """Sign, firing level, clearing level: the condition holds where ``sign · signal > sign · firing level``.

        Raises:
            ValueError: The levels of one direction are not both given.
        """
        if self.fire_above is not None and self.clear_below is not None:
            return 1.0, self.fire_above, self.clear_below
        if self.fire_below is not None and self.clear_above is not None:
            return -1.0, self.fire_below, self.clear_above
        raise ValueError(f"{self.metric}: give fire_above and clear_below, or fire_below and clear_above")

    @property
    def depth(self) -> int:
        """Samples of the past it looks at."""
        return self.window + self.gap if self.has_baseline else 1

    @property
    def has_baseline(self) -> bool:
        """Whether it compares a head with its past."""
        return self.signal in ("baseline", "change") or self.compares

    @property
    def compares(self) -> bool:
        """Whether it compares heads with each other."""
        return self.signal in ("offset", "contrast", "robust_z")


@dataclass(frozen=True)
class FiringShare:
    """Many heads in many layers have an alarm: the run is at fault, not a head.

    Attributes:
        heads: Holds when at least this share of the heads (query heads or KV heads, whichever is larger), and more than
            one, is firing ...
        layers: ... and at least this share of the layers has a firing head.
        clear_heads: Clears when the share of heads is below this.
    """

    heads: float = 0.25
    layers: float = 2 / 3
    clear_heads: float = 0.1

    def check(self, scope: AlarmScope) -> None:
        """Raise ValueError when a share is invalid or the rule is not about the run."""
        if scope != "run":
            raise ValueError(f"scope={scope!r}: a share of firing heads needs a rule of scope 'run'")
        for name in ("heads", "layers", "clear_heads"):
            share = getattr(self, name)
            if not 0.0 < share <= 1.0:
                raise ValueError(f"{name}={share!r}: a share must be in (0, 1]")
        if self.clear_heads > self.heads:
            raise ValueError(f"clear_heads={self.clear_heads!r} must not exceed heads={self.heads!r}")


@dataclass(frozen=True, init=False)
class AllOf:
    """Holds when every one of its conditions holds."""

    conditions: tuple[Condition, ...]

    def __init__(self, *conditions: Condition) -> None:
        object.__setattr__(self, "conditions", conditions)


@dataclass(frozen=True, init=False)
class AnyOf:
    """Holds when at least one of its conditions holds."""

    conditions: tuple[Condition, ...]

    def __init__(self, *conditions: Condition) -> None:
        object.__setattr__(self, "conditions", conditions)


Condition = Threshold | FiringShare | AllOf | AnyOf


def leaves(condition: Condition) -> Iterator[Threshold | FiringShare]:
    """Yield the leaves of a condition in the order in which they are written."""
    if isinstance(condition, (AllOf, AnyOf)):
        for part in condition.conditions:
            yield from leaves(part)
    else:
        yield condition


@dataclass(frozen=True)
class Rule:
    """A named fault: its condition, what can have it, and how many samples it takes.

    Attributes:
        name: Unique among the rules of a run, for example ``"energy_hot"``.
        kind: Kind of fault it points to, for example ``"logit_blowup"``; rules of one kind share their advice text.
        scope: What an alarm is about: ``"query_head"``, ``"kv_head"``, ``"layer"`` or ``"run"``.
        when: The condition.
        patience: Consecutive samples in which it must be violated to fire, and recovered to clear.
        grace: Samples of a head that are needed before it may fire.
        until: No new alarm after this many samples; None for no end.
        hold: Samples after which a firing alarm becomes critical; 0 for at once.
        least_heads: Heads the contrast needs; with fewer, it falls back to the head's own past and the message says so.
        source_only: For faults that spread with the forward pass: only heads of the earliest affected layer get an
            alarm, no other head while those fire, and none at all when every head of the model is affected.
        optional: Whether the rule is skipped when its metrics are not collected; otherwise that is an error.

    Raises:
        ValueError: A field is invalid; the message names the rule, the field and what arrived.
    """

    name: str
    kind: str
    scope: AlarmScope
    when: Condition
    patience: int = 2
    grace: int = GRACE
    until: int | None = None
    hold: int = 10
    least_heads: int = 8
    source_only: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        try:
            _check_choice("scope", self.scope, get_args(AlarmScope))
            _make_whole(self, "patience", 1)
            _make_whole(self, "grace", 0)
            _make_whole(self, "hold", 0)
            _make_whole(self, "least_heads", 1)
            if self.until is not None:
                _make_whole(self, "until", 1)
            _check_tree(self.when)
            for leaf in leaves(self.when):
                leaf.check(self.scope)
            if self.source_only and self.scope not in ("query_head", "kv_head"):
                raise ValueError(f"source_only=True: only rules about heads have a source, not scope={self.scope!r}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"rule {self.name!r}: {error}") from None

    @property
    def thresholds(self) -> tuple[Threshold, ...]:
        """The thresholds of its condition, in the order in which they are written."""
        return tuple(leaf for leaf in leaves(self.when) if isinstance(leaf, Threshold))

    @property
    def metrics(self) -> frozenset[str]:
        """Names of the metrics it reads."""
        return frozenset(threshold.metric for threshold in self.thresholds)


def check_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return the rules as a tuple.

    Raises:
        TypeError: One of them is not a `Rule`.
        ValueError: Two share a name.
    """
    checked = tuple(rules)
    names = set[str]()
    for rule in checked:
        if not isinstance(rule, Rule):
            raise TypeError(f"alerts: expected Rule records, got {rule!r}; load_rules(path) reads them from a file")
        if rule.name in names:
            raise ValueError(f"rule {rule.name!r}: the name is used twice; each rule of a run needs its own name")
        names.add(rule.name)
    return checked


GROUP_KEYS: dict[type[AllOf | AnyOf], str] = {AllOf: "all_of", AnyOf: "any_of"}
"""What a group is called in files and messages."""


def _check_tree(condition: Condition) -> None:
    if isinstance(condition, (AllOf, AnyOf)):
        if not condition.conditions:
            raise ValueError(f"{GROUP_KEYS[type(condition)]} has no conditions")
        for part in condition.conditions:
            _check_tree(part)
    elif not isinstance(condition, (Threshold, FiringShare)):
        raise TypeError(f"when: expected Threshold, FiringShare, AllOf or AnyOf, got {condition!r}")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        near = nearest(value, choices)
        hint = f"did you mean {near!r}? " if near else ""
        raise ValueError(f"{name}={value!r}: {hint}choose one of {', '.join(map(repr, choices))}")


def _make_whole(owner: Threshold | Rule, name: str, least: int) -> None:
    """Make an argument that is an integer of any type, such as numpy's, an int."""
    value = getattr(owner, name)
    if (whole := whole_argument(value, least=least)) is None:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")
    object.__setattr__(owner, name, whole)


def _check_levels(threshold: Threshold) -> None:
    given = {
        name: level
        for name in ("fire_above", "clear_below", "fire_below", "clear_above")
        if (level := getattr(threshold, name)) is not None
    }
    for name, level in given.items():
        if not isinstance(level, (int, float)) or not math.isfinite(level):
            raise ValueError(f"{threshold.metric}: {name}={level!r} must be a finite number")
    sign, fire, clear = threshold.levels
    if len(given) > 2:
        raise ValueError(f"{threshold.metric}: got {given}; one threshold has one direction, AnyOf combines two")
    if sign * clear > sign * fire:
        raise ValueError(
            f"{threshold.metric}: {given}: the clearing level must equal the firing level or lie on its healthy side"
        )
