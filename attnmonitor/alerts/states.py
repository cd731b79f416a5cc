"""The life of an alarm: inactive, pending, firing, cleared, as a pure function of (state, what is seen).

What is seen is three-valued. A head is *ill* when its rule's condition holds at the firing levels, *well* when it is
certainly over at the clearing levels, and otherwise *undecided*: the value lies between the two levels, or there is no
value. Each alarm advances only on what is certain, which is why a value that hovers at a threshold fires once and why a
missing value neither fires nor clears. All heads of a rule advance together, one tensor element each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["INACTIVE", "PENDING", "FIRING", "AlarmStates", "Changes", "advance"]  # noqa: RUF022 (in order of life)

INACTIVE, PENDING, FIRING = 0, 1, 2


@dataclass(frozen=True)
class AlarmStates:
    """Where each of N alarms stands.

    Attributes:
        phase: (N,) int64: `INACTIVE`, `PENDING` or `FIRING`.
        streak: (N,) int64: samples in a row ill while pending, well while firing.
        held: (N,) int64: samples with a value since it fired.
        since_step: (N,) int64: global step of the first ill sample of this alarm; -1 while inactive.
    """

    phase: Tensor
    streak: Tensor
    held: Tensor
    since_step: Tensor

    @classmethod
    def inactive(cls, count: int) -> AlarmStates:
        """Return ``count`` alarms at rest."""
        zero = torch.zeros(count, dtype=torch.int64)
        return cls(zero, zero.clone(), zero.clone(), zero - 1)

    def followed_by(self, more: AlarmStates) -> AlarmStates:
        """Return these alarms and then those of ``more``."""
        pairs = zip(vars(self).values(), vars(more).values(), strict=True)
        return AlarmStates(*(torch.cat(pair) for pair in pairs))


@dataclass(frozen=True)
class Changes:
    """What a sample changed, (N,) bool each: alarms that fired, that have now held for long, and that cleared."""

    fired: Tensor
    escalated: Tensor
    cleared: Tensor


def advance(
    states: AlarmStates,
    *,
    ill: Tensor,  # (N,) bool: the condition holds at the firing levels
    not_ill: Tensor,  # (N,) bool: it certainly does not
    well: Tensor,  # (N,) bool: it certainly does not hold even at the clearing levels
    patience: int,
    hold: int,
    global_step: int,
) -> tuple[AlarmStates, Changes]:
    """Advance every alarm by one sample.

    Args:
        states: Where they stood.
        ill: (N,) bool.
        not_ill: (N,) bool; ``ill`` and ``not_ill`` are both False where there is no value.
        well: (N,) bool; implies ``not_ill``.
        patience: Samples in a row that it takes to fire, and to clear.
        hold: Samples of firing after which an alarm escalates; 0 for at once.
        global_step: Of this sample.

    Returns:
        Where they stand now, and what changed.
    """
    was_firing = states.phase == FIRING
    seen = ill | not_ill
    streak = torch.where(ill & ~was_firing, states.streak + 1, states.streak)
    streak = torch.where(not_ill & ~was_firing, 0, streak)
    streak = torch.where(well & was_firing, states.streak + 1, streak)
    streak = torch.where(seen & ~well & was_firing, 0, streak)

    fired = ~was_firing & ill & (streak >= patience)
    cleared = was_firing & well & (streak >= patience)
    firing = (was_firing & ~cleared) | fired
    pending = ~was_firing & ~fired & (streak > 0)
    phase = torch.where(firing, FIRING, torch.where(pending, PENDING, INACTIVE))

    held = torch.where(firing & was_firing & seen, states.held + 1, torch.where(firing, states.held, 0))
    escalated = firing & (held == hold) & (fired | (held > states.held))
    begins = (states.phase == INACTIVE) & (phase != INACTIVE)
    since_step = torch.where(begins, global_step, torch.where(phase == INACTIVE, -1, states.since_step))
    streak = torch.where(fired | cleared, 0, streak)
    return AlarmStates(phase, streak, held, since_step), Changes(fired, escalated, cleared)
