"""The table of metrics, and a torchmetrics class for each: update per layer, compute one value per head.

The classes are imported on first use: torchmetrics takes seconds to import, and everything that names a metric reads
the table.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnmonitor.metrics.catalog import METRICS
from attnmonitor.parallel.process_state import first_import

if TYPE_CHECKING:
    from attnmonitor.metrics.attention import *  # noqa: F403
    from attnmonitor.metrics.base import HeadMetric
    from attnmonitor.metrics.checked_rows import *  # noqa: F403
    from attnmonitor.metrics.energy import *  # noqa: F403
    from attnmonitor.metrics.interaction import *  # noqa: F403
    from attnmonitor.metrics.keys import *  # noqa: F403
    from attnmonitor.metrics.values import *  # noqa: F403

    METRIC_CLASSES: dict[str, type[HeadMetric]]

_MODULES = ("energy", "keys", "values", "checked_rows", "attention", "interaction")


def _classes() -> dict[str, Any]:
    """Import every metric class; by the class's name."""
    names = [f"{__name__}.{module}" for module in _MODULES]
    with first_import(*names):
        modules = [importlib.import_module(name) for name in names]
    return {name: getattr(module, name) for module in modules for name in module.__all__}


def __getattr__(name: str) -> Any:
    if name == "HeadMetric":
        with first_import(f"{__name__}.base"):
            return importlib.import_module(f"{__name__}.base").HeadMetric
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)
    classes = _classes()
    if name == "__all__":
        return ["METRIC_CLASSES", "HeadMetric", *sorted(classes)]
    if name == "METRIC_CLASSES":
        by_metric = {cls.name: cls for cls in classes.values()}
        return {metric: by_metric[metric] for metric in METRICS if metric in by_metric}
    if name in classes:
        return classes[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
