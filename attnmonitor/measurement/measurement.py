"""One measurement: a probe forward, reduced to numbers per head, copied to the host in one transfer.

Everything stays on the device, without a wait, until all layers are reduced. Then one vector carries all values, the
verification errors and the self-checks to the host, where it is decided which values may be shown: a layer whose
captured tensors do not reproduce the layer's own output is NaN, with the reason in its coverage.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from attnmonitor.capture import AttentionCall, Layouts, capture_attention
from attnmonitor.functional.routes import RouteChoice, choose_route
from attnmonitor.functional.spectrum import DEFAULT_TARGET_RANK
from attnmonitor.functional.summaries import needs_eigenvalues
from attnmonitor.measurement.collected import Key, collected
from attnmonitor.measurement.kept import Keeper, KeptLayer, kept_once
from attnmonitor.measurement.measured import Measured
from attnmonitor.measurement.modules_run import modules_run
from attnmonitor.measurement.probe import Probe, RejectedBatchError, UnseenAttentionError
from attnmonitor.measurement.quiet import default_torch_state, quiet
from attnmonitor.measurement.reduction import Reduction
from attnmonitor.measurement.shares import Share
from attnmonitor.measurement.tail import Tail, obstacle_now
from attnmonitor.measurement.tail_calls import Recording
from attnmonitor.measurement.tail_skipping import Skipping
from attnmonitor.measurement.trust import head_counts, judged, nothing_measured
from attnmonitor.measurement.unfinished import Unfinished
from attnmonitor.measurement.weights import WeightMeasurement
from attnmonitor.messages import error_text
from attnmonitor.metrics.catalog import WEIGHT_METRICS
from attnmonitor.metrics.statistics import summaries_of
from attnmonitor.parallel.collectives import LoneCollectiveError, no_collectives
from attnmonitor.sample import LayerCoverage

__all__ = ["Measurement"]


class Measurement:
    """Measures all heads of a model on a probe.

    Args:
        model: The unwrapped model.
        probe: The batch and how to run it.
        metrics: Names of the metrics, in table order.
        strict: Raise an error in one layer; otherwise that layer is NaN and the others are measured.
        with_others: Whether the processes that share the model measure at the same time, so that it may communicate.
        keeper: Keeps layers until the sample was judged; None keeps nothing.

    Attributes:
        layers: Coverage at attach: the layers and head counts that every measurement reports.
        num_heads: Per layer that has heads: ``{"query_head": …, "kv_head": …}``.
        signature: 12 hex digits over names and head counts of the layers, different for another model.
        route: Which way the eigenproblems go, chosen at attach.
        share: The layers that this process finishes; all of them by default.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        metrics: Sequence[str],
        *,
        strict: bool = False,
        with_others: bool = False,
        keeper: Keeper | None = None,
    ) -> None:
        self._model = model
        self._with_others = with_others
        self._keeper = Keeper() if keeper is None else keeper
        self._probe = probe
        self._half: Probe | None = None
        self._metrics = tuple(name for name in metrics if name not in WEIGHT_METRICS)
        self._weight_metrics = tuple(name for name in metrics if name in WEIGHT_METRICS)
        self._weights: WeightMeasurement | None = None
        self._strict = strict
        self._layouts: Layouts = {}
        self._target_ranks: dict[str, int] = {}
        self.layers: Mapping[str, LayerCoverage] = {}
        self.route = RouteChoice("cpu")
        self.share = Share()
        self._tail = Tail("the model is spread over processes" if with_others else "no forward was recorded yet")

    @property
    def after_last_attention(self) -> str:
        """``"skipped"`` where the last forward computed nothing after its last attention; else why it did."""
        return self._tail.route

    @property
    def num_heads(self) -> dict[str, dict[str, int]]:
        """Heads per scope of every layer that has heads."""
        return head_counts(self.layers)

    @property
    def signature(self) -> str:
        """Hash of the names and head counts of the layers."""
        heads = {name: layer.heads for name, layer in self.layers.items()}
        return hashlib.sha256(json.dumps(heads).encode()).hexdigest()[:12]

    def attach(self) -> Measured:
        """Measure once, and find out in a second forward whether samples need what follows the last attention.

        Raises:
            ValueError, LoneCollectiveError: As `find_layers`.
        """
        if self._with_others:
            return self.find_layers()
        with self._probe.without_hooks(self._model):
            obstacle = obstacle_now(self._model)
        recording = None if obstacle else Recording(self._model)
        measured = self.find_layers(recording)
        self._tail = Tail(obstacle) if recording is None else self._tried_tail(recording, measured)
        return measured

    def find_layers(self, recording: Recording | None = None) -> Measured:
        """Measure once, to find the layers and to report what does not work before training starts.

        Raises:
            ValueError: The model rejects the probe, no attention is seen, or the probe has fewer than two tokens.
            LoneCollectiveError: The forward needs other processes, which do not measure with this one.
        """
        model, described = type(self._model).__qualname__, self._probe.describe()
        self._half = self._probe.half()
        try:
            with self._probe.without_hooks(self._model):
                forward = self._forward(self._probe, recording)
        except LoneCollectiveError:
            raise
        except Exception as error:
            hint = ""
            # Torch's message for an embedding, without any detail.
            if "index out of range in self" in error_text(error):
                hint = " (a sequence longer than the model's positions, or a token past its vocabulary?)"
            raise RejectedBatchError(
                f"probe={described}: {model} rejects this batch: {error_text(error)}{hint}; give a batch "
                "its forward takes, or say how to call it: forward=lambda model, batch: model(...)"
            ) from error
        if not forward.layers:
            ran = modules_run(lambda: self._forward(self._probe))
            seen = "".join(f"; {layer}: {reason}" for layer, reason in forward.failures.items())
            raise UnseenAttentionError(
                f"model={model}: no attention was seen in its forward{seen}; {ran}; a layer "
                "that computes its attention in a "
                "way that cannot be followed can hand its tensors over with attnmonitor.capture.capture(...)"
            )
        self.layers = {layer: found.coverage for layer, found in forward.layers.items()}
        self.layers |= {layer: LayerCoverage(layer, reason=reason) for layer, reason in forward.failures.items()}
        if all(bool((found.num_keys < 2).any()) for found in forward.layers.values()):
            raise RejectedBatchError(
                f"probe={described} has a sequence of fewer than 2 tokens (padding left out): nothing to attend "
                "to; give sequences of 2 or more, better of a few hundred"
            )
        measured = self._unfinished(forward).result()
        self.layers = measured.coverage
        if not any(layer.measured for layer in self.layers.values()):
            reasons = dict.fromkeys(f"{layer.layer}: {layer.reason}" for layer in self.layers.values())
            raise UnseenAttentionError(
                f"model={model}: attention was seen in its forward, but none of it can be measured; "
                f"{'; '.join(list(reasons)[:3])}; a layer can hand its tensors over with "
                "attnmonitor.capture.capture(...)"
            )
        self.route = self._chosen_route(forward)
        if self._weight_metrics:
            self._weights = WeightMeasurement(
                self._model, self._probe, self.layers, self._weight_metrics, with_others=self._with_others
            )
            return self._with_reasons(measured, self._weights)
        return measured

    def _tried_tail(self, recording: Recording, in_full: Measured) -> Tail:
        """Measure once more, without what follows the last attention; skip it from now on if nothing differs."""
        twin = copy.copy(self)
        twin._target_ranks, twin.route = {}, RouteChoice("cpu")  # as in the first measurement

        def numbers(follower: Recording | Skipping) -> object:
            return twin._unfinished(twin._forward(twin._probe, follower)).result().numbers()

        with self._probe.without_hooks(self._model):
            return Tail.tried(self._model, recording, in_full.numbers(), numbers)

    def take(self, *, with_weights: bool = False) -> Measured:
        """Measure once: one forward, one transfer to the host, and the metrics of the weights if asked for.

        Where memory does not suffice, measure again with half of the probe's sequences.
        """
        try:
            return self._attempt(self._probe, with_weights)
        except torch.OutOfMemoryError:
            if self._half is None:
                raise
        # Outside the handler: inside, the exception would keep the failed forward's tensors alive.
        return self._halved(self._half, with_weights)

    def begin(self, *, with_weights: bool = False) -> Measured | Unfinished[Measured]:
        """Measure once; where the host's cores solve eigenproblems, leave to the caller when to go on with them.

        Weights are read at once, before training changes them, and for that the whole measurement is finished.
        """
        if self.route.route != "host" or (with_weights and self._weights is not None):
            return self.take(with_weights=with_weights)
        try:
            return self._unfinished(self._sample_forward(self._probe))
        except torch.OutOfMemoryError:
            if self._half is None:
                raise
        return self._halved(self._half, False)

    def _halved(self, half: Probe, with_weights: bool) -> Measured:
        measured = self._attempt(half, with_weights)
        return replace(measured, diagnostics={**measured.diagnostics, "halved_probe": 1.0})

    def _chosen_route(self, forward: Reduction) -> RouteChoice:
        """The way of the eigenproblems that take longest: those of the keys, by their number and size."""
        counts: Counter[tuple[torch.device, int]] = Counter()
        for layer in forward.layers.values():
            size = (layer.num_keys.device, layer.coverage.head_dim)
            counts[size] += len(layer.num_keys) * layer.coverage.num_kv_heads
        if not counts or not needs_eigenvalues(summaries_of(self._metrics)):
            return RouteChoice("cpu")
        device, head_dim = max(counts, key=lambda each: counts[each] * each[1] ** 3)
        return choose_route(device, counts[device, head_dim], head_dim)

    def _attempt(self, probe: Probe, with_weights: bool) -> Measured:
        forward = self._sample_forward(probe)
        measured = self._unfinished(forward).result()
        if self._weights is None or not with_weights:
            return measured
        return self._with_weights(measured, self._weights)

    def _with_weights(self, measured: Measured, weights: WeightMeasurement) -> Measured:
        values = weights.take(measured.values.get("energy_effective_rank"))
        with default_torch_state():
            no_spread = {
                metric: {name: torch.zeros_like(heads) for name, heads in layers.items()}
                for metric, layers in values.items()
            }
        measured = replace(measured, values={**measured.values, **values}, spread={**measured.spread, **no_spread})
        return self._with_reasons(measured, weights)

    def _with_reasons(self, measured: Measured, weights: WeightMeasurement) -> Measured:
        """Put why weights could not be read into the coverage, which keeps it until they are read again."""
        self.layers, coverage = (
            {
                name: replace(
                    layer, weights_reason=weights.reasons.get(name, ""), weights_note=weights.notes.get(name, "")
                )
                for name, layer in layers.items()
            }
            for layers in (self.layers, measured.coverage)
        )
        return replace(measured, coverage=coverage)

    def nothing(self, reason: str) -> Measured:
        """The result of a measurement that failed as a whole: NaN for every head."""
        # Calls nothing that runs the model or its statistics, because that would fail here as well.
        with default_torch_state():
            return nothing_measured(self.layers, self._metrics, reason)

    def _sample_forward(self, probe: Probe) -> Reduction:
        """Run the probe, without what follows its last attention where nothing can notice."""
        with probe.without_hooks(self._model):
            in_full = "" if probe is self._probe else "half of the probe"
            return self._tail.run(self._model, partial(self._forward, probe), in_full)

    def _forward(self, probe: Probe, follower: Recording | Skipping | None = None) -> Reduction:
        """Run the probe and reduce its attention; the follower decides what is done after the last attention."""
        self._keeper.drop()  # what an earlier forward kept, which failed and is run again
        reduction = Reduction(
            self._metrics,
            self._target_ranks,
            strict=self._strict,
            on_host=self.route.route == "host",
            takes=self.share.takes,
            keep=self._keeper.take,
        )
        emit = reduction.take if follower is None else follower.following(reduction.take)
        missed = self._run(probe, emit, follower)
        reduction.failures = {**missed, **reduction.failures}
        return reduction

    def _run(
        self, probe: Probe, emit: Callable[[AttentionCall], None], follower: Recording | Skipping | None = None
    ) -> Mapping[str, str]:
        """Run the probe, and give each attention of it to ``emit``; return the reason for each that was missed."""
        with (
            quiet(self._model),
            nullcontext() if self._with_others else no_collectives(self._model),
            capture_attention(self._model, emit, layouts=self._layouts, packed=probe.packed) as report,
            follower or nullcontext(),
        ):
            probe.run(self._model)
        return report.missed

    def look(self, layer: str) -> KeptLayer:
        """Run the probe once for the attention of one layer.

        Raises:
            RuntimeError: The layer's attention did not run, could not be captured, or does not give its output.
        """
        with self._probe.without_hooks(self._model):
            return kept_once(layer, partial(self._run, self._probe))

    def _unfinished(self, forward: Reduction) -> Unfinished[Measured]:
        how = self._tail.route  # of this forward: the next may run before its numbers have arrived
        return Unfinished(
            forward,
            partial(collected, metrics=self._metrics),
            lambda forward, on_host: self._judged(forward, on_host, how),
        )

    def _judged(self, forward: Reduction, on_host: Mapping[Key, Tensor], after_last_attention: str) -> Measured:
        """Return what may be shown of the numbers that have arrived."""
        measured = judged(forward, on_host, self.layers, self._metrics, self.share)
        self._widen_sketches(on_host, measured.coverage)
        how = {"route": self.route.route, "after_last_attention": after_last_attention}
        return replace(measured, diagnostics={**measured.diagnostics, **how})

    def _widen_sketches(self, on_host: Mapping[Key, Tensor], coverage: Mapping[str, LayerCoverage]) -> None:
        """Let the next sample take a larger sketch of each layer of which not every head was decided."""
        # On numbers that have arrived anyway: trying again at once would make this sample wait for the device twice.
        for name, layer in coverage.items():
            decided = on_host.get(("decided", name)) if layer.measured else None
            if decided is not None and float(decided.mean()) < 1:
                wider = 2 * self._target_ranks.get(name, DEFAULT_TARGET_RANK)
                self._target_ranks[name] = min(wider, layer.head_dim)
