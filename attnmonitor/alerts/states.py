"""The states of an alarm (inactive, pending, firing) as a pure function of the last state and the present sample.

In each sample a rule's condition is *violated* (it holds at the firing levels), *recovered* (it does not hold even at
the clearing levels) or *unknown* (the value lies between the two levels, or there is no value). An alarm advances only
on what is certain. So a value that hovers at a threshold fires once, and a missing value neither fires nor clears. All
alarms of a rule advance in one call, one tensor element each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["INACTIVE", "PENDING", "FIRING", "AlarmStates", "Changes", "advance"]  # noqa: RUF022 (in order of time)

INACTIVE, PENDING, FIRING = 0, 1, 2


@dataclass(frozen=True)
class AlarmStates:
    """States of N alarms.

    Attributes:
        phase: (N,) int64: `INACTIVE`, `PENDING` or `FIRING`.
        streak: (N,) int64: consecutive violated samples while pending, consecutive recovered samples while firing.
        held: (N,) int64: samples with a value since the alarm fired.
        since_step: (N,) int64: global step of the alarm's first violated sample; -1 while inactive.
    """

    phase: Tensor
    streak: Tensor
    held: Tensor
    since_step: Tensor

    @classmethod
    def inactive(cls, count: int) -> AlarmStates:
        """Return ``count`` inactive alarms."""
        zero = torch.zeros(count, dtype=torch.int64)
        return cls(zero, zero.clone(), zero.clone(), zero - 1)

    def extended(self, more: AlarmStates) -> AlarmStates:
        """Return these alarms followed by those of ``more``."""
        pairs = zip(vars(self).values(), vars(more).values(), strict=True)
        return AlarmStates(*(torch.cat(pair) for pair in pairs))


@dataclass(frozen=True)
class Changes:
    """Alarms that a sample changed, (N,) bool each: fired, became critical, cleared."""

    fired: Tensor
    escalated: Tensor
    cleared: Tensor


def advance(
    states: AlarmStates,
    *,
    violated: Tensor,  # (N,) bool: the condition holds at the firing levels
    not_violated: Tensor,  # (N,) bool: it certainly does not
    recovered: Tensor,  # (N,) bool: it certainly does not hold even at the clearing levels
    patience: int,
    hold: int,
    global_step: int,
) -> tuple[AlarmStates, Changes]:
    """Advance every alarm by one sample.

    Args:
        states: States after the sample before.
        violated: (N,) bool.
        not_violated: (N,) bool; where there is no value, ``violated`` and ``not_violated`` are both False.
        recovered: (N,) bool; implies ``not_violated``.
        patience: Consecutive samples that an alarm needs to fire, and to clear.
        hold: Samples of firing after which an alarm becomes critical; 0 for at once.
        global_step: Global step of this sample.

    Returns:
        The new states, and what changed.
    """
    was_firing = states.phase == FIRING
    has_value = violated | not_violated
    streak = torch.where(violated & ~was_firing, states.streak + 1, states.streak)
    streak = torch.where(not_violated & ~was_firing, 0, streak)
    streak = torch.where(recovered & was_firing, states.streak + 1, streak)
    streak = torch.where(has_value & ~recovered & was_firing, 0, streak)

    fired = ~was_firing & violated & (streak >= patience)
    cleared = was_firing & recovered & (streak >= patience)
    firing = (was_firing & ~cleared) | fired
    pending = ~was_firing & ~fired & (streak > 0)
    phase = torch.where(firing, FIRING, torch.where(pending, PENDING, INACTIVE))

    held = torch.where(firing & was_firing & has_value, states.held + 1, torch.where(firing, states.held, 0))
    escalated = firing & (held == hold) & (fired | (held > states.held))
    begins = (states.phase == INACTIVE) & (phase != INACTIVE)
    since_step = torch.where(begins, global_step, torch.where(phase == INACTIVE, -1, states.since_step))
    streak = torch.where(fired | cleared, 0, streak)
    return AlarmStates(phase, streak, held, since_step), Changes(fired, escalated, cleared)
