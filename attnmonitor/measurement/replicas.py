"""One measurement by processes that each hold the whole model: all run the probe, and each finishes some layers.

The forward needs no other process, so it is that of one process, and what follows the last attention may be skipped.
One exchange at the end joins the numbers. What failed on one process counts as failed on all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import distributed, nn

from attnmonitor.measurement import Measured, Measurement
from attnmonitor.measurement.kept import Keeper
from attnmonitor.measurement.outcomes import take_together
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.shares import Share
from attnmonitor.parallel.exchange import Exchange, MissingProcessError

__all__ = ["ReplicaMeasurement"]


class ReplicaMeasurement(Measurement):
    """A `Measurement` that replicas of a model take at the same time, with the same result on each.

    Args:
        model: The unwrapped model.
        probe: The batch and how to run it.
        metrics: Names of the metrics, in table order.
        strict: Raise an error in one layer; otherwise that layer is NaN and the others are measured.
        ranks: The processes that hold a replica.
        attempt: As for `Exchange`.
        keeper: As for `Measurement`.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        metrics: Sequence[str],
        *,
        strict: bool = False,
        ranks: Sequence[int],
        attempt: int = 0,
        keeper: Keeper | None = None,
    ) -> None:
        super().__init__(model, probe, metrics, strict=strict, keeper=keeper)
        self._ranks = tuple(ranks)
        self._exchange = Exchange(ranks, attempt)

    def attach(self) -> Measured:
        """Measure once on each process, and deal out the layers.

        Raises:
            ValueError, LoneCollectiveError: As for one process.
            ValueError: A process did not attach in time, or has another probe or other layers; raised on all of them.
        """
        measured = super().attach()
        own = self._probe.fingerprint, tuple(measured.coverage)
        processes = f'processes="all": processes {", ".join(map(str, self._ranks))}'
        try:
            probes, layers = (set(each) for each in zip(*self._exchange.gather(own), strict=True))
        except MissingProcessError as error:
            raise ValueError(
                f'{processes} share the work, and {error}; attach a monitor on each of them, or give processes="first"'
            ) from error
        if len(probes) > 1 or len(layers) > 1:
            what = f"{len(probes)} different probes" if len(probes) > 1 else "models with different attention layers"
            raise ValueError(
                f"{processes} have {what}, and none can finish a layer for the others; give all of them the same "
                'batch, or processes="first"'
            )
        self.share = Share(self._ranks.index(distributed.get_rank()), len(self._ranks), own[1])
        return measured

    def _attempt(self, probe: Probe, with_weights: bool) -> Measured:
        """Measure once, join what each process has finished, and raise what `take_together` raises."""
        measure = partial(super()._attempt, probe, with_weights)
        measured, _ = take_together(measure, self._exchange, self._ranks, self.share)
        return measured
