"""A sample in any logger that takes scalars, such as Lightning's, and its heatmaps where the logger takes images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from attnmonitor.loggers.keys import HeadScalars, heatmap_key, summary_scalars
from attnmonitor.loggers.pictures import DrawingBudget, heatmap_images
from attnmonitor.sample import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    AddImage = Callable[[str, Image, int], object]

__all__ = ["MetricsLogger"]


class MetricsLogger:
    """Sends the scalars of each sample to any object with ``log_metrics(dict, step)``, such as a Lightning logger.

    Where the object's ``experiment`` is one of TensorBoard or MLflow, it gets the heatmaps as well: with the first
    sample, the last, and in between as rarely as `WandbLogger` draws them.

    Args:
        logger: The object.
        max_keys: Most keys ever made.
        image_share: Share of the run's wall time that may be spent on heatmaps. 0: none.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, logger: Any, *, max_keys: int = 2000, image_share: float = 0.002) -> None:
        self._logger = logger
        self._head_scalars = HeadScalars(max_keys)
        self._add_image = _image_taker(logger)
        self._budget = DrawingBudget(image_share)

    def log_sample(self, sample: Sample) -> None:
        """Log one sample's scalars, from time to time its heatmaps, at its global step."""
        self._logger.log_metrics({**summary_scalars(sample), **self._head_scalars(sample)}, step=sample.global_step)
        if self._budget.allows(sample):
            self._draw(sample)

    def close(self) -> None:
        """Draw the last sample's heatmaps, where they are not drawn yet."""
        if self._budget.pending is not None:
            self._draw(self._budget.pending)

    def _draw(self, sample: Sample) -> None:
        with self._budget.drawing():
            if self._add_image is not None:
                for metric, image in heatmap_images(sample).items():
                    self._add_image(heatmap_key(sample, metric), image, sample.global_step)


def _image_taker(logger: Any) -> AddImage | None:
    """How the tracker behind a logger takes a picture, or None where it does not."""
    experiment = getattr(logger, "experiment", None)
    if callable(add_image := getattr(experiment, "add_image", None)):  # TensorBoard
        return lambda key, image, step: add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    log_image, run_id = getattr(experiment, "log_image", None), getattr(logger, "run_id", None)
    if callable(log_image) and run_id is not None:  # MLflow
        return lambda key, image, step: log_image(run_id, image, key=key, step=step)
    return None
