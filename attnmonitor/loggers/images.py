"""Heatmaps of a sample as images, and the time a run may spend on drawing them.

An image costs more than a sample. So images are drawn with the first sample, with the last one, and in between as
often as drawing stays below a share of the run's wall time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from attnmonitor.parallel.process_state import first_import
from attnmonitor.sample import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["DrawingBudget", "evidence_images", "heatmap_images"]

_logger = logging.getLogger(__name__)


class DrawingBudget:
    """Keeps the time spent on drawing below a share of the wall time.

    Args:
        share: The share; with 0 nothing is drawn.

    Attributes:
        pending: The latest sample, until it is drawn. If it still is pending at the end of the run, it is drawn then.

    Raises:
        ValueError: ``share`` is negative or NaN.
    """

    def __init__(self, share: float) -> None:
        if not share >= 0:
            raise ValueError(f"image_share={share} must be 0 (no images) or a share of the run's wall time")
        self.pending: Sample | None = None
        self._share = share
        self._started = time.perf_counter()
        self._spent = 0.0

    def __bool__(self) -> bool:
        return self._share > 0

    def allows(self, sample: Sample) -> bool:
        """Return whether this sample may be drawn now; until it is, it is pending."""
        self.pending = sample if self else None
        return bool(self) and self._spent <= self._share * (time.perf_counter() - self._started)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Count the time spent inside on the pictures of the pending sample."""
        self.pending = None
        with self.spending():
            yield

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time spent inside on something beside the sample's own pictures."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent += time.perf_counter() - started


def heatmap_images(sample: Sample) -> dict[str, Image]:
    """Return one image per metric, by its name; none where matplotlib is missing."""
    return _images(
        lambda plots: {
            metric: plots.heatmap(
                layers, metric=metric, events=sample.firing, coverage=sample.coverage, global_step=sample.global_step
            )
            for metric, layers in sample.values.items()
        }
    )


def evidence_images(sample: Sample) -> dict[str, Image]:
    """Return one image of the heads whose alarms began, four at most; none without such heads or matplotlib."""
    return _images(lambda plots: {"evidence": plots.evidence(sample.evidence)}) if sample.evidence else {}


def _images(draw: Callable[[ModuleType], Mapping[str, Figure]]) -> dict[str, Image]:
    try:
        with first_import("attnmonitor.plots", "PIL.Image"):
            import PIL.Image

            from attnmonitor import plots
            from attnmonitor.plots.style import pixels
    except ModuleNotFoundError:
        _logger.info("no heatmaps: they need matplotlib (pip install 'attnmonitor[plots]')")
        return {}
    return {name: PIL.Image.fromarray(pixels(figure)) for name, figure in draw(plots).items()}
