"""What TensorBoard gets of a sample: curves and one chart of all heads per metric, verdict and alarms.

TensorBoard groups curves by the part of their name before the first slash. With the names of other trackers every curve
of a run would be a card of one group, hundreds of them; so here the group is ``attention.<metric>``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from attnmonitor.alerts import notifications_of
from attnmonitor.loggers.keys import key_prefix
from attnmonitor.messages import printable
from attnmonitor.sample import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Board", "is_summary_writer"]

_LAYOUT_FOLDER = "attention"  # below that of the run: a layout of the user's own stays the only one in its folder


def is_summary_writer(experiment: Any) -> bool:
    """Return whether an object is a ``SummaryWriter``, of torch or of tensorboardX."""
    needed = ("add_scalar", "add_image", "add_text", "add_custom_scalars")
    return all(callable(getattr(experiment, name, None)) for name in needed)


class Board:
    """Writes to a ``SummaryWriter``.

    Args:
        writer: The writer.
        log_metrics: Takes the scalars in its place: that of a logger which adds a prefix of its own.
    """

    takes_images = True

    def __init__(self, writer: Any, log_metrics: Callable[..., object] | None = None) -> None:
        self._writer = writer
        self._log_metrics = log_metrics or self._log_to_writer
        self._said: str | None = None
        self._has_layout = False

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        self._log_metrics({_tag(key): value for key, value in scalars.items()}, step=step)

    def add_image(self, key: str, image: Image, step: int) -> None:
        """Add an image."""
        self._writer.add_image(_tag(key), np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def add_words(self, sample: Sample) -> None:
        """Add what alarms say, the verdict where it is another one, and once the layout of the charts."""
        if not self._has_layout:
            self._has_layout = True
            self._add_layout(sample)
        prefix = key_prefix(sample).replace("/", ".")
        for notification in notifications_of(sample.events, sample.firing, sample.coverage):
            text = f"{notification.title}\n{notification.text}"
            self._writer.add_text(f"{prefix}.alerts/{notification.rule}", _as_markdown(text), sample.global_step)
        # Not whenever a number in it is another one: with each sample there would be a text to scroll past.
        alarms = sorted(str(event.key) for event in sample.firing)
        says = str(alarms) if alarms else re.sub(r"[0-9]+", "", sample.verdict)
        if says != self._said:
            self._said = says
            self._writer.add_text(f"{prefix}/verdict", _as_markdown(sample.verdict), sample.global_step)

    def _log_to_writer(self, scalars: Mapping[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def _add_layout(self, sample: Sample) -> None:
        prefix = key_prefix(sample).replace("/", ".")
        layout = {}
        for metric in sample.values:
            group = f"{prefix}.{metric}"
            heads = rf"{group}/layer_\d+/head_\d+".replace(".", r"\.")
            margin = [f"{group}/{name}" for name in ("median", "q25", "q75")]
            layout[group] = {"all heads": ["Multiline", [heads]], "median, half of the heads": ["Margin", margin]}
        folder = f"{self._writer.log_dir}/{_LAYOUT_FOLDER}"
        writer = type(self._writer)(folder)
        writer.add_custom_scalars(layout)
        writer.close()


def _tag(key: str) -> str:
    """Return a key with its first parts joined by dots, so that each metric is a group.

    Example:
        >>> _tag("attention/energy_rms/layer_03/head_07"), _tag("attention/short/energy_rms/median")
        ('attention.energy_rms/layer_03/head_07', 'attention.short.energy_rms/median')
    """
    *groups, name = key.split("/")
    details = [part for part in groups if part.startswith("layer_")]
    return "/".join([".".join(part for part in groups if part not in details), *details, name])


def _as_markdown(text: str) -> str:
    """Return the text as it is: TensorBoard reads Markdown, and four spaces make a line one of code."""
    return "\n".join(f"    {line}" for line in printable(text).splitlines())
