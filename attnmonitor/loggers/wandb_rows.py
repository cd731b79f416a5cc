"""Points added to a W&B run whose rows and steps belong to the user.

A W&B row holds one value per key. Who commits a row closes it and advances the run's step, and a later row with a
smaller step is dropped. So a monitor that commits moves or loses rows of the user, whatever their cadence: an explicit
``step=`` behind the advanced step is lost, an implicit one is moved.

Here no row is committed while the run is live. A point joins the row that is open, at most one point per row, in the
order of the samples. Where samples are much more frequent than the user's rows, the newest point joins the next row, so
that W&B shows the present, and the older ones are kept. When the run finishes they follow in rows of their own, after
all of the user's. W&B plots them in place, because they have their own x-axis (``define_metric``).
"""

from __future__ import annotations

import atexit
import os
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnmonitor.messages import warn
from attnmonitor.parallel.process_state import first_import

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["RowsOfUser"]

# 8 bytes each: 64 MiB, which is 4,000 samples of 2,000 keys.
_MAX_PENDING_VALUES = 2**23

# With more points pending than this the user's rows cannot take them all: the newest is sent before the oldest.
_MAX_IN_ORDER = 3


@dataclass
class _Pending:
    """A point that is not sent yet, its numbers packed: as a dictionary they would take ten times the memory."""

    x_key: str
    keys: tuple[str, ...]
    values: array[float]
    media: Mapping[str, Any]

    def row(self) -> dict[str, Any]:
        scalars: dict[str, Any] = dict(zip(self.keys, self.values, strict=True))
        return {**scalars, self.x_key: int(scalars[self.x_key]), **self.media}


class RowsOfUser:
    """Adds points to the rows of a run and closes none before the run finishes.

    Args:
        run: The W&B run.
        commit: Close a row with every point: for a run that nothing else logs to.
    """

    def __init__(self, run: Run, *, commit: bool = False) -> None:
        self._run = run
        self._commit = commit or run.disabled  # a disabled run keeps no rows, and has no end
        self._pending: list[_Pending] = []
        self._newest: dict[str, float] = {}
        self._joined_step: int | None = None
        self._dropped = False
        self._pid = os.getpid()
        if not self._commit:
            _call_before_finish(run, self._send_pending)

    def add(self, x_key: str, scalars: Mapping[str, float], media: Mapping[str, Any]) -> None:
        """Send a point with the row that is open, or keep it where that row has one already.

        Args:
            x_key: Key of the x-axis, one of ``scalars``.
            scalars: Numbers by key.
            media: Images and charts by key.
        """
        # Adds nothing, and raises at once where the run is finished: asking such a run for its step takes 30 seconds.
        self._run.log({}, commit=False)
        self._newest.update(scalars)
        if self._commit:
            self._run.log({**scalars, **media}, commit=True)
            return
        self._keep(_Pending(x_key, tuple(scalars), array("d", map(float, scalars.values())), media))
        if self._joined_step != self._run.step:
            point = self._pending.pop(0 if len(self._pending) <= _MAX_IN_ORDER else -1)
            self._run.log(point.row(), commit=False)
            self._joined_step = self._run.step

    def _keep(self, point: _Pending) -> None:
        if self._pending and self._pending[-1].keys == point.keys:
            point.keys = self._pending[-1].keys  # one tuple for all
        if point.media:
            for older in self._pending:
                # An image of an older sample adds nothing to a newer one of the same kind.
                older.media = {key: media for key, media in older.media.items() if key not in point.media}
        self._pending.append(point)
        if sum(len(each.values) for each in self._pending) > _MAX_PENDING_VALUES:
            del self._pending[-2::-2]
            if not self._dropped:
                self._dropped = True
                warn(
                    "attnmonitor: thousands of samples wait for a row of the W&B run, so every second one is left out "
                    "there; the run's record has all of them. Log to the run more often, or give "
                    "WandbLogger(run, commit=True) if nothing else logs to it"
                )

    def _send_pending(self) -> None:
        """Send what is pending, in rows of its own, after the user's last row."""
        if os.getpid() != self._pid or not self._pending:
            return
        if self._joined_step == self._run.step:
            self._run.log({}, commit=True)
        for point in self._pending:
            self._run.log(point.row(), commit=True)
        self._pending.clear()
        self._run.summary.update(self._newest)  # W&B took it from the last row, which may be older than others


def _call_before_finish(run: Run, call: Callable[[], None]) -> None:
    """Have ``call()`` called once, when the run finishes or the program ends, while the run still takes rows."""
    with first_import("wandb.sdk.wandb_run"):
        from wandb.sdk.wandb_run import TeardownHook, TeardownStage

    def once() -> None:
        atexit.unregister(once)
        call()

    # W&B has no public hook at the end of a run. It is this list that its own notebook integration uses.
    run._teardown_hooks.append(TeardownHook(once, TeardownStage.EARLY))
    atexit.register(once)  # W&B ends an unfinished run at exit without its hooks; what is registered last runs first
