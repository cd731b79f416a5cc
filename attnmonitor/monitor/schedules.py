"""When to sample: a schedule is a function from the number of optimizer steps done to a bool.

A schedule is called with 0 before the first optimizer step, and after every optimizer step. It holds no state, so a
resumed run samples at the same steps as one that was never interrupted. Any function ``step -> bool`` is a schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import floor, log10
from typing import Any

from attnmonitor.messages import whole_argument

__all__ = [
    "Schedule",
    "as_schedule",
    "at_steps",
    "every",
    "is_due",
    "logarithmic",
    "never",
    "one_schedule",
    "whole_number",
]

_LONGEST_JUMP = 10_000  # steps: asking for more would take longer than a training step

Schedule = Callable[[int], bool]
"""``schedule(global_step)`` says whether to sample after that many optimizer steps."""


# Classes and not closures: a callback is pickled with its schedule where a trainer spawns its processes.


@dataclass(frozen=True)
class _Every:
    num_steps: int

    def __call__(self, global_step: int) -> bool:
        return global_step % self.num_steps == 0

    def __repr__(self) -> str:
        return f"every({self.num_steps})"


@dataclass(frozen=True)
class _AtSteps:
    steps: list[int]
    wanted: frozenset[int]

    def __call__(self, global_step: int) -> bool:
        return global_step in self.wanted

    def __repr__(self) -> str:
        return f"at_steps({self.steps})"


@dataclass(frozen=True)
class _Logarithmic:
    per_decade: int

    def __call__(self, global_step: int) -> bool:
        return global_step < 2 or self._bucket(global_step) > self._bucket(global_step - 1)

    def _bucket(self, step: int) -> int:
        # The small addend corrects rounding at powers of ten: log10(1000) * 3 may be just below 9.
        return floor(log10(step) * self.per_decade + 1e-9)

    def __repr__(self) -> str:
        return f"logarithmic({self.per_decade})"


def every(num_steps: int) -> Schedule:
    """Sample at 0, ``num_steps``, ``2 · num_steps``, …

    Args:
        num_steps: Optimizer steps between two samples, at least 1.

    Raises:
        ValueError: ``num_steps`` is not a positive whole number.

    Example:
        >>> [step for step in range(8) if every(3)(step)]
        [0, 3, 6]
    """
    if (whole := whole_argument(num_steps, least=1)) is None:
        raise ValueError(f"schedule: every({num_steps!r}) needs a whole number of optimizer steps, 1 or more")
    return _Every(whole)


def at_steps(steps: Iterable[int]) -> Schedule:
    """Sample at exactly these steps.

    Args:
        steps: Optimizer steps, each 0 or more.

    Raises:
        ValueError: No step is given, or one is negative or not a whole number.

    Example:
        >>> [step for step in range(8) if at_steps([1, 5])(step)]
        [1, 5]
    """
    given = list(steps)
    chosen = [whole for step in given if (whole := whole_argument(step, least=0)) is not None]
    if len(chosen) < len(given) or not given:
        wrong = [step for step in given if whole_argument(step, least=0) is None]
        arrived = f"{wrong[0]!r} among them" if wrong else "none"
        raise ValueError(f"schedule: at_steps(...) got {arrived}; give one or more whole step numbers, 0 or more")
    return _AtSteps(chosen, frozenset(chosen))


def logarithmic(per_decade: int = 10) -> Schedule:
    """Sample at 0 and then evenly in the logarithm of the step: often at first, rarely later.

    Args:
        per_decade: Samples between a step and ten times that step, at least 1.

    Raises:
        ValueError: ``per_decade`` is not a positive whole number.

    Example:
        >>> [step for step in range(1001) if logarithmic(3)(step)]
        [0, 1, 3, 5, 10, 22, 47, 100, 216, 465, 1000]
    """
    if (whole := whole_argument(per_decade, least=1)) is None:
        raise ValueError(f"schedule: logarithmic({per_decade!r}) needs a whole number of samples per decade, 1 or more")
    return _Logarithmic(whole)


def never(global_step: int) -> bool:
    """Sample at no step."""
    return False


def whole_number(global_step: Any) -> int:
    """Return a step as an ``int``: numpy's and torch's integers count as well.

    Raises:
        ValueError: It is not a whole number.
    """
    try:
        step = int(global_step)
        if step == global_step:
            return step
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"global_step={global_step!r} is not a whole number of optimizer steps")


def is_due(schedule: Schedule, first: int, last: int) -> bool:
    """Return whether the schedule asks for a sample from ``first`` to ``last``; of a long jump, at its end."""
    return any(map(schedule, range(max(first, last - _LONGEST_JUMP), last + 1)))


def as_schedule(schedule: int | Schedule | Iterable[int]) -> Schedule:
    """Return ``schedule`` as a function: a whole number n means ``every(n)``, a list of steps means ``at_steps``.

    Raises:
        ValueError: It is 0, negative, an empty list, or neither a number, a list of steps nor a function.
    """
    if callable(schedule):
        return schedule
    if hasattr(schedule, "__index__") and not getattr(schedule, "ndim", 0):
        return every(schedule)  # type: ignore[arg-type]
    if isinstance(schedule, Iterable) and not isinstance(schedule, (str, bytes)):
        return at_steps(schedule)
    raise ValueError(
        f"schedule={schedule!r} is neither a number of steps, a list of steps nor a function of the step; "
        "try schedule=100"
    )


def one_schedule(every_n_steps: int | None, schedule: int | Schedule | Iterable[int] | None) -> Schedule:
    """Return an adapter's schedule from its two arguments; every 100 steps if neither is given.

    Raises:
        ValueError: Both are given, or one is invalid.
    """
    if every_n_steps is not None and schedule is not None:
        raise ValueError(f"every_n_steps={every_n_steps!r} and schedule={schedule!r} are both given; give one")
    if schedule is not None:
        return as_schedule(schedule)
    if every_n_steps is None:
        return every(100)
    try:
        return every(every_n_steps)
    except ValueError:
        raise ValueError(
            f"every_n_steps={every_n_steps!r} needs a whole number of optimizer steps, 1 or more"
        ) from None
