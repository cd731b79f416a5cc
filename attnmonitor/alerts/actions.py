"""What happens when an alert begins: stop training, save a checkpoint, or call a function of the user.

Only the training loop can stop a run, and it must do so on all ranks in the same step. So "stop" and "checkpoint" are
requests: the process that measures decides on them, they travel with the sample, and the adapters carry them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from attnmonitor.alerts.rules import Rule
from attnmonitor.messages import nearest
from attnmonitor.sample import AlertEvent, Sample

__all__ = ["Action", "Actions", "action_name", "calls_of", "check_actions", "requests_of"]

ActionFunction = Callable[[AlertEvent, Sample], object]
Action = Literal["stop", "checkpoint"] | ActionFunction
Actions = Mapping[str, tuple[Action, ...]]

REQUESTS = ("stop", "checkpoint")


def check_actions(actions: Mapping[str, Action | Sequence[Action]], rules: Iterable[Rule]) -> Actions:
    """Return the actions as tuples.

    Raises:
        ValueError: A key is not a rule, a fault kind or ``"critical"``, or an action is neither a request nor callable.
    """
    if not isinstance(actions, Mapping):
        way_out = "give what to do for each rule, fault kind or 'critical': actions={'critical': 'stop'}"
        raise ValueError(f"actions={actions!r:.80} is not a mapping; {way_out}")
    rules = list(rules)
    keys = {"critical", *(rule.name for rule in rules), *(rule.kind for rule in rules)}
    checked: dict[str, tuple[Action, ...]] = {}
    for key, given in actions.items():
        if key not in keys:
            near = nearest(key, keys)
            hint = f"did you mean {near!r}? there are" if near else "there are"
            raise ValueError(f"actions: {key!r} is no rule and no fault kind; {hint} {', '.join(sorted(keys))}")
        if callable(given) or isinstance(given, str) or not isinstance(given, Iterable):
            checked[key] = (given,)
        else:
            checked[key] = tuple(given)
        for action in checked[key]:
            if not callable(action) and action not in REQUESTS:
                near = nearest(action, REQUESTS)
                raise ValueError(
                    f"actions[{key!r}]: {action!r} is none of {REQUESTS} and not a function action(event, sample)"
                    f"{f'; did you mean {near!r}?' if near else ''}"
                )
    return checked


def requests_of(events: Sequence[AlertEvent], actions: Actions) -> tuple[str, ...]:
    """Return what the events request of the training loop, without repeats."""
    return tuple(dict.fromkeys(action for _, action in _triggered(events, actions) if not callable(action)))


def calls_of(events: Sequence[AlertEvent], actions: Actions) -> list[tuple[AlertEvent, ActionFunction]]:
    """Return the functions to call, each with the event that triggers it."""
    return [(event, action) for event, action in _triggered(events, actions) if callable(action)]


def action_name(action: object) -> str:
    """Return what to call an action, or another function of the user's, in settings and messages."""
    try:
        return action if isinstance(action, str) else str(getattr(action, "__qualname__", None) or repr(action))
    except Exception:  # a `repr` or a class of the user's own
        return type(action).__qualname__


def _triggered(events: Sequence[AlertEvent], actions: Actions) -> Iterator[tuple[AlertEvent, Action]]:
    for event in events:
        if event.state == "firing":
            for key in (event.rule, event.kind, event.severity):
                for action in actions.get(key, ()):
                    yield event, action
