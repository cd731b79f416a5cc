"""One measurement by all ranks that share a sharded model.

The ranks first wait for each other, so that none starts a forward alone. Every rank measures the heads it holds. One
exchange of a few bytes then makes the result the same on all ranks: what failed on one rank counts as failed on all, so
that no rank waits for another, in this sample or the next; and if one rank ran out of memory, all of them try again
with half of the probe. Where the heads of a layer are divided among ranks (tensor parallelism), the ranks that share it
join their heads, with one more exchange per sample.

A forward of a sharded model runs collectives on all ranks. If one rank fails, it joins the remaining ones with zeros so
that the others do not hang (`attnmonitor.parallel.collectives`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from attnmonitor.measurement import LayerValues, Measured, Measurement
from attnmonitor.measurement.kept import Keeper
from attnmonitor.measurement.outcomes import Outcome, take_together
from attnmonitor.measurement.probe import Probe, RejectedBatchError
from attnmonitor.measurement.quiet import default_torch_state
from attnmonitor.measurement.shares import Share
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.parallel.collectives import (
    Collective,
    CollectiveRecorder,
    group_of,
    run_with_zeros,
)
from attnmonitor.parallel.exchange import Exchange, MissingProcessError
from attnmonitor.parallel.head_slices import HeadSlice, head_slice, projection_hashes, unmarked_slice
from attnmonitor.parallel.in_step import NotTogetherError, OtherProcessError, in_step
from attnmonitor.parallel.sharding import is_sharded
from attnmonitor.parallel.wrappers import unwrapped_modules
from attnmonitor.sample import LayerCoverage

__all__ = ["DistributedMeasurement", "check_joinable"]

_Tables = tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]  # mean and spread: metric, layer, heads


class DistributedMeasurement(Measurement):
    """A `Measurement` that all ranks of a sharded model take together, with the same result on each.

    Args:
        model: The unwrapped model; its parameters are sharded.
        probe: The batch and how to run it.
        metrics: Names of the metrics, in table order.
        strict: Raise what goes wrong with one layer; otherwise that layer is NaN and the others go on.
        ranks: The processes that share the model.
        attempt: As for `Exchange`.
        keeper: As for `Measurement`; what this process keeps is of the heads it holds.
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
        super().__init__(model, probe, metrics, strict=strict, with_others=True)
        self._own = Measurement(model, probe, metrics, strict=strict, with_others=True, keeper=keeper)
        self._ranks = tuple(ranks)
        self._exchange = Exchange(ranks, attempt)
        self._slice_exchanges: dict[distributed.ProcessGroup, Exchange] = {}
        self._slices: dict[str, HeadSlice] = {}
        self._unknown_slices: dict[str, str] = {}  # layer to the reason why its slice is unknown
        self._collectives: dict[Probe, Sequence[Collective]] = {}  # of one forward of each probe

    def attach(self) -> Measured:
        """Measure once, find out which heads this process holds, and join the layers.

        The collectives of a forward are recorded in one forward of the whole probe and one of half of it, in addition
        to the first.

        Raises:
            ValueError: As for one process, also where another one raises it; a process did not attach in time;
                processes that share a layer's heads have different probes; or a process could not join one of the
                forward's collectives after a failure.
        """
        try:
            return self._attach_together()
        except MissingProcessError as error:
            raise ValueError(
                f"model={type(self._model).__qualname__}: its forward needs processes "
                f"{', '.join(map(str, self._ranks))}, and {error}; attach a monitor on each of them"
            ) from error

    def _attach_together(self) -> Measured:
        self._exchange.gather(None)  # before the forward: alone, its collectives would meet those of training
        with self._in_step():
            self._own.attach()
        self._half = self._probe.half()
        with self._in_step(), _inside_forwards(self._model, self._find_slice), CollectiveRecorder() as whole:
            measured = self._own._attempt(self._probe, False)
        self._collectives[self._probe] = whole.calls
        if not is_sharded(self._model):
            self._find_unmarked_slices(measured, whole.calls)
        self._try_half()
        self._slice_exchanges = {
            group: Exchange(distributed.get_process_group_ranks(group)) for group in self._slice_groups()
        }
        for exchange in self._slice_exchanges.values():
            if len(prints := set(exchange.gather(self._probe.fingerprint))) > 1:
                raise ValueError(
                    f"probe: processes that share the heads of a layer have {len(prints)} different probes; give them "
                    "the same batch"
                )
        ends = self._exchange.gather((Outcome.of(measured), self._probe.fingerprint, tuple(measured.coverage)))
        if not self._slices and not self._unknown_slices and len({(probe, layers) for _, probe, layers in ends}) == 1:
            place = self._ranks.index(distributed.get_rank())
            self._own.share = Share(place, len(self._ranks), tuple(measured.coverage))
        measured = self._joined(measured, [outcome.missing for outcome, _, _ in ends])
        self.layers = measured.coverage
        return measured

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Run a forward together for the first time: what fails on one process is raised on all."""
        try:
            with in_step(self._exchange, self._ranks, self._model):
                yield
        except OtherProcessError as error:
            raise (RejectedBatchError if error.kind == RejectedBatchError.__name__ else ValueError)(error) from error
        except NotTogetherError as error:
            check_joinable(self._model, str(error))

    def _try_half(self) -> None:
        """Record the collectives of half of the probe; none if one rank cannot measure it."""
        if not all(self._exchange.gather(self._half is not None)) or self._half is None:
            self._half = None
            return
        try:
            with self._in_step(), CollectiveRecorder() as half:
                self._own._attempt(self._half, False)
        except MissingProcessError:
            raise
        except Exception:  # of any process: on all of them
            self._half = None
        else:
            self._collectives[self._half] = half.calls

    def take(self, *, with_weights: bool = False) -> Measured:
        """Measure once, when all processes are there.

        Raises:
            MissingProcessError: A process did not come in time; raised on all that came or come later.
        """
        self._exchange.gather(None)
        return super().take(with_weights=with_weights)

    def _attempt(self, probe: Probe, with_weights: bool) -> Measured:
        """Measure once, with all processes, and raise what `take_together` raises."""
        done = CollectiveRecorder()

        def measure() -> Measured:
            with done:
                return self._own._attempt(probe, with_weights)

        def join_the_rest() -> None:
            with suppress(Exception):  # a process that has died is named by the exchange that follows
                run_with_zeros(self._collectives[probe][len(done.calls) :])

        measured, missing = take_together(measure, self._exchange, self._ranks, self._own.share, join_the_rest)
        self._collectives[probe] = done.calls  # of the model as it is now
        return self._joined(measured, missing)

    def _find_slice(self, name: str, module: nn.Module) -> None:
        for layer, coverage in self._own.layers.items():
            if layer.partition("#")[0] == name and coverage.num_query_heads:
                found = head_slice(module, coverage.heads)
                if isinstance(found, HeadSlice):
                    self._slices[layer] = found
                elif found is not None:
                    self._unknown_slices[layer] = found

    def _find_unmarked_slices(self, measured: Measured, calls: Sequence[Collective]) -> None:
        """Find layers whose heads are divided by code of the user's, which leaves no mark on their weights."""
        groups = {group for call in calls if (group := group_of(call)) is not None and group.size() > 1}
        group = groups.pop() if len(groups) == 1 else None
        if group is not None and not set(distributed.get_process_group_ranks(group)) <= set(self._ranks):
            group = None
        modules = dict(unwrapped_modules(self._model))
        layers = {name: layer.heads for name, layer in measured.coverage.items() if layer.num_query_heads}
        own = {
            "probe": self._probe.fingerprint,
            "layers": layers,
            "values": measured.values,
            "hashes": {name: projection_hashes(modules[name.partition("#")[0]], layers[name]) for name in layers},
        }
        parts = dict(zip(self._ranks, self._exchange.gather(own), strict=True))
        ranks = self._ranks if group is None else distributed.get_process_group_ranks(group)
        parts_of_group = [parts[rank] for rank in ranks]
        same_probe = len({part["probe"] for part in parts_of_group}) == 1
        for name, heads in layers.items():
            if any(part["layers"].get(name) != heads for part in parts_of_group):
                self._unknown_slices[name] = "processes have different numbers of its heads"
                continue
            found = unmarked_slice(
                group,
                heads,
                [part["hashes"][name] for part in parts_of_group],
                same_numbers=_same_numbers(name, [part["values"] for part in parts_of_group]) if same_probe else None,
            )
            if isinstance(found, HeadSlice):
                self._slices[name] = found
            elif found is not None:
                self._unknown_slices[name] = found

    def _slice_groups(self) -> list[distributed.ProcessGroup]:
        """Return the process groups that share layers, in an order that is the same on all processes."""
        return list(dict.fromkeys(each.group for each in self._slices.values()))

    def _joined(self, measured: Measured, missing: Sequence[Mapping[str, str]]) -> Measured:
        """Return the measurement of all ranks: what is missing on any rank is NaN, slices of a layer are joined."""
        coverage = dict(measured.coverage)
        for rank, layers in zip(self._ranks, missing, strict=True):
            for name, reason in layers.items():
                if name in coverage and coverage[name].measured:
                    coverage[name] = replace(coverage[name], reason=f"process {rank}: {reason}")
        for name, reason in self._unknown_slices.items():
            coverage[name] = replace(coverage[name], reason=reason)
        values, spread = (
            {metric: dict(in_layers) for metric, in_layers in table.items()}
            for table in (measured.values, measured.spread)
        )
        diagnostics = dict(measured.diagnostics)
        with default_torch_state():
            for group in self._slice_groups():
                diagnostics = self._join_slices(group, (values, spread), coverage, diagnostics)
            for table in (values, spread):
                for by_layer in table.values():
                    for name, heads in by_layer.items():
                        if not coverage[name].measured:
                            by_layer[name] = torch.full_like(heads, torch.nan)
        return Measured(values, spread, coverage, diagnostics)

    def _join_slices(
        self,
        group: distributed.ProcessGroup,
        tables: _Tables,
        coverage: dict[str, LayerCoverage],
        diagnostics: dict[str, float | str],
    ) -> dict[str, float | str]:
        """Join the layers that a group shares, in ``tables`` and ``coverage``; return the joined diagnostics."""
        names = [name for name, each in self._slices.items() if each.group is group]
        own_part = {
            "tables": [_of_layers(table, names) for table in tables],
            "coverage": {name: coverage[name] for name in names},
            "diagnostics": diagnostics,
        }
        parts = self._slice_exchanges[group].gather(own_part)
        for name in names:
            splits_keys = self._slices[name].splits_keys
            coverage[name] = _joined_coverage([part["coverage"][name] for part in parts], splits_keys)
            for which, table in enumerate(tables):
                for metric, by_layer in table.items():
                    if METRICS[metric].scope == "query_head" or splits_keys:
                        by_layer[name] = torch.cat([part["tables"][which][metric][name] for part in parts])
                    if metric == "output_share":  # each process has its share in its own heads
                        by_layer[name] = torch.full_like(by_layer[name], torch.nan)
        return _joined_diagnostics([part["diagnostics"] for part in parts])


