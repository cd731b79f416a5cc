"""Log samples to Weights & Biases: hidden curves of every head, visible medians, heatmaps and charts.

The samples have their own x-axis (``attention/global_step``, by ``define_metric``) and are logged without a step and
without committing a row: they become part of the row that the user's logging commits next. So nothing the user logs
is moved, dropped or given another step, and W&B's rule that steps must increase drops no sample after a resume.

Heatmaps and charts are sent complete each time, so they are sent rarely.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from attnmonitor.alerts import notifications_of
from attnmonitor.loggers.images import DrawingBudget, evidence_images, heatmap_images
from attnmonitor.loggers.keys import BAND_KEYS, HeadScalars, heatmap_key, key_prefix, step_key, summary_scalars
from attnmonitor.loggers.wandb_rows import RowsOfUser
from attnmonitor.messages import needed
from attnmonitor.parallel.process_state import first_import
from attnmonitor.report.charts import Chart, as_figure, layers_chart, model_chart, rank_chart
from attnmonitor.sample import Sample

if TYPE_CHECKING:
    from wandb import Run

    from attnmonitor.record.history import History

__all__ = ["WandbLogger"]

_logger = logging.getLogger(__name__)


class WandbLogger:
    """Logs samples to a Weights & Biases run.

    Args:
        run: The run; by default the live one (``wandb.run``), looked up at attach.
        max_keys: Most keys that are made in the run. If the heads need more, per-layer summaries and outlier heads.
        image_share: A heatmap and charts of curves per metric are drawn with the first and the last sample, and in
            between as often as drawing stays below this share of the run's wall time, because an image costs more than
            a sample. With 0 there are none.
        commit: Close a row of the run with every sample. Only for a run that nothing else logs to: where the user
            logs as well, rows of theirs would be moved or lost.

    Raises:
        ValueError: ``run`` is None and no run is live, or an argument is out of range.
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(
        self, run: Run | None = None, *, max_keys: int = 2000, image_share: float = 0.002, commit: bool = False
    ) -> None:
        with needed(by="WandbLogger", extra="wandb"), first_import("wandb"):
            import wandb

        if run is None:
            run = wandb.run
        if run is None:
            raise ValueError("WandbLogger(run=None): no W&B run is live; call wandb.init(...) first or pass the run")
        self._run = run
        self._rows = RowsOfUser(run, commit=commit)
        self._max_keys = max_keys
        self._head_scalars = HeadScalars(max_keys)
        self._budget = DrawingBudget(image_share)
        self._history: History | None = None
        self._num_samples = 0
        self._layers_due = 16
        self._defined: set[str] = set()

    def log_run(self, description: Mapping[str, Any]) -> None:
        """Put the monitor's settings, the probe's fingerprint and the coverage into the run's configuration.

        Under ``attention``, or under ``attnmonitor`` where the user has an entry of that name.
        """
        name = description.get("name") or "default"
        key = "attention" if _is_ours(self._run.config.get("attention", {})) else "attnmonitor"
        known = dict(self._run.config.get(key, {}))
        self._run.config.update({key: {**known, name: dict(description)}}, allow_val_change=True)

    def follow(self, history: History) -> None:
        """Set the trajectories that the charts of curves are drawn from; without them there are no charts."""
        self._history = history

    def log_sample(self, sample: Sample) -> None:
        """Log a sample: scalars, images if the drawing budget allows, the verdict, and notifications of alerts."""
        self._num_samples += 1
        summaries, details = summary_scalars(sample), self._head_scalars(sample)
        if not self._defined:
            self._announce()
        # A key that a chart shows gets no panel: a thousand panels make the page unusable.
        hidden = {*details, *(key for key in summaries if self._charted(key))}
        scalars = {**summaries, **details}
        self._define(step_key(sample), scalars, hidden)
        drawn = self._drawn(sample, self._num_samples >= self._layers_due) if self._budget.allows(sample) else {}
        drawn |= self._evidence(sample)
        self._rows.add(step_key(sample), scalars, drawn)
        self._run.summary[f"{key_prefix(sample)}/verdict"] = sample.verdict
        for notification in notifications_of(sample.events, sample.firing, sample.coverage, sample.evidence):
            level = {"info": "INFO", "warning": "WARN", "error": "ERROR"}[notification.level]
            self._run.alert(title=notification.title, text=notification.text, level=level)

    def close(self) -> None:
        """Draw the last sample if it is pending; the run stays open, because it is the user's."""
        if (sample := self._budget.pending) is not None:
            drawn = self._drawn(sample, with_layers=True)
            self._rows.add(step_key(sample), {step_key(sample): sample.global_step}, drawn)

    def _charted(self, key: str) -> bool:
        drawn = bool(self._budget) and self._history is not None and find_spec("plotly") is not None
        return drawn and key.endswith(BAND_KEYS)

    def _define(self, x_axis: str, row: Mapping[str, Any], hidden: set[str]) -> None:
        if x_axis not in self._defined:
            self._run.define_metric(x_axis, hidden=True)
            self._defined.add(x_axis)
        for key in row.keys() - self._defined:
            self._run.define_metric(key, step_metric=x_axis, hidden=key in hidden or None)
        self._defined.update(row)

    def _drawn(self, sample: Sample, with_layers: bool) -> dict[str, Any]:
        """Draw the heatmaps of a sample and the charts of the curves up to it."""
        with first_import("wandb"):
            import wandb
        with self._budget.drawing():
            drawn = {
                heatmap_key(sample, metric): wandb.Image(image) for metric, image in heatmap_images(sample).items()
            }
            drawn |= _plotly_figures(self._charts(sample, with_layers))
            self._define(step_key(sample), drawn, hidden=set())
            return drawn

    def _evidence(self, sample: Sample) -> dict[str, Any]:
        """Return one picture of the heads whose alarms began: few, and nobody wants to wait for the budget."""
        if not (self._budget and sample.evidence):
            return {}
        with first_import("wandb"):
            import wandb
        with self._budget.spending():
            prefix = key_prefix(sample)
            drawn = {f"{prefix}/{name}": wandb.Image(image) for name, image in evidence_images(sample).items()}
        self._define(step_key(sample), drawn, hidden=set())
        return drawn

    def _charts(self, sample: Sample, with_layers: bool) -> dict[str, Chart]:
        history, prefix = self._history, key_prefix(sample)
        if history is None or len(history) < 2:
            return {}
        charts = {f"{prefix}/{metric}/heads": model_chart(history, sample, metric) for metric in history}
        charts[f"{prefix}/ranks"] = rank_chart(history)
        if with_layers:
            # The charts of all layers are large. Sent again only after twice as many samples, all versions add up to at
            # most twice the size of the last one.
            self._layers_due = 2 * self._num_samples
            charts |= {f"{prefix}/{metric}/layers": layers_chart(history, sample, metric) for metric in history}
        return {key: chart for key, chart in charts.items() if chart}

    def _announce(self) -> None:
        with first_import("wandb"):
            import wandb
        what = "every head has a curve" if self._head_scalars.every_head else "summaries and outlier heads"
        wandb.termlog(
            f"attnmonitor: at most {self._head_scalars.num_keys:,} keys in this run ({what}; cap {self._max_keys:,})"
        )


def _is_ours(entry: Any) -> bool:
    """Return whether a value in a run's configuration was put there by monitors, or is empty."""
    return isinstance(entry, Mapping) and all(
        isinstance(each, Mapping) and "attnmonitor_version" in each for each in entry.values()
    )


def _plotly_figures(charts: Mapping[str, Chart]) -> dict[str, Any]:
    """Return the charts as ``wandb.Plotly`` objects; none where plotly is missing."""
    with first_import("wandb"):
        import wandb
    if find_spec("plotly") is None:
        _logger.info("no charts of curves: they need plotly (pip install 'attnmonitor[wandb]')")
        return {}
    return {key: wandb.Plotly(as_figure(chart)) for key, chart in charts.items()}
