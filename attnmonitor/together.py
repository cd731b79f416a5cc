"""One measurement by all processes that share a model's weights.

Every process measures what it holds. Then they agree, with one gather of a few bytes: what failed on one of them has
failed for all, so that all of them know the same of a sample and none waits for another, now or at the next one. Where
the heads of a layer are dealt out to processes, those that share it put its heads together, once per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from attnmonitor.capture.frames import own_name
from attnmonitor.catalog import METRICS
from attnmonitor.measurement import LayerValues, Measured, Measurement
from attnmonitor.probe import Probe, own_surroundings
from attnmonitor.sample import LayerCoverage
from attnmonitor.sharding import Collectives, HeadSlice, head_slice, keep

__all__ = ["SharedMeasurement"]

_REASON_LENGTH = 300  # characters of a reason that are sent to the other processes


class SharedMeasurement(Measurement):
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
        self._collectives: dict[bool, Collectives] = {}

    def attach(self) -> Measured:
        """Measure once, learn which heads this process holds, and put the layers together.

        Raises:
            ValueError: As for one process; or processes that share a layer's heads have different probes.
        """
        self._own.attach()
        with _inside_forwards(self._model, self._find_slice):
            for with_weights in {False, bool(self._weight_metrics)}:
                with Collectives() as self._collectives[with_weights]:
                    measured = self._own.take(with_weights=with_weights)
        for group in self._groups():
            if len(prints := set(_gather(self._probe.fingerprint, group))) > 1:
                raise ValueError(
                    f"probe: processes that share the heads of a layer have {len(prints)} different probes; give them "
                    "the same batch"
                )
        measured = self._put_together(measured, _gather(_lost(measured)))
        self.layers = measured.coverage
        return measured

    def take(self, *, with_weights: bool = False) -> Measured:
        """Measure once, with all processes; see `Measurement.take`.

        Raises:
            RuntimeError: It failed on another process.
        """
        with_weights = with_weights and bool(self._weight_metrics)
        failure: Exception | None = None
        collectives = Collectives()
        try:
            with collectives:
                measured = self._own.take(with_weights=with_weights)
        except Exception as error:
            failure = error
        told: str | Mapping[str, str]
        if failure is not None:
            keep(self._collectives[with_weights].calls[len(collectives.calls) :])
            told = f"{type(failure).__name__}: {failure}"[:_REASON_LENGTH]
        else:
            told = _lost(measured)
        of_all = _gather(told)
        if failure is not None:
            raise failure
        for process, outcome in enumerate(of_all):
            if isinstance(outcome, str):
                raise RuntimeError(f"process {process}: {outcome}")
        return self._put_together(measured, of_all)

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
        with own_surroundings():
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


def _lost(measured: Measured) -> dict[str, str]:
    return {name: layer.reason[:_REASON_LENGTH] for name, layer in measured.coverage.items() if not layer.measured}


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
