"""One measurement by all processes that share a model's weights.

Every process measures what it holds. Then they agree, with one gather of a few bytes: what failed on one of them has
failed for all, so that all of them know the same of a sample and none waits for another, now or at the next one; and
where memory was short, all of them try again with half of the probe. Where the heads of a layer are dealt out to
processes, those that share it put its heads together, once per sample.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from attnmonitor.capture.modules import own_name
from attnmonitor.measurement import LayerValues, Measured, Measurement
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.quiet import default_torch_state
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.parallel.collectives import Collective, CollectiveRecorder, run_with_zeros
from attnmonitor.parallel.head_slices import HeadSlice, head_slice
from attnmonitor.sample import LayerCoverage

__all__ = ["DistributedMeasurement"]

_REASON_LENGTH = 300  # characters of a reason that are sent to the other processes


class DistributedMeasurement(Measurement):
    """A `Measurement` that all processes of a sharded model take together; all of them are told the same.

    Args:
        model: The unwrapped model; its parameters are sharded.
        probe: The batch and how to run it.
        metrics: Names of the metrics, in table order.
        strict: Raise what goes wrong with one layer; otherwise that layer is NaN and the others go on.
    """

    def __init__(self, model: nn.Module, probe: Probe, metrics: Sequence[str], *, strict: bool = False) -> None:
        super().__init__(model, probe, metrics, strict=strict)
        self._own = Measurement(model, probe, metrics, strict=strict)
        self._slices: dict[str, HeadSlice] = {}
        self._unattributed: dict[str, str] = {}
        self._due: dict[Probe, Sequence[Collective]] = {}  # in a forward of each

    def attach(self) -> Measured:
        """Measure once, learn which heads this process holds, and put the layers together.

        The collectives of a forward are noted in one with the whole probe and one with half of it, which is what this
        costs beside the first.

        Raises:
            ValueError: As for one process; or processes that share a layer's heads have different probes.
        """
        self._own.attach()
        with _inside_forwards(self._model, self._find_slice), CollectiveRecorder() as whole:
            measured = self._own._attempt(self._probe, False)
        self._due[self._probe] = whole.calls
        self._try_half()
        for group in self._groups():
            if len(prints := set(_gather(self._probe.fingerprint, group))) > 1:
                raise ValueError(
                    f"probe: processes that share the heads of a layer have {len(prints)} different probes; give them "
                    "the same batch"
                )
        measured = self._put_together(measured, [each.lost for each in _gather(_Told.of(measured))])
        self.layers = measured.coverage
        return measured

    def _try_half(self) -> None:
        """Note the collectives of half of the probe; none has a half where one has none, or the model rejects one."""
        all_can = all(_gather(self._half is not None))
        if self._half is not None and all_can:
            with CollectiveRecorder() as half, suppress(Exception):
                self._own._attempt(self._half, False)
                self._due[self._half] = half.calls
            all_can = all(_gather(self._half in self._due))
        if not all_can:
            self._half = None

    def _attempt(self, probe: Probe, with_weights: bool) -> Measured:
        """Measure once, with all processes.

        Raises:
            torch.OutOfMemoryError: Memory did not suffice on one process: then on all, for all to try again, or none.
            RuntimeError: It failed on another process.
        """
        outcome: Measured | Exception
        with CollectiveRecorder() as done:
            try:
                outcome = self._own._attempt(probe, with_weights)
            except Exception as error:
                outcome = error
        if isinstance(outcome, Exception):
            if isinstance(outcome, torch.OutOfMemoryError):
                _let_go(outcome)
            run_with_zeros(self._due[probe][len(done.calls) :])
        told = _gather(_Told.of(outcome))
        try:
            if isinstance(outcome, Exception) or any(each.failure for each in told):
                raise _failure_of_all(told, outcome)
            return self._put_together(outcome, [each.lost for each in told])
        finally:
            del outcome  # a frame that holds what is raised in it would keep the broken forward's tensors

    def _find_slice(self, name: str, module: nn.Module) -> None:
        for layer, coverage in self._own.layers.items():
            if layer.partition("#")[0] == name and coverage.num_query_heads:
                found = head_slice(module, coverage.heads)
                if isinstance(found, HeadSlice):
                    self._slices[layer] = found
                elif found is not None:
                    self._unattributed[layer] = found

    def _groups(self) -> list[distributed.ProcessGroup]:
        """The groups that share layers, in an order that is the same on all processes."""
        return list(dict.fromkeys(each.group for each in self._slices.values()))

    def _put_together(self, measured: Measured, lost: Sequence[Mapping[str, str]]) -> Measured:
        """Take out what any process has lost, and join the slices of the layers that are dealt out."""
        coverage = dict(measured.coverage)
        for process, layers in enumerate(lost):
            for name, reason in layers.items():
                if name in coverage and coverage[name].measured:
                    coverage[name] = replace(coverage[name], reason=f"process {process}: {reason}")
        for name, reason in self._unattributed.items():
            coverage[name] = replace(coverage[name], reason=reason)
        values, spread = (
            {metric: dict(in_layers) for metric, in_layers in table.items()}
            for table in (measured.values, measured.spread)
        )
        diagnostics = dict(measured.diagnostics)
        with default_torch_state():
            for group in self._groups():
                names = [name for name, each in self._slices.items() if each.group is group]
                mine = {
                    "tables": [_of_layers(table, names) for table in (values, spread)],
                    "coverage": {name: coverage[name] for name in names},
                    "diagnostics": diagnostics,
                }
                parts = _gather(mine, group)
                for name in names:
                    splits_keys = self._slices[name].splits_keys
                    coverage[name] = _joined_coverage([part["coverage"][name] for part in parts], splits_keys)
                    for which, table in enumerate((values, spread)):
                        for metric, by_layer in table.items():
                            if METRICS[metric].scope == "query_head" or splits_keys:
                                by_layer[name] = torch.cat([part["tables"][which][metric][name] for part in parts])
                diagnostics = _joined_diagnostics([part["diagnostics"] for part in parts])
            for table in (values, spread):
                for by_layer in table.values():
                    for name, heads in by_layer.items():
                        if not coverage[name].measured:
                            by_layer[name] = torch.full_like(heads, torch.nan)
        return Measured(values, spread, coverage, diagnostics)


@dataclass(frozen=True)
class _Told:
    """What processes tell each other of an attempt.

    Attributes:
        lost: Layers without numbers, and why.
        failure: What went wrong with all of it; ``""`` where nothing did.
        out_of_memory: Whether that was memory, and less of it may suffice.
    """

    lost: Mapping[str, str]
    failure: str = ""
    out_of_memory: bool = False

    @classmethod
    def of(cls, outcome: Measured | Exception) -> _Told:
        if isinstance(outcome, Exception):
            failure = f"{type(outcome).__name__}: {outcome}"[:_REASON_LENGTH]
            return cls({}, failure, isinstance(outcome, torch.OutOfMemoryError))
        lost = {name: layer for name, layer in outcome.coverage.items() if not layer.measured}
        return cls({name: layer.reason[:_REASON_LENGTH] for name, layer in lost.items()})


def _failure_of_all(told: Sequence[_Told], outcome: Measured | Exception) -> Exception:
    """What to raise on this process where one has failed; where memory was short on one, that on all of them."""
    short = any(each.out_of_memory for each in told)
    kind = torch.OutOfMemoryError if short else RuntimeError
    if isinstance(outcome, kind if short else Exception):
        return outcome
    process = next(process for process, each in enumerate(told) if each.failure and each.out_of_memory is short)
    failure = kind(f"process {process}: {told[process].failure}")
    failure.__cause__ = outcome if isinstance(outcome, Exception) else None
    return failure


def _let_go(failure: Exception) -> None:
    """Drop the frames of an exception that is kept, and with them the tensors of the forward it broke off."""
    passed = {id(None), id(sys.exc_info()[1])}  # what the caller is handling has frames that are the caller's
    waiting: list[Any] = [failure]
    while waiting:
        error = waiting.pop()
        if id(error) not in passed:
            passed.add(id(error))
            error.__traceback__ = None
            waiting += [error.__cause__, error.__context__]


def _gather(told: Any, group: distributed.ProcessGroup | None = None) -> list[Any]:
    """What each process of the group has to say, in order."""
    said: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(said, told, group=group)
    return said


def _of_layers(table: LayerValues, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    return {metric: {name: layers[name] for name in names} for metric, layers in table.items()}


def _joined_coverage(parts: Sequence[LayerCoverage], splits_keys: bool) -> LayerCoverage:
    """One layer out of its slices: all heads, the worst error."""
    errors = [part.error for part in parts if part.error is not None]
    return replace(
        parts[0],
        num_query_heads=sum(part.num_query_heads for part in parts),
        num_kv_heads=sum(part.num_kv_heads for part in parts) if splits_keys else parts[0].num_kv_heads,
        error=max(errors, default=None),
        weights_reason=next((part.weights_reason for part in parts if part.weights_reason), ""),
    )


def _joined_diagnostics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    certified = [part["certified_fraction"] for part in parts]
    return {
        **parts[0],
        "certified_fraction": sum(certified) / len(certified),
        "invariant_residual": max(part["invariant_residual"] for part in parts),
    }


def _inside_forwards(model: nn.Module, look: Callable[[str, nn.Module], None]) -> ExitStack:
    """Call ``look(name, module)`` whenever a module is running, while the context is open."""
    handles = ExitStack()
    for path, module in model.named_modules():
        name = own_name(path) or type(model).__name__
        handle = module.register_forward_pre_hook(lambda module, _, name=name: look(name, module))
        handles.callback(handle.remove)
    return handles
