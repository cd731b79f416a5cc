"""Send samples to experiment trackers during a run, each by one small class with ``log_sample``."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from attnmonitor.loggers.keys import summary_scalars
from attnmonitor.loggers.scalars import MetricsLogger
from attnmonitor.loggers.tensorboard import is_summary_writer
from attnmonitor.loggers.wandb import WandbLogger
from attnmonitor.sample import Sample

__all__ = ["MetricsLogger", "SampleLogger", "WandbLogger", "as_logger", "check_logger", "summary_scalars"]


@runtime_checkable
class SampleLogger(Protocol):
    """Anything that takes samples; ``log_sample`` is the only method that a logger must have.

    A logger may also have ``log_run(description)``, called once at attach with the run's settings, ``follow(history)``,
    called once at attach with the trajectories, to which each sample is added before it is logged, and ``close()``.
    """

    def log_sample(self, sample: Sample) -> None:
        """Log one sample."""


def as_logger(logger: Any) -> SampleLogger:
    """Return ``logger`` itself if it takes samples, else a logger that sends samples to it.

    An object with ``log_sample`` is returned unchanged; a Weights & Biases run, or a Lightning logger with one, is
    wrapped in `WandbLogger`; any other object with ``log_metrics(dict, step)`` gets the scalars, and the heatmaps
    where it holds a TensorBoard or MLflow experiment; so does a ``SummaryWriter`` of TensorBoard.

    Raises:
        ValueError: ``logger`` is none of these.
    """
    check_logger(logger)
    if callable(getattr(logger, "log_sample", None)):
        taking_samples: SampleLogger = logger
        return taking_samples
    if _is_lightning_wandb(logger):
        return WandbLogger(logger.experiment)  # begins its run
    return WandbLogger(logger) if callable(getattr(logger, "define_metric", None)) else MetricsLogger(logger)


def check_logger(logger: Any) -> None:
    """Raise the ValueError of `as_logger`; no run is begun."""
    methods = ("log_sample", "define_metric", "log_metrics")
    if _is_lightning_wandb(logger) or is_summary_writer(logger):
        return
    if not any(callable(getattr(logger, method, None)) for method in methods):
        raise ValueError(
            f"loggers: {type(logger).__name__} has neither log_sample(sample) nor log_metrics(dict, step); "
            "give a Lightning logger, a W&B run, a SummaryWriter, attnmonitor.loggers.WandbLogger() or an object with "
            "one of these methods"
        )


def _is_lightning_wandb(logger: Any) -> bool:
    return any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__)
