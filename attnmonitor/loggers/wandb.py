"""A sample in Weights & Biases: hidden curves for every head, visible summaries, and heatmaps one can look at.

The samples have an x-axis of their own (``attention/global_step``, by ``define_metric``) and are logged without a
step and without committing a row: they join the row the user's own logging commits next. So nothing the user logs is
moved, dropped or given another step, and resumed or out-of-band samples are not lost to W&B's rule that steps must
increase.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attnmonitor.alerts import digest
from attnmonitor.catalog import METRICS
from attnmonitor.loggers.keys import HeadScalars, key_prefix, step_key, summary_scalars
from attnmonitor.sample import Sample

if TYPE_CHECKING:
    from PIL.Image import Image
    from wandb import Run

__all__ = ["WandbLogger"]

_logger = logging.getLogger(__name__)


class WandbLogger:
    """Logs samples to a Weights & Biases run.

    Args:
        run: The run; by default the live one (``wandb.run``), looked up at attach.
        max_keys: Most keys ever made in the run. Above it, per-layer summaries and the heads that stand out.
        image_share: Heatmaps, one per metric, are drawn with the first and the last sample, and in between as often as
            drawing stays below this share of the run's wall time: a picture costs more than a sample does. 0: none.

    Raises:
        ValueError: ``run`` is None and no run is live, or an argument is out of range.
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self, run: Run | None = None, *, max_keys: int = 2000, image_share: float = 0.002) -> None:
        import wandb

        if run is None:
            run = wandb.run
        if run is None:
            raise ValueError("WandbLogger(run=None): no W&B run is live; call wandb.init(...) first or pass the run")
        if not image_share >= 0:
            raise ValueError(f"image_share={image_share} must be 0 (no images) or a share of the run's wall time")
        self._run = run
        self._max_keys = max_keys
        self._image_share = image_share
        self._head_scalars = HeadScalars(max_keys)
        self._defined: set[str] = set()
        self._started = time.perf_counter()
        self._drawing_seconds = 0.0
        self._not_drawn: Sample | None = None
        self._row_left_open: int | None = None

    def log_run(self, description: Mapping[str, Any]) -> None:
        """Put the monitor's settings, the probe's fingerprint and the coverage into the run's configuration."""
        name = description.get("name") or "default"
        known = dict(self._run.config.get("attention", {}))
        self._run.config.update({"attention": {**known, name: dict(description)}}, allow_val_change=True)

    def log_sample(self, sample: Sample) -> None:
        """Log one sample: summaries, heads, from time to time the heatmaps; and send what alerts have to say."""
        details = self._head_scalars(sample)
        row: dict[str, Any] = {**summary_scalars(sample), **details}
        self._not_drawn = sample if self._image_share else None
        if self._drawing_seconds <= self._image_share * (time.perf_counter() - self._started):
            row.update(self._images())
        if not self._defined:
            self._announce()
        self._define(step_key(sample), row, hidden=details)
        self._send(row)
        for notification in digest(sample.events):
            level = {"info": "INFO", "warning": "WARN", "error": "ERROR"}[notification.level]
            self._run.alert(title=notification.title, text=notification.text, level=level)

    def close(self) -> None:
        """Draw the last sample's heatmaps, where they are not drawn yet; the run stays open: it is the user's."""
        if (sample := self._not_drawn) is not None:
            self._send({step_key(sample): sample.global_step, **self._images()})

    def _define(self, x_axis: str, row: Mapping[str, Any], *, hidden: Mapping[str, float]) -> None:
        if x_axis not in self._defined:
            self._run.define_metric(x_axis, hidden=True)
            self._defined.add(x_axis)
        for key in row.keys() - self._defined:
            # Hidden curves exist and can be charted, but make no panel of their own: a thousand panels stall the page.
            self._run.define_metric(key, step_metric=x_axis, hidden=key in hidden or None)
        self._defined.update(row)

    def _send(self, row: Mapping[str, Any]) -> None:
        # The row of the last sample is still open when nobody has logged since: close it, or this one would overwrite
        # it.
        if self._row_left_open == self._run.step:
            self._run.log({}, commit=True)
        self._run.log(dict(row), commit=False)
        self._row_left_open = self._run.step

    def _images(self) -> dict[str, Any]:
        """Draw the heatmaps of the sample that waits for them, if one does."""
        sample, self._not_drawn = self._not_drawn, None
        if sample is None:
            return {}
        try:
            from attnmonitor.plots import heatmap
        except ModuleNotFoundError:
            _logger.info("no heatmaps in W&B: they need matplotlib (pip install 'attnmonitor[plots]')")
            self._image_share = 0.0
            return {}
        import wandb

        started = time.perf_counter()
        images = {}
        for metric, layers in sample.values.items():
            figure = heatmap(
                layers,
                metric=metric,
                events=sample.firing,
                coverage=sample.coverage,
                global_step=sample.global_step,
            )
            image = wandb.Image(_rendered(figure), caption=f"{METRICS[metric].meaning} Step {sample.global_step}.")
            images[f"{key_prefix(sample)}/{metric}/heatmap"] = image
        self._drawing_seconds += time.perf_counter() - started
        return images

    def _announce(self) -> None:
        import wandb

        what = "every head has a curve" if self._head_scalars.every_head else "summaries, and the heads that stand out"
        wandb.termlog(
            f"attnmonitor: at most {self._head_scalars.num_keys:,} keys in this run ({what}; cap {self._max_keys:,})"
        )


def _rendered(figure: Any) -> Image:
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    buffer.seek(0)
    return Image.open(buffer)
