"""Schedules sample at the documented steps, and refuse what never fires."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnmonitor.monitor.schedules import as_schedule, at_steps, every, logarithmic, one_schedule


@given(st.integers(1, 50), st.integers(0, 10_000))
def test_every_n_samples_zero_and_multiples(n: int, step: int) -> None:
    assert every(n)(0)
    assert every(n)(step) == (step / n == step // n)


@given(st.integers(1, 30), st.integers(0, 6))
def test_logarithmic_samples_powers_of_ten(per_decade: int, decade: int) -> None:
    schedule = logarithmic(per_decade)
    assert schedule(0)
    assert schedule(10**decade)
    if decade < 4:
        sampled = sum(map(schedule, range(10**decade, 10 ** (decade + 1))))
        assert 1 <= sampled <= per_decade


def test_step_lists_functions_and_numbers_are_schedules() -> None:
    assert [step for step in range(10) if as_schedule([2, 7])(step)] == [2, 7]
    assert [step for step in range(6) if as_schedule(lambda step: step % 2 == 1)(step)] == [1, 3, 5]
    assert [step for step in range(6) if as_schedule(2)(step)] == [0, 2, 4]


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, None, "100", []])
def test_bad_schedule_is_refused_and_quoted(wrong: object) -> None:
    with pytest.raises(ValueError, match="schedule") as caught:
        as_schedule(wrong)  # type: ignore[arg-type]
    assert repr(wrong) in str(caught.value) or wrong == []


@pytest.mark.parametrize("wrong", [[], [-1], [1, 2.5], [True]])
def test_bad_step_list_is_refused(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="at_steps"):
        at_steps(wrong)


def test_every_n_steps_and_schedule_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="every_n_steps=5 and schedule=7"):
        one_schedule(5, 7)
    assert [step for step in range(201) if one_schedule(None, None)(step)] == [0, 100, 200]
