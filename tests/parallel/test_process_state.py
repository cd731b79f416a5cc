"""Importing a library in the middle of a run changes nothing that belongs to the user's program."""

from __future__ import annotations

import importlib
import logging
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnmonitor.parallel.process_state import first_import

INTRUSIVE = """
import io, logging, random, sys, warnings
import numpy, torch
random.random(), numpy.random.random(), torch.rand(1)
warnings.simplefilter("ignore")
warnings.showwarning = print
logging.basicConfig(level=logging.DEBUG, force=True)
logging.disable(logging.CRITICAL)
sys.excepthook = print
sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
{}
"""


def state_of_the_program() -> dict[str, Any]:
    root = logging.getLogger()
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "filters": [*warnings.filters],
        "showwarning": warnings.showwarning,
        "logging": ([*root.handlers], root.level, root.manager.disable),
        "hooks": (sys.excepthook, sys.stdout, sys.stderr),
    }


@pytest.mark.parametrize("ending", ["", "raise ImportError"])
def test_first_import_leaves_the_program_as_it_was(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"intrusive_{bool(ending)}"
    (tmp_path / f"{name}.py").write_text(INTRUSIVE.format(ending))
    monkeypatch.syspath_prepend(tmp_path)
    before = state_of_the_program()
    try:
        with first_import(name):
            importlib.import_module(name)
    except ImportError:
        assert ending
    assert state_of_the_program() == before
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_import_of_what_is_loaded_saves_nothing() -> None:
    random.seed(0)
    expected = random.random()
    random.seed(0)
    with first_import("random", "torch"):
        assert random.random() == expected
    assert random.random() != expected
