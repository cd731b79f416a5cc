"""The evidence of a head as a picture: where it looks, and which key positions stand out, now and before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from attnmonitor.messages import printable, tail_of
from attnmonitor.plots.style import new_figure, strip, title
from attnmonitor.sample import HeadEvidence
from attnmonitor.summary.style import ALARM_COLOR, BAND_COLOR, FAINT_INK, HEAD_COLORS, OTHER_HEADS_COLOR

__all__ = ["evidence"]

_MOST_HEADS = 4
_MOST_POSITIONS = 8
_MAX_NAME = 44  # characters


def evidence(heads: HeadEvidence | Sequence[HeadEvidence]) -> Figure:
    """Draw the evidence of a head, or of up to four, each beside its last healthy sample.

    Args:
        heads: From `AttentionMonitor.inspect`, ``sample.evidence`` or ``RunRecord.evidence``.

    Returns:
        The figure.
    """
    given = [heads] if isinstance(heads, HeadEvidence) else heads
    # Several rules may have seen one head in one sample.
    shown = list({(each.layer, each.scope, each.head, each.global_step): each for each in given}.values())[:_MOST_HEADS]
    figure = new_figure(11, 2.9 * max(1, len(shown)))
    rows = figure.subplots(max(1, len(shown)), 3, squeeze=False, width_ratios=(1.3, 1, 1))
    for row, each in zip(rows, shown, strict=False):
        _bars(row[0], each)
        _attention(row[1], each, f"attention, step {each.global_step:,}")
        if each.healthy is None:
            row[2].set_axis_off()
        else:
            _attention(row[2], each.healthy, f"healthy, step {each.healthy.global_step:,}")
    if not shown:
        for ax in rows[0]:
            ax.set_axis_off()
    return figure


def _bars(ax: Axes, head: HeadEvidence) -> None:
    places = head.positions[:_MOST_POSITIONS]
    heights = np.arange(len(places))
    leverage, shares = (np.nan_to_num(np.array([place[which] for place in places], dtype=float)) for which in (2, 3))
    ax.barh(heights - 0.2, leverage, 0.38, color=OTHER_HEADS_COLOR, label="leverage")
    ax.barh(heights + 0.2, shares, 0.38, color=HEAD_COLORS[0], label="share of the energy")
    labels = [
        f"{sequence}:{position}" + ("" if token is None else f" {_drawable(token)}")
        for sequence, position, _, _, token in places
    ]
    ax.set_yticks(heights, labels)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    strip(ax)
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, fontsize=7, loc="lower right")
    name = printable(tail_of(head.layer, _MAX_NAME), one_line=True).replace("$", r"\$")
    title(ax, f"{name} {head.noun} {head.head}", "" if head.rule is None else printable(head.rule, one_line=True))
    ax.set_xlabel("sequence:position of the key" if places else "no key position stands out")


def _drawable(token: str) -> str:
    """A token without what matplotlib reads as mathematics, and what its font does not have as escapes."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    text = "".join(char if ord(char) in known else char.encode("unicode_escape").decode() for char in token)
    return printable(text, one_line=True).replace("$", r"\$")


def _attention(ax: Axes, head: HeadEvidence, text: str) -> None:
    colors = colormaps["viridis"].with_extremes(bad=ALARM_COLOR)
    if head.attention.numel():
        ax.imshow(
            head.attention.numpy(), aspect="auto", cmap=colors, norm=PowerNorm(0.5, 0, 1), interpolation="nearest",
            extent=(0, head.num_keys, len(head.rows), 0),
        )  # fmt: skip
    step = max(1, len(head.rows) // 4)
    ax.set_yticks(
        np.arange(0, len(head.rows), step) + 0.5,
        [f"{sequence}:{position}" for sequence, position in head.rows[::step]],
    )
    ax.tick_params(labelsize=7, color=FAINT_INK)
    ax.set_xlabel("key position", fontsize=8, color=FAINT_INK)
    ax.set_title(text, loc="left", fontsize=9, color=BAND_COLOR)
