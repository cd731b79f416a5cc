from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# For tests that do not set their number of examples. `--hypothesis-profile=fuzz` overrides the profile loaded here.
settings.register_profile(
    "short", max_examples=25, deadline=None, derandomize=True
)  # `make fuzz` looks for what is new
settings.register_profile("fuzz", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("short")


def pytest_collection_finish() -> None:
    """Leave all that is imported by now out of Python's searches for cycles, which are a third of many tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in its own folder: records and W&B files never land in the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch uses one thread: a dispatch mode sees only the thread that entered it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Python does not look for cycles of references: what only they keep stays, as in a run between two looks."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; the tests share it."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    running.set_script_timeout(60)
    yield running
    running.quit()
