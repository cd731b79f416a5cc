"""Hundreds of library models: every attention that ran is measured right or named, and nothing else is."""

from __future__ import annotations

import pytest

from benchmarks.pages.broad_libraries import library_cases, other_cases
from benchmarks.pages.broad_models import Case, transformers_cases
from benchmarks.pages.detection_models import detection_cases
from benchmarks.pages.matrix import problems, result_of, saved

CASES = [*transformers_cases(), *detection_cases(), *library_cases(), *other_cases()]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.library} {case.name}")
def test_monitor_agrees_with_an_independent_observer(case: Case) -> None:
    result = result_of(case)
    if result is None:
        pytest.skip(f"{case.library} is not installed, or has other settings; `make matrix` installs it")
    assert problems(result) == []


def test_saved_results_have_no_problems() -> None:
    results = saved()
    assert sum(bool(result.layers or result.named) for result in results.values()) >= 120
    assert sum(not result.layers and not result.named for result in results.values()) >= 20
    assert [name for (name, _), result in results.items() if problems(result)] == []
