"""What `import attnmonitor` loads, and the error where an extra is not installed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from attnmonitor.loggers import WandbLogger
from attnmonitor.report import write_report
from attnmonitor.scan.checkpoint import Checkpoint

HEAVY = ["lightning", "matplotlib", "pandas", "plotly", "scipy", "torchmetrics", "transformers", "wandb"]


def test_import_loads_torch_and_nothing_else_slow() -> None:
    count = f"import sys, attnmonitor; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def importing(module: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(module)


@pytest.mark.parametrize(
    ("missing", "use", "message"),
    [
        (
            "lightning.pytorch",
            importing("attnmonitor.callbacks.lightning"),
            "attnmonitor.callbacks.lightning needs lightning: pip install 'attnmonitor[lightning]'",
        ),
        (
            "transformers",
            importing("attnmonitor.callbacks.transformers"),
            "attnmonitor.callbacks.transformers needs transformers: pip install 'attnmonitor[transformers]'",
        ),
        (
            "matplotlib.axes",
            importing("attnmonitor.plots"),
            "attnmonitor.plots needs matplotlib: pip install 'attnmonitor[plots]'",
        ),
        ("wandb", WandbLogger, "WandbLogger needs wandb: pip install 'attnmonitor[wandb]'"),
        (
            "plotly.offline",
            lambda: write_report("run.sqlite"),
            "write_report needs plotly: pip install 'attnmonitor[report]'",
        ),
        (
            "transformers",
            lambda: Checkpoint("model"),
            "scan needs transformers: pip install 'attnmonitor[transformers]'",
        ),
    ],
)
def test_missing_extra_is_named(
    missing: str, use: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith(("attnmonitor.callbacks.", "attnmonitor.plots"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError) as raised:
        use()
    assert str(raised.value) == message
