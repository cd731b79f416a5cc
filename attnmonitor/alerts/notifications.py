"""Notifications for people: one per sample and rule, however many heads it names.

All notifications of a rule have the same title, because services limit how often one title is sent. The text says which
head, which value, since when, what that usually means and what to try.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from attnmonitor.messages import printable
from attnmonitor.sample import AlertEvent, head_name

__all__ = ["ADVICE", "Advice", "Notification", "log_events", "notifications_of"]

_logger = logging.getLogger(__name__)

Level = Literal["info", "warning", "error"]

LOGGING_LEVELS: dict[Level, int] = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
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
        "keys lose rank",
        "The keys lie in few directions, so the head can hardly distinguish positions.",
        "Lower the learning rate, and look at weight decay and at the singular values of this head's W_K.",
    ),
    "non_finite": Advice(
        "values are not finite",
        "Queries or keys are NaN or infinite. Later layers take over these values.",
        "Return to the last good checkpoint, skip steps whose loss or gradient is not finite, check float16 ranges.",
    ),
    "broken_start": Advice(
        "training starts broken",
        "Most heads are far outside the range of healthy runs, usually from early on; the loss may look normal.",
        "Add warm-up, lower the learning rate, check the initial scale of W_Q and W_K, add QK-norm.",
    ),
    "mass": Advice(
        "many heads at once: the run is at fault",
        "A large share of the heads in most layers changed at once: the cause is something they share, not one head.",
        "Look at the learning rate, the data and the optimizer at that step; return to an earlier checkpoint.",
    ),
}
"""Texts per kind of fault; a rule whose kind is not listed has notifications without advice."""


def notifications_of(events: Sequence[AlertEvent]) -> list[Notification]:
    """Return one notification per rule that has events, the run at fault first.

    Where the run is at fault (kind ``"mass"``), new head alarms of the same sample are its symptoms: they are counted
    in its text and, unless critical, have no notification of their own.

    Args:
        events: Events of one sample.
    """
    is_mass = any(event.kind == "mass" and event.scope == "run" and event.state == "firing" for event in events)
    symptoms = [event for event in events if is_mass and _is_new_head_alarm(event)]
    by_rule: dict[str, list[AlertEvent]] = {}
    for event in sorted(events, key=lambda event: event.scope != "run"):
        if event not in symptoms:
            by_rule.setdefault(event.rule, []).append(event)
    return [
        _notification(rule, group, symptoms=len(symptoms) if group[0].kind == "mass" else 0)
        for rule, group in by_rule.items()
    ]


def log_events(events: Sequence[AlertEvent]) -> None:
    """Log each notification with Python's logging, which by default shows warnings and errors."""
    for notification in notifications_of(events):
        title, text = printable(notification.title, one_line=True), printable(notification.text)
        _logger.log(LOGGING_LEVELS[notification.level], "%s\n%s", title, text)


def _is_new_head_alarm(event: AlertEvent) -> bool:
    return event.scope != "run" and event.state == "firing" and event.severity == "warning"


def _notification(rule: str, events: Sequence[AlertEvent], *, symptoms: int) -> Notification:
    advice = ADVICE.get(events[0].kind)
    began = [event for event in events if event.state == "firing"]
    cleared = [event for event in events if event.state == "cleared"]
    lines = _lines(began, rest="more") + _lines(cleared, rest="more recovered")
    if symptoms:
        lines.append(f"Head alarms that began with it: {symptoms}.")
    if began and advice is not None:
        lines += [f"Usually: {advice.meaning}", f"Try: {advice.remedy}"]
    is_error = any(event.severity == "critical" or event.scope == "run" for event in began)
    title = f"{advice.name if advice is not None else events[0].kind} ({rule})"
    return Notification(
        rule=rule,
        title=title if len(title) <= MAX_TITLE else title[: MAX_TITLE - 3] + "...",
        text="\n".join(lines),
        level="error" if is_error else "warning" if began else "info",
    )


def _lines(events: Sequence[AlertEvent], *, rest: str) -> list[str]:
    lines = [_line(event) for event in events[:MAX_LINES]]
    return lines if len(events) <= MAX_LINES else [*lines, f"... and {len(events) - MAX_LINES} {rest}"]


def _line(event: AlertEvent) -> str:
    state = "recovered" if event.state == "cleared" else "still" if event.severity == "critical" else "alarm"
    line = f"step {event.global_step}, {head_name(event)}: {state}: {event.message}, since step {event.since_step}"
    return printable(line, one_line=True)
