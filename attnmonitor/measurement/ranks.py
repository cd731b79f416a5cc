"""Which processes measure: the first one for all, or all together; asked at attach and again before each sample.

Where every process holds the whole model, as in data parallelism, the first measures for all, or all share the work if
they are asked to. Where a forward needs other processes, all of them measure together: a sharded model is recognized by
its weights; experts, tensor parallelism written by hand and all else by the first collective of a forward that each
process runs alone at attach, stopped before it starts. All processes run the same model, so all decide alike without a
word between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import distributed, nn

from attnmonitor.functional.routes import RouteChoice
from attnmonitor.measurement import Measured, Measurement
from attnmonitor.measurement.distributed import DistributedMeasurement, check_joinable
from attnmonitor.measurement.kept import Keeper, KeptLayer
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.replicas import ReplicaMeasurement
from attnmonitor.measurement.unfinished import Unfinished
from attnmonitor.parallel.collectives import LoneCollectiveError, is_point_to_point, why_not_joinable
from attnmonitor.parallel.exchange import MissingProcessError, refuse
from attnmonitor.parallel.fsdp import enclosing_fsdp1
from attnmonitor.parallel.groups import ModelGroup, model_group
from attnmonitor.parallel.sharding import check_known_sharding, is_sharded
from attnmonitor.sample import LayerCoverage

__all__ = ["NoMeasurement", "RankMeasurement"]


_num_attempts: Counter[tuple[int, ...]] = Counter()
"""Monitors attached to a model of each group of processes, the same number on all of them."""


class NoMeasurement:
    """The measurement of a monitor that is a copy: no process takes it.

    Args:
        after_last_attention: Of the original.
    """

    is_main = measures = False
    route = RouteChoice("cpu")

    def __init__(self, after_last_attention: str) -> None:
        self.after_last_attention = after_last_attention

    def follow_model(self) -> None:
        """Do nothing."""

    def look(self, layer: str) -> KeptLayer:
        """Raise RuntimeError: a copy has no model."""
        raise RuntimeError(f"{layer}: this monitor is a copy, without a model; ask the one that was attached")


class RankMeasurement:
    """The measurement of a model, as this process takes part in it.

    Args:
        model: The unwrapped model.
        probe: The batch and how to run it.
        metrics: Names of the metrics, in table order.
        strict: Raise an error in one layer; otherwise that layer is NaN and the others are measured.
        processes: ``"first"`` or ``"all"``: which measure where each holds the whole model.

    Attributes:
        keeper: Keeps layers of this process's forward until the sample was judged.
    """

    def __init__(
        self, model: nn.Module, probe: Probe, metrics: Sequence[str], *, strict: bool = False, processes: str = "first"
    ) -> None:
        self.keeper = Keeper()
        self._group = model_group(model)
        self._model = model
        self._arguments = probe, metrics
        self._strict = strict
        self._shares = processes == "all"
        self._num_looks = 0
        self._attempt = 0
        self._parts: list[object] = []  # of the model when it was last looked at
        self._measurement = Measurement(model, probe, metrics, strict=strict, keeper=self.keeper)
        self._attached = False
        self._refusal: ValueError | None = None

    @property
    def layers(self) -> Mapping[str, LayerCoverage]:
        """Coverage at attach."""
        return self._measurement.layers

    @property
    def num_heads(self) -> dict[str, dict[str, int]]:
        """Heads per scope of every layer that has heads."""
        return self._measurement.num_heads

    @property
    def signature(self) -> str:
        """Hash of the names and head counts of the layers."""
        return self._measurement.signature

    @property
    def route(self) -> RouteChoice:
        """Which way the eigenproblems go."""
        return self._measurement.route

    @property
    def after_last_attention(self) -> str:
        """``"skipped"`` where the last forward computed nothing after its last attention; else why it did."""
        return self._measurement.after_last_attention

    @property
    def is_main(self) -> bool:
        """Whether this process writes, logs and alerts for all that share the model."""
        return self._group.is_main

    @property
    def measures(self) -> bool:
        """Whether this process takes the next measurement."""
        return self._group.is_main or isinstance(self._measurement, DistributedMeasurement | ReplicaMeasurement)

    def attach(self) -> Measured:
        """Measure once on every process, to find out who measures and what is measured.

        Raises:
            ValueError: As `Measurement.attach`; or the model is spread over processes in a way that is not supported.
        """
        _num_attempts[self._group.ranks] += 1
        self._attempt = _num_attempts[self._group.ranks]
        self.follow_model()
        if self._refusal is not None:
            raise self._refusal
        try:
            return self._attach()
        except LoneCollectiveError as error:
            if is_point_to_point(error.collective):
                check_joinable(self._model, f"{why_not_joinable(error.collective)}, in {error.place}")
        except ValueError as error:
            # The others may have come to a collective before which this process has failed.
            if distributed.is_initialized() and not isinstance(self._measurement, DistributedMeasurement):
                refuse(self._group.ranks, self._attempt, str(error))
            raise
        self._use_all(DistributedMeasurement, self._model, self._group)
        return self._attach()

    def _attach(self) -> Measured:
        measured = self._measurement.attach()
        self._attached = True
        return measured

    def follow_model(self) -> None:
        """Measure as the model is spread now, if it has been sharded or wrapped since the last time."""
        if not distributed.is_initialized():
            return
        parts: list[object] = [(id(each), type(each)) for each in self._model.modules()]
        parts += [(type(each), each.shape) for each in self._model.parameters()]
        # Wrappers around the model leave no trace in it: they are looked for at attach and before the first sample.
        if parts == self._parts and self._num_looks > 1:
            return
        self._num_looks += 1
        self._parts, self._refusal = parts, None
        try:
            check_known_sharding(self._model)
            model = enclosing_fsdp1(self._model)
        except ValueError as error:
            self._refusal = error
            return
        self._follow(model, model_group(model))

    def take(self, *, with_weights: bool = False) -> Measured:
        """Measure once, see `Measurement.take`.

        Raises:
            MissingProcessError: Not all processes that share the model take part.
            ValueError: The model cannot be measured any more in the way it is wrapped now.
        """
        if self._refusal is not None:
            raise self._refusal
        if not self._attached:
            try:
                self._attach()
            except ValueError as error:
                if isinstance(error.__cause__, MissingProcessError):
                    raise error.__cause__ from None
                raise
        return self._measurement.take(with_weights=with_weights)

    def begin(self, *, with_weights: bool = False) -> Measured | Unfinished[Measured]:
        """Measure once, see `Measurement.begin`; at once where processes have to know together when a sample ends.

        Raises:
            MissingProcessError, ValueError: As `take`.
        """
        if distributed.is_initialized() or self._refusal is not None or not self._attached:
            return self.take(with_weights=with_weights)
        return self._measurement.begin(with_weights=with_weights)

    def look(self, layer: str) -> KeptLayer:
        """Run the probe once for the attention of one layer, on this process alone; see `Measurement.look`.

        Raises:
            RuntimeError: As there; or the forward needs other processes, which would have to take part.
        """
        self.follow_model()
        if isinstance(self._measurement, DistributedMeasurement) or self._refusal is not None:
            raise RuntimeError(
                f"{layer}: the forward of this model needs all processes, and one process alone would wait for the "
                "others for ever; the evidence of alarms is taken with the samples: RunRecord.open(path).evidence"
            )
        return self._measurement.look(layer)

    def nothing(self, reason: str) -> Measured:
        """The result of a measurement that failed as a whole: NaN for every head."""
        return self._measurement.nothing(reason)

    def _follow(self, model: nn.Module, group: ModelGroup) -> None:
        """Measure ``model`` from now on: the same, now sharded or shared by other processes, or its wrapper."""
        is_new = model is not self._model
        is_changed = is_new or group != self._group
        self._model, self._group = model, group
        kind: type[DistributedMeasurement | ReplicaMeasurement] | None = None
        if is_sharded(model) or isinstance(self._measurement, DistributedMeasurement):
            kind = DistributedMeasurement
        elif self._shares and len(group.ranks) > 1:
            kind = ReplicaMeasurement
        if kind is None:
            if is_new:
                self._use(Measurement(model, *self._arguments, strict=self._strict, keeper=self.keeper))
        elif is_changed or not isinstance(self._measurement, kind):
            self._use_all(kind, model, group)

    def _use_all(
        self, kind: type[DistributedMeasurement | ReplicaMeasurement], model: nn.Module, group: ModelGroup
    ) -> None:
        """Measure with the other processes of the group from now on."""
        arguments = (model, *self._arguments)
        self._use(kind(*arguments, strict=self._strict, ranks=group.ranks, attempt=self._attempt, keeper=self.keeper))

    def _use(self, measurement: Measurement) -> None:
        measurement.layers = self._measurement.layers  # until it is attached
        self._measurement, self._attached = measurement, False
