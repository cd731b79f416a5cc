"""Notifications for people: one per fault and sample, however many heads it names.

Several rules may see one fault. What they say about a head goes into the notifications of the rule that was first
there, under one title and with one advice, so that one fault is one thread. The title is always the same, because
services limit how often one title is sent. The text says which head, which value, since when, what that usually means
and what to try.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from attnmonitor.alerts.firing import course_text
from attnmonitor.messages import printable
from attnmonitor.sample import AlertEvent, HeadEvidence, LayerCoverage, head_name

__all__ = ["ADVICE", "Advice", "Notification", "log_events", "notifications_of"]

_logger = logging.getLogger(__name__)

Level = Literal["info", "warning", "error"]

LOGGING_LEVELS: dict[Level, int] = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_Place = tuple[str | None, str, int | None]

_THOSE = "those positions"  # advice that is about the key positions which the evidence names

MAX_TITLE = 63
MAX_LINES = 8


@dataclass(frozen=True)
class Notification:
    """One message.

    Attributes:
        rule: Name of the rule.
        title: The same for every notification of a rule, under 64 characters.
        text: Several lines for a person.
        level: ``"error"`` for a critical alarm or a run at fault, ``"warning"`` for a new alarm, ``"info"`` when all of
            its alarms recovered.
    """

    rule: str
    title: str
    text: str
    level: Level


@dataclass(frozen=True)
class Advice:
    """What a kind of fault is called, what it usually means, and what to try."""

    name: str
    meaning: str
    remedy: str


ADVICE = {
    "logit_blowup": Advice(
        "attention logits blow up",
        "The head's logits grow away from those of the other heads: softmax becomes one-hot and its gradient vanishes.",
        "Lower the learning rate, add QK-norm or a logit soft-cap, or give W_Q and W_K weight decay.",
    ),
    "dead_head": Advice(
        "attention head goes dead",
        "Queries or keys shrink towards zero: the head attends uniformly, whatever its input.",
        "Look at weight decay and gradients of this head's W_Q and W_K, at a frozen or pruned slice, at a bad restore.",
    ),
    "twin_heads": Advice(
        "two heads are copies of each other",
        "The head looks where another head of its layer looks: one of the two is of no use.",
        "Look for a copied slice of W_Q and W_K: in a checkpoint that was split or restored, or at the start.",
    ),
    "silent_head": Advice(
        "attention head falls silent",
        "The head attends, but what it writes is far smaller than what the other heads of its layer write.",
        "Look at weight decay and gradients of this head's W_V and W_O, at a frozen, pruned or badly restored slice.",
    ),
    "key_sink": Advice(
        "few keys dominate",
        "A few key positions carry the key subspace, so every query must look at them.",
        "Look at the norms of those positions' keys and at outlier channels of the residual stream; try QK-norm.",
    ),
    "rank_collapse": Advice(
        "keys or tokens lose rank",
        "A head's keys lie in few directions, or a layer's tokens are alike: attention hardly tells positions apart.",
        "Lower the learning rate. Of a head look at weight decay and at the singular values of its W_K, of a layer at "
        "skip connections, norms and the scale of the embedding.",
    ),
    "non_finite": Advice(
        "values are not finite",
        "Queries or keys are NaN or infinite. Later layers take over these values.",
        "Return to the last good checkpoint, skip steps whose loss or gradient is not finite, check float16 ranges.",
    ),
    "broken_start": Advice(
        "training starts broken",
        "Most heads are far outside the range of healthy runs, usually from early on; the loss may look normal.",
        "Add warm-up, lower the learning rate, check the initial scale of the embedding, W_Q and W_K, add QK-norm.",
    ),
    "mass": Advice(
        "many heads at once: the run is at fault",
        "A large share of the heads in most layers changed at once: the cause is something they share, not one head.",
        "Look at the learning rate, the data and the optimizer at that step; return to an earlier checkpoint.",
    ),
}
"""Texts per kind of fault; a rule whose kind is not listed has notifications without advice."""


def notifications_of(
    events: Sequence[AlertEvent],
    firing: Sequence[AlertEvent] = (),
    coverage: Mapping[str, LayerCoverage] | None = None,
    evidence: Sequence[HeadEvidence] = (),
) -> list[Notification]:
    """Return one notification per fault, the run at fault first.

    Events of one head are one fault, whichever rules they come from; all faults that the same rule saw first are one
    notification. Where the run is at fault (kind ``"mass"``), new head alarms of the same sample are its symptoms: they
    are counted in its text and, unless critical, have no notification of their own.

    Args:
        events: Events of one sample.
        firing: All alarms that fire, which rules saw a fault before.
        coverage: How each layer was captured, so that query heads and the KV head they read are one head.
        evidence: Of the heads whose alarms began, so that advice about key positions names them.
    """
    is_mass = any(event.kind == "mass" and event.scope == "run" and event.state == "firing" for event in events)
    symptoms = [event for event in events if is_mass and _is_new_head_alarm(event)]
    first_of: dict[_Place, AlertEvent] = {}
    for alarm in sorted([*firing, *events], key=lambda alarm: alarm.began):
        first_of.setdefault(_place_of(alarm, coverage), alarm)
    at_alarm = {alarm.key: alarm.value for alarm in firing}
    by_rule: dict[str, list[AlertEvent]] = {}
    for event in sorted(events, key=lambda event: event.scope != "run"):
        if event not in symptoms:
            shown = replace(event, value=at_alarm.get(event.key, event.value))
            by_rule.setdefault(first_of[_place_of(event, coverage)].rule, []).append(shown)
    kinds = {alarm.rule: alarm.kind for alarm in first_of.values()}
    return [
        _notification(
            rule, kinds[rule], group, coverage, evidence, symptoms=len(symptoms) if kinds[rule] == "mass" else 0
        )
        for rule, group in by_rule.items()
    ]


def log_events(
    events: Sequence[AlertEvent],
    firing: Sequence[AlertEvent] = (),
    coverage: Mapping[str, LayerCoverage] | None = None,
    evidence: Sequence[HeadEvidence] = (),
) -> None:
    """Log each notification with Python's logging, which by default shows warnings and errors."""
    for notification in notifications_of(events, firing, coverage, evidence):
        title, text = printable(notification.title, one_line=True), printable(notification.text)
        _logger.log(LOGGING_LEVELS[notification.level], "%s\n%s", title, text)


