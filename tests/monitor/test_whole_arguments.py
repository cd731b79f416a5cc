"""Arguments that are whole numbers may be of any integer type; anything else is refused, quoted, with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import TinyGPT, token_batch

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import DEFAULT_RULES, Rule, Threshold
from attnmonitor.metrics import KeyIncoherence
from attnmonitor.monitor.schedules import as_schedule, at_steps, every, logarithmic, one_schedule


class Whole:
    """A type of the user's."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def _monitor(weights_every: Any) -> Any:
    with AttentionMonitor(TinyGPT(), token_batch(), record=None, weights_every=weights_every) as monitor:
        return monitor.describe()["weights_every"]


def _rule(patience: Any) -> Any:
    rule = DEFAULT_RULES[0]
    return Rule(rule.name, rule.kind, rule.scope, rule.when, patience=patience).patience


def _window(window: Any) -> Any:
    when = Threshold("key_rank", "value", fire_above=2.0, clear_below=1.0, window=window)
    Rule("wide", "test", "kv_head", when)
    return when.window


TAKES: dict[str, Callable[[Any], Any]] = {
    "schedule": lambda value: [step for step in range(7) if as_schedule(value)(step)],
    "every_n_steps": lambda value: [step for step in range(7) if one_schedule(value, None)(step)],
    "every": lambda value: repr(every(value)),
    "at_steps": lambda value: repr(at_steps([0, value])),
    "logarithmic": lambda value: repr(logarithmic(value)),
    "weights_every": _monitor,
    "num_heads": lambda value: KeyIncoherence(num_heads=value).num_heads,
    "patience": _rule,
    "window": _window,
}
KINDS: tuple[Callable[[int], Any], ...] = (np.int64, np.uint8, np.array, torch.tensor, Whole)
WRONG = (True, np.bool_(True), torch.tensor(True), 2.5, "2", None, 0, -1, [-1])


@pytest.mark.parametrize("argument", TAKES)
def test_integer_of_any_type_is_the_same_as_an_int(argument: str) -> None:
    expected = TAKES[argument](2)
    for kind in KINDS:
        found = TAKES[argument](kind(2))
        assert found == expected
        assert type(found) is type(expected)
        json.dumps(found)


@pytest.mark.parametrize("argument", TAKES)
def test_anything_else_is_refused_and_quoted(argument: str) -> None:
    for wrong in WRONG:
        if (argument == "every_n_steps" and wrong is None) or (argument == "at_steps" and wrong is WRONG[6]):
            continue  # left out; step 0
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            TAKES[argument](wrong)
        assert repr(wrong).strip("[]") in str(raised.value)
