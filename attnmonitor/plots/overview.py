"""One picture of a run: verdict, loss, and for each metric the last sample beside the bands over training."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from attnmonitor.plots.curves import bands, measured_samples
from attnmonitor.plots.heatmap import heatmap
from attnmonitor.plots.loss import loss
from attnmonitor.plots.style import new_figure
from attnmonitor.record import RunRecord
from attnmonitor.summary.logged import loss_and_rate
from attnmonitor.summary.style import STATE_COLORS
from attnmonitor.summary.verdict import verdict

__all__ = ["overview"]

OVERVIEW_METRICS = ("key_incoherence", "energy_rms", "energy_effective_rank", "key_norm_participation")


def overview(record: RunRecord, *, metrics: Sequence[str] = OVERVIEW_METRICS) -> Figure:
    """One picture of a run: the verdict, and for each metric the heads now and the bands over training.

    Above the bands, over the same steps, are the loss and the learning rate where training has logged them.

    Args:
        record: The run.
        metrics: Rows of the picture; those the record does not have are left out.

    Returns:
        The figure.
    """
    shown = [metric for metric in metrics if metric in record.metrics] or list(record.metrics[:4])
    logged = loss_and_rate(record.logged)
    heights = ([0.55] if logged else []) + [1.0] * max(1, len(shown))
    figure = new_figure(15, 1.3 + 3.6 * sum(heights))
    events, counts = record.events, record.counts
    grid = figure.add_gridspec(len(heights), 2, width_ratios=(1, 1.35), height_ratios=heights, wspace=0.05, hspace=0.06)
    over_steps = [figure.add_subplot(grid[0, 1])] if logged else []
    if logged:
        loss(logged, events=events, ax=over_steps[0])
    for row, metric in enumerate(shown, start=len(over_steps)):
        curves = record.trajectories(metric)
        steps, measured = measured_samples(record.steps, curves)
        last = {
            layer: heads[-1] if len(steps) else np.full(heads.shape[1], np.nan) for layer, heads in measured.items()
        }
        left, right = (
            figure.add_subplot(grid[row, 0]),
            figure.add_subplot(grid[row, 1], sharex=over_steps[0] if over_steps else None),
        )
        over_steps.append(right)
        step = int(steps[-1]) if len(steps) else None
        heatmap(last, metric=metric, events=counts.firing, coverage=counts.coverage, global_step=step, ax=left)
        bands(curves, record.steps, metric=metric, events=events, coverage=counts.coverage, num_named=4, ax=right)
    line, color = verdict(counts), STATE_COLORS[counts.state]
    figure.suptitle(textwrap.fill(line, 110), x=0.012, ha="left", fontsize=15, fontweight="bold", color=color)
    return figure
