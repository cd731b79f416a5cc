"""A setting of the process is changed while anyone needs it so, and is what it was when the last has left."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import torch

from attnmonitor.functional.precision import _no_tf32
from attnmonitor.parallel.threads import ProcessSetting


class Setting:
    """Something a process has one of."""

    def __init__(self) -> None:
        self.value = "the user's"

    @contextmanager
    def ours(self) -> Iterator[None]:
        before, self.value = self.value, "ours"
        try:
            yield
        finally:
            self.value = before


def test_whoever_leaves_first_it_is_changed_until_the_last_has_left() -> None:
    setting = Setting()
    changed = ProcessSetting(setting.ours)
    first, second = changed(), changed()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert setting.value == "ours"
    with changed():
        second.__exit__(None, None, None)
        assert setting.value == "ours"
    assert setting.value == "the user's"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_or_in_the_change_itself_leaves_nobody_inside(error: type[BaseException]) -> None:
    setting = Setting()
    changed = ProcessSetting(setting.ours)
    with suppress(error), changed(), changed():
        raise error
    assert setting.value == "the user's"

    @contextmanager
    def refused() -> Iterator[None]:
        raise error
        yield

    never = ProcessSetting(refused)
    for _ in range(2):
        with pytest.raises(error), never():
            pass


def test_products_stay_in_full_precision_until_the_last_measurement_is_over() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        first, second = _no_tf32(), _no_tf32()
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_is_inside_has_the_users_setting_and_can_change_it() -> None:
    setting = Setting()
    changed = ProcessSetting(setting.ours)
    begun, may_end = threading.Event(), threading.Event()

    def inside() -> None:
        with changed():
            begun.set()
            may_end.wait(60)

    with ThreadPoolExecutor(1) as other:
        done = other.submit(inside)
        assert begun.wait(60)
        child = os.fork()
        if not child:
            seen = [setting.value]
            with changed():
                seen.append(setting.value)
            seen.append(setting.value)
            os._exit(0 if seen == ["the user's", "ours", "the user's"] else 1)
        _, status = os.waitpid(child, 0)
        assert setting.value == "ours"
        may_end.set()
        done.result()
    assert os.waitstatus_to_exitcode(status) == 0
    assert setting.value == "the user's"
