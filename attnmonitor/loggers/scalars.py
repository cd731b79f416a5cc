"""Log samples to any logger that takes scalars, such as Lightning's, and heatmaps where it takes images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from attnmonitor.loggers.images import DrawingBudget, heatmap_images
from attnmonitor.loggers.keys import HeadScalars, heatmap_key, summary_scalars
from attnmonitor.sample import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    AddImage = Callable[[str, Image, int], object]

__all__ = ["MetricsLogger"]

_MOST_IN_MLFLOW = 1000  # most metrics it accepts in one request


class MetricsLogger:
    """Sends the scalars of each sample to any object with ``log_metrics(dict, step)``, such as a Lightning logger.

    Where the object's ``experiment`` is one of TensorBoard or MLflow, it gets heatmaps as well: with the first sample,
    the last, and in between as rarely as `WandbLogger` draws them.

    Args:
        logger: The object.
        max_keys: Most keys that are made.
        image_share: Share of the run's wall time that may be spent on heatmaps; with 0 there are none.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, logger: Any, *, max_keys: int = 2000, image_share: float = 0.002) -> None:
        self._logger = logger
        self._head_scalars = HeadScalars(max_keys)
        self._add_image = _add_image_function(logger)
        self._most_at_once = _MOST_IN_MLFLOW if _is_mlflow(logger) else None
        self._budget = DrawingBudget(image_share)

    def log_sample(self, sample: Sample) -> None:
        """Log the scalars of a sample at its global step, and its heatmaps if the drawing budget allows."""
        scalars = list({**summary_scalars(sample), **self._head_scalars(sample)}.items())
        size = self._most_at_once or len(scalars)
        for first in range(0, len(scalars), size):
            self._logger.log_metrics(dict(scalars[first : first + size]), step=sample.global_step)
        if self._budget.allows(sample):
            self._draw(sample)

    def close(self) -> None:
        """Draw the heatmaps of the last sample if they are pending."""
        if self._budget.pending is not None:
            self._draw(self._budget.pending)

    def _draw(self, sample: Sample) -> None:
        with self._budget.drawing():
            if self._add_image is not None:
                for metric, image in heatmap_images(sample).items():
                    self._add_image(heatmap_key(sample, metric), image, sample.global_step)


def _add_image_function(logger: Any) -> AddImage | None:
    """Return the function that adds an image to the logger's tracker, or None where it takes no images."""
    experiment = getattr(logger, "experiment", None)
    if callable(add_image := getattr(experiment, "add_image", None)):  # TensorBoard
        return lambda key, image, step: add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    if _is_mlflow(logger):
        return lambda key, image, step: logger.experiment.log_image(logger.run_id, image, key=key, step=step)
    return None


def _is_mlflow(logger: Any) -> bool:
    experiment = getattr(logger, "experiment", None)
    return callable(getattr(experiment, "log_image", None)) and getattr(logger, "run_id", None) is not None
