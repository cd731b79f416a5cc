"""A process-global setting is changed while at least one thread needs it, and restored when the last leaves."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import torch

from attnmonitor.functional.precision import full_precision
from attnmonitor.parallel.threads import ProcessSetting


class Setting:
    """A process-global setting."""

    def __init__(self) -> None:
        self.value = "the user's"

    @contextmanager
    def ours(self) -> Iterator[None]:
        before, self.value = self.value, "ours"
        try:
            yield
        finally:
            self.value = before


def test_setting_stays_changed_until_the_last_user_leaves() -> None:
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
def test_setting_is_restored_after_an_error(error: type[BaseException]) -> None:
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


def test_full_precision_lasts_until_the_last_user_leaves() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        first, second = (full_precision(torch.device("cpu")) for _ in range(2))
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_child_restores_the_setting() -> None:
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