def check_joinable(model: nn.Module, *reasons: str) -> None:
    """Raise ValueError where one of these reasons of `why_not_joinable` is not empty."""
    for reason in filter(None, reasons):
        raise ValueError(
            f"model={type(model).__qualname__}: its forward needs other processes, and {reason}: a process that fails "
            "could not take part in the rest of it, and the others would hang; audit its checkpoints with `attnmonitor "
            "scan`, or give a forward=lambda model, batch: ... that does not communicate"
        )


def _same_numbers(layer: str, values: Sequence[LayerValues]) -> bool:
    """Return whether processes have measured the same in a layer, up to rounding in most of its numbers."""
    rows = [torch.cat([layers[layer] for layers in each.values() if layer in layers]) for each in values]
    return all(torch.isclose(row, rows[0], rtol=1e-3, equal_nan=True).float().mean() > 0.5 for row in rows)


def _of_layers(table: LayerValues, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    return {metric: {name: layers[name] for name in names} for metric, layers in table.items()}


def _joined_coverage(parts: Sequence[LayerCoverage], splits_keys: bool) -> LayerCoverage:
    """Return the coverage of a whole layer from that of its slices: all heads, the worst error."""
    errors = [part.error for part in parts if part.error is not None]
    return replace(
        parts[0],
        num_query_heads=sum(part.num_query_heads for part in parts),
        num_kv_heads=sum(part.num_kv_heads for part in parts) if splits_keys else parts[0].num_kv_heads,
        error=max(errors, default=None),
        remarks=(),  # each slice counts its own heads
        values_reason=parts[0].values_reason or "output_share needs the heads of all processes in one",
        weights_reason=next((part.weights_reason for part in parts if part.weights_reason), ""),
    )


def _joined_diagnostics(parts: Sequence[Mapping[str, Any]]) -> dict[str, float | str]:
    shares = ("certified_fraction", "decided_fraction")
    return {
        **parts[0],
        **{share: sum(part[share] for part in parts) / len(parts) for share in shares},
        "invariant_residual": max(part["invariant_residual"] for part in parts),
    }


def _inside_forwards(model: nn.Module, visit: Callable[[str, nn.Module], None]) -> ExitStack:
    """Call ``visit(name, module)`` at the start of each module's forward, while the context is open."""
    handles = ExitStack()
    for name, module in unwrapped_modules(model):
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
            continue
        handle = module.register_forward_pre_hook(lambda module, _, name=name: visit(name, module))
        handles.callback(handle.remove)
    return handles
