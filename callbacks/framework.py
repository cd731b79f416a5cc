"""The arguments that the framework callbacks share: checked when given, used to attach when training begins."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed, nn
from torch.utils.data import DataLoader

from attnmonitor import AttentionMonitor
from attnmonitor.measurement.loader import CannotCopyError, EmptyLoaderError, draw_first_batch
from attnmonitor.measurement.probe import (
    ForwardFunction,
    RejectedBatchError,
    UnseenAttentionError,
    default_forward,
)
from attnmonitor.messages import warn
from attnmonitor.monitor.schedules import Schedule, one_schedule
from attnmonitor.monitor.settings import check_settings
from attnmonitor.parallel.exchange import Exchange, MissingProcessError
from attnmonitor.parallel.wrappers import unwrap

__all__ = ["FrameworkCallback", "check_keywords", "drawn"]

T = TypeVar("T")


def check_keywords(settings: Mapping[str, Any]) -> None:
    """Raise TypeError where `AttentionMonitor` does not take a keyword, and name the nearest that it takes."""
    known = [*inspect.signature(AttentionMonitor).parameters, "every_n_steps"]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known[2:])}"
            raise TypeError(f"unexpected keyword argument {name!r}; {hint}")


class FrameworkCallback:
    """Constructor of the framework callbacks; each documents the arguments for its framework.

    Attributes:
        monitor: The `AttentionMonitor`, once training has begun.
    """

    def __init__(
        self,
        probe: Any = None,
        *,
        every_n_steps: int | None = None,
        schedule: int | Schedule | Iterable[int] | None = None,
        loggers: Any = None,
        record: bool | str | Path | None = True,
        forward: ForwardFunction | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        check_keywords(settings)
        check_settings(loggers=loggers, forward=forward, name=name, **settings)  # not only when training begins
        self.monitor: AttentionMonitor | None = None
        self._exchange: Exchange | None = None
        self._probe = probe
        self._schedule = one_schedule(every_n_steps, schedule)
        self._loggers = loggers
        self._record = record
        self._forward = forward or default_forward
        self._name = name
        self._settings = settings
        self._rejections: list[str] = []
        self._warned_of_model = False

    def _begin_run(self) -> None:
        """Forget what belonged to an earlier run."""
        self._rejections = []
        self._exchange = Exchange(range(distributed.get_world_size())) if distributed.is_initialized() else None

    def _attach(
        self, model: nn.Module, probes: Iterable[Any], *, loggers: Any, folder: str | Path, forward: ForwardFunction
    ) -> AttentionMonitor | None:
        """Make a monitor with the first probe that shows attention; by default its record is in the framework's folder.

        Returns:
            The monitor, also in `monitor`; None where no probe was given by the user and the model takes none, here or
            on another process.

        Raises:
            ValueError: `AttentionMonitor` refuses an argument, or the probe that the user gave.
        """
        self.monitor = None
        for probe in probes:
            try:
                self.monitor = AttentionMonitor(
                    model,
                    probe,
                    self._schedule,
                    loggers=loggers,
                    record=Path(folder) / "attnmonitor_runs" if self._record is True else self._record,
                    forward=forward,
                    name=self._name,
                    **self._settings,
                )
            except (RejectedBatchError, UnseenAttentionError) as error:
                if self._probe is not None:
                    raise
                self._rejections.append(str(error))
            else:
                break
        # All processes or none take part in samples: they exchange what alerts ask for.
        if self._probe is None and not self._on_all(self.monitor is not None):
            if self.monitor is not None:
                self.monitor.close()
            self.monitor = None
        return self.monitor

    def _from_first(self, own: T, otherwise: T) -> T:
        """Return the first process's object on all of them; from when one was missing in time, ``otherwise``."""
        if not distributed.is_initialized():
            return own
        if self._exchange is None:
            return otherwise
        try:
            shared: T = self._exchange.from_first(own)
        except MissingProcessError as error:
            self._exchange = None  # on all processes; each further one would make training wait again
            warn(f"attnmonitor: {error}: alerts can no longer ask this training to stop or to save a checkpoint")
            return otherwise
        return shared

    def _on_all(self, own: bool) -> bool:
        """Return whether it holds on all processes; False where one was missing in time."""
        if not distributed.is_initialized():
            return own
        try:
            return self._exchange is not None and all(self._exchange.gather(own))
        except MissingProcessError:
            self._exchange = None
            return False

    def _give_up(self) -> None:
        """Warn that the run is not watched, because the model took no default probe; raise if strict."""
        tried = "; ".join(dict.fromkeys(self._rejections)) or "the loaders gave no batch; give one: probe=..."
        message = f"attnmonitor: this run is not watched, no default probe fits the model: {tried}"
        if self._settings.get("strict"):
            raise RejectedBatchError(message)
        warn(message)

    def _warn_of_other_model(self, model: nn.Module) -> None:
        """Warn once if the model that is trained is not the one that is measured."""
        if self.monitor is not None and unwrap(model) is not self.monitor.model and not self._warned_of_model:
            self._warned_of_model = True
            warn(
                "attnmonitor: the model that is trained was replaced, and the one from the start of training is still "
                "measured; start training again to watch the new one"
            )


def drawn(loaders: Iterable[Any]) -> Iterator[Any]:
    """Yield the first batch of each DataLoader that has one and that can be copied."""
    for loader in loaders:
        if isinstance(loader, DataLoader):
            with suppress(CannotCopyError, EmptyLoaderError):
                yield draw_first_batch(loader)