def _place_of(alarm: AlertEvent, coverage: Mapping[str, LayerCoverage] | None) -> _Place:
    """Return what an alarm is about; of a query head, the KV head that it reads."""
    layer = (coverage or {}).get(alarm.layer or "")
    if alarm.head is None or layer is None or not layer.num_kv_heads:
        return alarm.layer, alarm.scope, alarm.head
    return alarm.layer, "kv_head", layer.kv_head_of(alarm.head) if alarm.scope == "query_head" else alarm.head


def _is_new_head_alarm(event: AlertEvent) -> bool:
    return event.scope != "run" and event.state == "firing" and event.severity == "warning"


def _notification(
    rule: str,
    kind: str,
    events: Sequence[AlertEvent],
    coverage: Mapping[str, LayerCoverage] | None,
    evidence: Sequence[HeadEvidence],
    *,
    symptoms: int,
) -> Notification:
    advice = ADVICE.get(kind)
    began = [event for event in events if event.state == "firing"]
    cleared = [event for event in events if event.state == "cleared"]
    lines = _lines(began, coverage, rest="more") + _lines(cleared, coverage, rest="more recovered")
    if symptoms:
        lines.append(f"Head alarms that began with it: {symptoms}.")
    if began and advice is not None:
        lines += [f"Usually: {advice.meaning}", f"Try: {advice.remedy}"]
        if _THOSE in advice.remedy:
            lines += _positions_lines(began, evidence)
    is_error = any(event.severity == "critical" or event.scope == "run" for event in began)
    title = f"{advice.name if advice is not None else kind} ({rule})"
    return Notification(
        rule=rule,
        title=title if len(title) <= MAX_TITLE else title[: MAX_TITLE - 3] + "...",
        text="\n".join(lines),
        level="error" if is_error else "warning" if began else "info",
    )


def _positions_lines(events: Sequence[AlertEvent], evidence: Sequence[HeadEvidence]) -> list[str]:
    """Return the leading key positions of each head, in the words of the advice."""
    found = {(each.rule, each.layer, each.scope, each.head): each for each in evidence if each.positions}
    named = {event.key[1:]: found[event.key] for event in events if event.key in found}  # each head once
    heads = list(named.values())
    return [
        printable(
            f"Those {each.positions_text()}"
            if len(heads) == 1
            else f"{each.layer} {each.noun} {each.head}, {each.positions_text()}",
            one_line=True,
        )
        for each in heads[:MAX_LINES]
    ]


def _lines(events: Sequence[AlertEvent], coverage: Mapping[str, LayerCoverage] | None, *, rest: str) -> list[str]:
    lines = [_line(event, coverage) for event in events[:MAX_LINES]]
    return lines if len(events) <= MAX_LINES else [*lines, f"... and {len(events) - MAX_LINES} {rest}"]


def _line(event: AlertEvent, coverage: Mapping[str, LayerCoverage] | None) -> str:
    has_changed = not math.isnan(event.now) and event.now != event.value
    state = "alarm"
    if event.state == "cleared":
        state = "recovered"
    elif event.severity == "critical":
        state = "still"
    elif has_changed:
        state = "worse"
    line = f"step {event.global_step}, {head_name(event, coverage=coverage)}: {state}: {event.message}"
    course = f" ({course_text(event)})" if has_changed else ""
    return printable(f"{line}, since step {event.since_step}{course}", one_line=True)
