from __future__ import annotations

from pathlib import Path

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


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in its own folder: records and W&B files never land in the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path
