"""A forward in step: a collective starts only when all of its processes are about to start the same one.

Of a model's first forward nothing is known. A process that fails in it cannot join the collectives that remain, another
one may come to a different collective, and a call that could not be joined is seen only when it comes. So before each
collective the processes tell each other what comes next on each, within the time limit of their exchange. What fails on
one of them, or does not fit together, then ends the forward on all of them before anything has been started.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import distributed, nn

from attnmonitor.parallel.collectives import (
    Collective,
    CollectiveMode,
    group_of,
    name_of,
    running_module,
    why_not_joinable,
)
from attnmonitor.parallel.exchange import Exchange, MissingProcessError

__all__ = ["NotTogetherError", "OtherProcessError", "in_step"]


class OtherProcessError(RuntimeError):
    """The forward failed on another process.

    Attributes:
        kind: Name of the exception's class there.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class NotTogetherError(RuntimeError):
    """The forward comes to a collective that cannot be joined, or to different ones on its processes."""


@dataclass(frozen=True)
class _Next:
    """What comes next in a process's forward.

    Attributes:
        collective: Name of the collective that it is about to start; ``""`` at the end of the forward.
        ranks: The processes of the collective.
        place: The module that calls it.
        not_joinable: Why a process that fails could not join the collective.
        failure: The exception that has ended the forward, and the name of its class.
    """

    collective: str = ""
    ranks: tuple[int, ...] = ()
    place: str = ""
    not_joinable: str = ""
    failure: tuple[str, str] | None = None

    @property
    def call(self) -> tuple[str, tuple[int, ...]]:
        return self.collective, self.ranks


@contextmanager
def in_step(exchange: Exchange, ranks: Sequence[int], model: nn.Module) -> Iterator[None]:
    """Run a forward in this context as all the others do, or raise on all of them.

    Args:
        exchange: Of the processes that run the forward.
        ranks: These processes.
        model: Its modules are named in messages.

    Raises:
        OtherProcessError: It failed on another process. What fails on this one is raised as it is.
        NotTogetherError: A collective cannot be joined, or is another one on other processes; it was not started.
        MissingProcessError: A process did not come to the same place in time.
    """
    failure: Exception | None = None
    try:
        with _InStep(exchange, ranks, model) as steps:
            try:
                yield
            except Exception as error:
                failure = error
        if steps.ended is None:
            steps.end(failure)
        if failure is not None and steps.ended is failure:
            raise failure
        if steps.ended is not None:  # the model may have caught it, or made another exception of it
            raise steps.ended from failure
    finally:
        del failure  # else this frame would keep the tensors of a failed forward alive


class _InStep(CollectiveMode):
    """Waits before each collective until all of its processes have come to it.

    Attributes:
        ended: What has ended the forward on all processes.
    """

    def __init__(self, exchange: Exchange, ranks: Sequence[int], model: nn.Module) -> None:
        super().__init__()
        self._exchange = exchange
        self._ranks = tuple(ranks)
        self._model = model
        self.ended: Exception | None = None

    def before(self, call: Collective) -> None:
        """Wait until all processes of a collective are about to start it."""
        group = group_of(call)
        ranks = self._ranks if group is None else tuple(distributed.get_process_group_ranks(group))
        if len(ranks) <= 1:
            return
        if self.ended is None:
            self._tell(_Next(name_of(call), ranks, running_module(self._model), why_not_joinable(call)))
        if self.ended is not None:
            raise self.ended

    def end(self, failure: Exception | None) -> None:
        """Tell the others that the forward has ended here, and wait until it has on all of them."""
        self._tell(_Next(failure=None if failure is None else (_text(failure), type(failure).__name__)))
        if failure is not None and not isinstance(self.ended, MissingProcessError):
            self.ended = failure  # as it is

    def _tell(self, own: _Next) -> None:
        may_go_on = False
        while not may_go_on and self.ended is None:
            try:
                by_rank = dict(zip(self._ranks, self._exchange.gather(own), strict=True))
            except MissingProcessError as error:
                self.ended = error
                return
            started = {each.call for each in by_rank.values() if each.collective and _is_complete(each, by_rank)}
            have_all_ended = not any(each.collective for each in by_rank.values())
            self.ended = _why_ended(by_rank, bool(started) or have_all_ended)
            may_go_on = own.call in started or have_all_ended


def _text(failure: Exception) -> str:
    # Not `str` of any exception: it may fail.
    return str(failure) if isinstance(failure, ValueError) else traceback.format_exception_only(failure)[-1].strip()


def _is_complete(call: _Next, by_rank: dict[int, _Next]) -> bool:
    return all(rank in by_rank and by_rank[rank].call == call.call for rank in call.ranks)


def _why_ended(by_rank: dict[int, _Next], fits: bool) -> Exception | None:
    """Return what ends the forward on all processes, the same on each."""
    for rank, each in by_rank.items():
        if each.failure is not None:
            return OtherProcessError(f"on process {rank}: {each.failure[0]}", each.failure[1])
    for each in by_rank.values():
        if each.not_joinable:
            return NotTogetherError(f"{each.not_joinable}, in {each.place}")
    if fits:
        return None
    said = [
        f"process {rank} comes to {f'{each.collective} of processes {[*each.ranks]} in {each.place}'}"
        if each.collective
        else f"process {rank} to the end"
        for rank, each in by_rank.items()
    ]
    return NotTogetherError(f"its processes do not run the same collectives: {', '.join(said[:8])}")
