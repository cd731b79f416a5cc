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

from attnmonitor.catalog import METRICS
from attnmonitor.loggers.keys import ScalarKeys
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
        self._keys: ScalarKeys | None = None
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
        """Log one sample: summaries, heads, and from time to time the heatmaps."""
        first = self._keys is None
        keys = self._keys or self._plan(sample)
        summaries, details = keys.summaries(sample), keys.details(sample)
        row: dict[str, Any] = {**summaries, **details}
        self._not_drawn = sample if self._image_share else None
        if self._drawing_seconds <= self._image_share * (time.perf_counter() - self._started):
            row.update(self._images(keys))
        self._define(keys, row, hidden=details)
        self._send(row)
        if first:
            self._announce(keys)

    def close(self) -> None:
        """Draw the last sample's heatmaps, where they are not drawn yet; the run stays open: it is the user's."""
        if self._keys is not None and self._not_drawn is not None:
            self._send({self._keys.step_key: self._not_drawn.global_step, **self._images(self._keys)})

    def _plan(self, sample: Sample) -> ScalarKeys:
        num_images = len(sample.values) if self._image_share else 0
        self._keys = ScalarKeys(sample, max_keys=self._max_keys, reserved=num_images)
        self._run.define_metric(self._keys.step_key, hidden=True)
        self._defined.add(self._keys.step_key)
        return self._keys

    def _define(self, keys: ScalarKeys, row: Mapping[str, Any], *, hidden: Mapping[str, float]) -> None:
        for key in row.keys() - self._defined:
            # Hidden curves exist and can be charted, but make no panel of their own: a thousand panels stall the
            # page.
            self._run.define_metric(key, step_metric=keys.step_key, hidden=key in hidden or None)
        self._defined.update(row)

    def _send(self, row: Mapping[str, Any]) -> None:
        # The row of the last sample is still open when nobody has logged since: close it, or this one would overwrite
        # it.
        if self._row_left_open == self._run.step:
            self._run.log({}, commit=True)
        self._run.log(dict(row), commit=False)
        self._row_left_open = self._run.step

    def _images(self, keys: ScalarKeys) -> dict[str, Any]:
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
            images[f"{keys.prefix}/{metric}/heatmap"] = image
        self._drawing_seconds += time.perf_counter() - started
        return images

    def _announce(self, keys: ScalarKeys) -> None:
        import wandb

        what = "every head has a curve" if keys.every_head else "summaries, and the heads that stand out"
        wandb.termlog(f"attnmonitor: at most {keys.num_keys:,} keys in this run ({what}; cap {self._max_keys:,})")


def _rendered(figure: Any) -> Image:
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    buffer.seek(0)
    return Image.open(buffer)
