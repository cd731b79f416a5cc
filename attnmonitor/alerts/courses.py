"""The course of each alarm: its value at alarm, now and at its worst, and how far out each was.

The state of an alarm (`states`) says that something is wrong; its course says how much, so that the head that is
farthest out comes first, and an alarm that began small and has grown is not overlooked.

A distance is 1 at the limit, 2 where the signal is twice the limit, and infinite where the metric is not finite.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnmonitor.alerts.rules import FiringShare, Threshold

__all__ = ["GROWTH", "AlarmCourses", "direction_of", "distance_of", "follow"]

GROWTH = 2.0
"""Factor by which the distance must grow since an alarm's latest event for another event."""


@dataclass(frozen=True)
class AlarmCourses:
    """The courses of U alarms, (U,) float32 each; NaN where no alarm fires or nothing is known.

    Attributes:
        at_alarm: The value when the alarm fired.
        now: The value in the present sample.
        worst: The highest value since the alarm fired; the lowest, of an alarm on values that are too low.
        distance: The last distance that was known.
        noted: The largest distance that an event was made for.
    """

    at_alarm: Tensor
    now: Tensor
    worst: Tensor
    distance: Tensor
    noted: Tensor

    @classmethod
    def unknown(cls, count: int) -> AlarmCourses:
        """Return the courses of ``count`` alarms that do not fire."""
        return cls(*(torch.full((count,), torch.nan) for _ in dataclasses.fields(cls)))

    def grown_to(self, count: int) -> AlarmCourses:
        """Return these courses, extended by unknown ones to ``count`` alarms."""
        more = AlarmCourses.unknown(count - len(self.now))
        return AlarmCourses(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(more).values(), strict=True)))

    def shown(self, alarm: int) -> dict[str, Any]:
        """Return the fields of an `AlertEvent` that tell the course of one alarm."""
        course = {"value": self.at_alarm, "now": self.now, "worst": self.worst, "distance": self.distance}
        return {name: float(numbers[alarm]) for name, numbers in course.items()}


def distance_of(leaf: Threshold | FiringShare, signal: Tensor) -> Tensor:
    """Return how far out a signal is: 1 at the firing level, 2 at twice that level."""
    if isinstance(leaf, FiringShare):
        return signal / leaf.heads
    if leaf.signal == "non_finite":
        return torch.where(signal > 0, torch.inf, signal)
    sign, fire, _ = leaf.levels
    return 1 + sign * (signal - fire) / (abs(fire) or 1.0)


def direction_of(leaf: Threshold | FiringShare) -> int:
    """Return 1 where high values of the metric are at fault, -1 where low ones are."""
    if isinstance(leaf, FiringShare):
        return 1
    sign, _, _ = leaf.levels
    return int(-sign if leaf.reading == "log_slack" else sign)  # ln(1 − m) falls where m rises


def follow(
    courses: AlarmCourses,
    value: Tensor,  # (U,)
    distance: Tensor,  # (U,)
    *,
    direction: Tensor,  # (U,) 1 or -1
    fired: Tensor,  # (U,) bool: the alarm fires since this sample
    firing: Tensor,  # (U,) bool
) -> tuple[AlarmCourses, Tensor]:
    """Add one sample to the courses.

    Args:
        courses: The courses up to the sample before.
        value: The metric in this sample; NaN where it is missing or not finite.
        distance: Its distance; NaN where it is unknown.
        direction: Whether high values are at fault, 1, or low ones, -1.
        fired: Alarms that fire since this sample.
        firing: All alarms that fire.

    Returns:
        The courses, and which alarms are so much farther out than at their latest event that they need another, (U,)
        bool.
    """

    def kept(before: Tensor, otherwise: Tensor) -> Tensor:
        """Return what was known before of alarms that go on; ``otherwise`` where they began or had no value yet."""
        return torch.where(fired | before.isnan(), otherwise, before)

    distance = torch.where(distance.isnan() & ~fired, courses.distance, distance)
    worst = kept(courses.worst, value)  # not the value at the largest distance: the other heads may have moved since
    noted = kept(courses.noted, distance)
    grown = firing & (distance > noted) & (distance >= GROWTH * noted)  # also of infinite ones
    followed = AlarmCourses(
        at_alarm=kept(courses.at_alarm, value),
        now=value,
        worst=torch.where(direction * value > direction * worst, value, worst),
        distance=distance,
        noted=torch.where(grown, distance, noted),
    )
    nothing = AlarmCourses.unknown(len(value))
    pairs = zip(vars(followed).values(), vars(nothing).values(), strict=True)
    return AlarmCourses(*(torch.where(firing, course, unknown) for course, unknown in pairs)), grown
