"""What `import attnmonitor` loads, and the error where an extra is not installed."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import attnmonitor
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


def guarded_lines(tree: ast.Module) -> set[int]:
    """Lines inside ``with first_import(...)``, which names what is imported."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        for item in node.items
        if isinstance(item.context_expr, ast.Call) and getattr(item.context_expr.func, "id", "") == "first_import"
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }


def late_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and module of each import in a function, of libraries and of rooms that import them."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
                    names.append("by name")
                for name in names:
                    yield node.lineno, name


def test_libraries_imported_late_are_imported_in_a_guard() -> None:
    root = Path(attnmonitor.__file__).parent
    found = {"guarded": 0, "not guarded": list[str]()}
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text())
        guarded = guarded_lines(tree)
        for line, name in late_imports(tree):
            library = name.partition(".")[0]
            harmless = library == "attnmonitor" and not name.startswith(("attnmonitor.plots", "attnmonitor.callbacks"))
            if harmless or library == "torch" or library in sys.stdlib_module_names:
                continue
            if line in guarded:
                found["guarded"] += 1
            else:
                found["not guarded"].append(f"{path.relative_to(root)}:{line} {name}")
    assert found["guarded"] > 15
    assert not found["not guarded"], found["not guarded"]
