"""Which of the values that training logs are shown beside the heads: losses and learning rates, by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

__all__ = ["logged_title", "loss_and_rate", "shown_curves"]

_Curve = TypeVar("_Curve")

_LOSS = re.compile(r"loss|perplexity|(?<![a-z])(?:ppl|nll)(?![a-z])", re.IGNORECASE)
_LEARNING_RATE = re.compile(r"(?<![a-z])lr(?![a-z])|learning.?rate", re.IGNORECASE)
_HELD_OUT = re.compile(r"(?<![a-z])(?:val|valid|validation|eval|evaluation|test)(?![a-z])", re.IGNORECASE)
_MOST_OTHERS = 2  # curves of other names, where neither a loss nor a learning rate was logged


def logged_title(name: str) -> str:
    """Return what a logged value is to a reader: ``"loss"``, ``"learning rate"`` or, of any other name, ``"logged"``.

    Example:
        >>> [logged_title(name) for name in ("train_loss", "lr-AdamW", "flor", "grad_norm")]
        ['loss', 'learning rate', 'logged', 'logged']
    """
    return "loss" if _LOSS.search(name) else "learning rate" if _LEARNING_RATE.search(name) else "logged"


def shown_curves(logged: Mapping[str, _Curve]) -> dict[str, _Curve]:
    """Return the losses and learning rates that training logged; where there are none, the first other curves."""
    known = {name: curve for name, curve in logged.items() if logged_title(name) != "logged"}
    return known or dict(list(logged.items())[:_MOST_OTHERS])


def loss_and_rate(logged: Mapping[str, _Curve]) -> dict[str, _Curve]:
    """Return a training loss, a held-out loss and a learning rate, where logged; the shortest name of each kind.

    Example:
        >>> list(loss_and_rate({"lr-AdamW": 1, "val/loss": 2, "loss_step": 3, "loss": 4, "accuracy": 5}))
        ['loss', 'val/loss', 'lr-AdamW']
    """
    losses = [name for name in logged if logged_title(name) == "loss"]
    held_out = list(filter(_HELD_OUT.search, losses))
    rates = [name for name in logged if logged_title(name) == "learning rate"]
    groups = ([name for name in losses if name not in held_out], held_out, rates)
    return {name: logged[name] for name in (min(group, key=len) for group in groups if group)}
