"""Log samples to any logger that takes scalars, such as Lightning's, and heatmaps where it takes images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from attnmonitor.loggers.images import DrawingBudget, heatmap_images
from attnmonitor.loggers.keys import HeadScalars, heatmap_key, summary_scalars
from attnmonitor.loggers.tensorboard import Board, is_summary_writer
from attnmonitor.sample import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MetricsLogger"]

_MOST_IN_MLFLOW = 1000  # most metrics it accepts in one request


class MetricsLogger:
    """Sends the scalars of each sample to any object with ``log_metrics(dict, step)``, such as a Lightning logger.

    Where the object is a ``SummaryWriter`` or its ``experiment`` is one of TensorBoard or MLflow, it gets heatmaps as
    well: with the first sample, the last, and in between as rarely as `WandbLogger` draws them. TensorBoard also gets
    verdict and alarms as text, and a chart of all heads for each metric.

    Args:
        logger: The object.
        max_keys: Most keys that are made.
        image_share: Share of the run's wall time that may be spent on heatmaps; with 0 there are none.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, logger: Any, *, max_keys: int = 2000, image_share: float = 0.002) -> None:
        self._tracker = _tracker_of(logger)
        self._head_scalars = HeadScalars(max_keys)
        self._budget = DrawingBudget(image_share)

    def log_sample(self, sample: Sample) -> None:
        """Log the scalars of a sample at its global step, and its heatmaps if the drawing budget allows."""
        self._tracker.add_scalars({**summary_scalars(sample), **self._head_scalars(sample)}, sample.global_step)
        self._tracker.add_words(sample)
        if self._tracker.takes_images and self._budget.allows(sample):
            self._draw(sample)

    def close(self) -> None:
        """Draw the heatmaps of the last sample if they are pending."""
        if self._budget.pending is not None:
            self._draw(self._budget.pending)

    def _draw(self, sample: Sample) -> None:
        with self._budget.drawing():
            for metric, image in heatmap_images(sample).items():
                self._tracker.add_image(heatmap_key(sample, metric), image, sample.global_step)


class Tracker(Protocol):
    """What a tracker takes, at a step."""

    takes_images: bool

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""

    def add_image(self, key: str, image: Image, step: int) -> None:
        """Add an image."""

    def add_words(self, sample: Sample) -> None:
        """Add what is said about a sample."""


class _Scalars:
    """A logger that takes scalars only."""

    takes_images = False

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        self._logger.log_metrics(dict(scalars), step=step)

    def add_image(self, key: str, image: Image, step: int) -> None:
        """Not called: it takes none."""

    def add_words(self, sample: Sample) -> None:
        """It takes none."""


class _Mlflow(_Scalars):
    takes_images = True

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        items = list(scalars.items())
        for first in range(0, len(items), _MOST_IN_MLFLOW):
            super().add_scalars(dict(items[first : first + _MOST_IN_MLFLOW]), step)

    def add_image(self, key: str, image: Image, step: int) -> None:
        self._logger.experiment.log_image(self._logger.run_id, image, key=key, step=step)


def _tracker_of(logger: Any) -> Tracker:
    if is_summary_writer(logger):
        return Board(logger)
    experiment = getattr(logger, "experiment", None)
    if is_summary_writer(experiment):
        return Board(experiment, log_metrics=logger.log_metrics)
    is_mlflow = callable(getattr(experiment, "log_image", None)) and getattr(logger, "run_id", None) is not None
    return _Mlflow(logger) if is_mlflow else _Scalars(logger)
