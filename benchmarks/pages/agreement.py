"""Whether a monitor agrees with what an independent observer saw of every softmax attention.

The same model runs three times: under the observer at ATen level (`observer.py`) and under capture, both in float64,
and in float32 under a monitor, as a user runs it. Each head's field ``q kᵀ`` that capture gives is looked up among
those that the observer saw; its scale is compared with the one that the softmax's result shows, and the monitor's
numbers with those computed in float64 from the observer's operands.

Letters: B sequences, H heads, Lq and Lk positions, d head size.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attnmonitor import AttentionMonitor, LayerCoverage, Sample
from attnmonitor.capture import AttentionCall, capture_attention
from attnmonitor.functional.summaries import FROM_ATTENTION
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.summary.structure import grouped_lines, likely_mistakes
from benchmarks.pages.architectures import float64_statistics
from benchmarks.pages.observed_fields import Fields, Match
from benchmarks.pages.observer import observing

__all__ = ["Agreement", "compared"]

Forward = Callable[[nn.Module, Any], Any]

_HEADS = ("num_heads", "num_attention_heads", "heads", "n_heads", "n_head", "nhead", "attention_heads", "head_num")
"""Attributes in which libraries keep the number of a layer's heads."""

NOT_CALLED = "not called in this forward"
"""The reason of a module that is attention, but does not run: true, though the observer sees nothing there."""


@dataclass
class Agreement:
    """What came of one model.

    Attributes:
        layers: Attention layers that have numbers.
        heads: ``query heads/KV heads × size`` of the layers.
        kinds: How many layers are of each kind: self, cross, channels.
        outside: What acts on their logits outside the field.
        named: Why layers have no numbers, by name.
        silent: Modules in which an attention ran that no layer measures and no reason names.
        false_names: Names without an attention that ran in them.
        wrong: What differs from the observer, and what is called a mistake in a library's model, in words.
        heads_checked: Layers whose module says how many heads it has, and has as many.
        scales: Layers whose scale was compared with the softmax's result; of the others only the output is rebuilt.
        deviation: Largest relative deviation of a number.
        precision: Type in which observer and capture ran.
    """

    layers: int = 0
    heads: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    false_names: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    heads_checked: int = 0
    scales: int = 0
    deviation: float = 0.0
    precision: str = "float64"


def compared(
    model: nn.Module, forward: Forward, inputs: Any, *, expected: str = "", heads: Mapping[str, int] | None = None
) -> Agreement:
    """Return how a monitor's account of one forward agrees with the observer's.

    Args:
        model: The model.
        forward: Calls it.
        inputs: What it is called with.
        expected: Part of the reason with which attention has to be named that the observer cannot see.
        heads: How many heads layers have whose modules do not say it, by the ends of their names.
    """
    result = Agreement()
    with _exact(model, forward, inputs) as (twin, batch, precision):
        result.precision = str(precision).removeprefix("torch.")
        with observing(twin) as observed:
            forward(twin, batch)
        calls, missed = _captured(twin, forward, batch)
    tolerance = 1e-7 if precision == torch.float64 else 1e-3
    fields = Fields(observed)
    matches = {call.layer: fields.of(call, tolerance) for call in calls}
    result.wrong += [f"{layer}: no such product ran" for layer, match in matches.items() if match is None]
    left = fields.left()
    if not calls and not left:
        if expected:
            result.named = missed
            result.wrong += [] if any(expected in reason for reason in missed.values()) else [f"not named: {expected}"]
        else:
            result.false_names = [f"{name}: {why}" for name, why in missed.items() if why != NOT_CALLED]
        return result
    try:
        with AttentionMonitor(model, inputs, forward=forward, record=None, alerts=False) as monitor:
            sample = monitor.sample(0)
    except ValueError as refusal:
        result.named = missed or {"": str(refusal)[-300:]}
        result.silent = [each.module for each in left if not _is_named(each.module, missed)]
        return result
    coverage = sample.coverage
    result.wrong += [f"called a mistake: {line}" for line in grouped_lines(likely_mistakes(coverage))]
    result.named = {name: each.reason for name, each in coverage.items() if not each.measured}
    result.silent = [each.module for each in left if not _is_named(each.module, {**missed, **result.named})]
    result.false_names = [
        f"{name}: {reason}"
        for name, reason in missed.items()
        if name not in matches and reason != NOT_CALLED and not any(_is_named(each.module, {name: ""}) for each in left)
    ]
    for layer, match in matches.items():
        own = coverage.get(layer)
        if own is None:
            result.wrong.append(f"{layer}: captured, but not in the sample")
        elif own.measured and match is not None:
            ends = [count for end, count in (heads or {}).items() if layer.endswith(end)]
            declared = ends[0] if ends else _declared_heads(model, layer)
            _add_layer(declared, result, own, match, fields, sample, tolerance)
    return result


def _declared_heads(model: nn.Module, layer: str) -> int | None:
    """Return how many heads a layer's module, or the nearest around it, says that it has; None if none does."""
    path = layer.partition("#")[0].split(".")
    for depth in range(len(path), -1, -1):
        try:
            module = model.get_submodule(".".join(path[:depth]))
        except AttributeError:
            continue
        for holder in (module, *module.children(), getattr(module, "config", None)):
            for name in _HEADS:
                declared = getattr(holder, name, None)
                if isinstance(declared, int) and not isinstance(declared, bool):
                    return declared
    return None


def _add_layer(
    declared: int | None,
    result: Agreement,
    own: LayerCoverage,
    match: Match,
    fields: Fields,
    sample: Sample,
    tolerance: float,
) -> None:
    """Add a layer that has numbers to the result."""
    result.layers += 1
    heads = f"{own.num_query_heads}/{own.num_kv_heads} × {own.head_dim}"
    if heads not in result.heads:
        result.heads.append(heads)
    kind = "channels" if own.sees == "channels" else own.kind
    result.kinds[kind] = result.kinds.get(kind, 0) + 1
    result.outside = sorted({*result.outside, *own.outside})
    base = own.layer.partition("#")[0]
    parts = [each for name, each in sample.coverage.items() if name.partition("#")[0] == base]
    found = {own.num_query_heads, sum(each.num_query_heads for each in parts)}  # of a loop over heads: their sum
    if declared is not None and kind != "channels" and declared not in found:
        result.wrong.append(f"{own.layer}: {own.num_query_heads} heads instead of {declared}")
    result.heads_checked += declared in found
    checked, problem = fields.scale_of(match, tolerance)
    result.scales += checked
    if problem:
        result.wrong.append(f"{own.layer}: {problem}")
    with torch.no_grad():  # learned keys are parameters
        deviations = _deviations(match, fields, sample)
    for metric, deviation in deviations.items():
        result.deviation = max(result.deviation, deviation)
        if deviation > 1e-3:
            result.wrong.append(f"{own.layer}: {metric} deviates by {deviation:.1e}")


def _is_named(module: str, names: Iterable[str]) -> bool:
    """Return whether one of the names is that of a module, of one in it or of one around it."""
    plain = [name.partition("#")[0] for name in names]
    return any(
        not module or f"{name}.".startswith(f"{module}.") or f"{module}.".startswith(f"{name}.") for name in plain
    )


@contextmanager
def _exact(model: nn.Module, forward: Forward, inputs: Any) -> Iterator[tuple[nn.Module, Any, torch.dtype]]:
    """Yield a copy of the model and its inputs in float64, or as they are where that does not run."""
    default = torch.get_default_dtype()
    torch.compiler.set_stance("force_eager")
    try:
        with torch.no_grad():
            torch.set_default_dtype(torch.float64)
            twin, batch = copy.deepcopy(model).double(), _in_double(inputs)
            if _runs(twin, forward, batch):
                yield twin, batch, torch.float64
            else:
                torch.set_default_dtype(default)
                yield model, inputs, torch.float32
    finally:
        torch.set_default_dtype(default)
        torch.compiler.set_stance("default")


def _runs(model: nn.Module, forward: Forward, inputs: Any) -> bool:
    """Return whether a forward ends in numbers; a cast to float32, or a constant of that type, may prevent it."""
    try:
        output = forward(model, inputs)
    except (RuntimeError, TypeError, ValueError):
        return False
    found = [x for x in tree_leaves(dict(output) if isinstance(output, Mapping) else output) if isinstance(x, Tensor)]
    return all(bool(x.isfinite().all()) for x in found if x.is_floating_point())


def _in_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _in_double(each) for key, each in value.items()}
    return type(value)(map(_in_double, value)) if isinstance(value, list | tuple) else value


def _captured(model: nn.Module, forward: Forward, inputs: Any) -> tuple[list[AttentionCall], dict[str, str]]:
    calls: list[AttentionCall] = []
    with capture_attention(model, calls.append) as report:
        forward(model, inputs)
    return calls, report.missed


def _deviations(match: Match, fields: Fields, sample: Sample) -> dict[str, float]:
    """Return the largest relative deviation of each metric from those of the observer's operands in float64."""
    call = match.call
    own = sample.coverage[call.layer]
    first_heads = [own.query_heads_of(kv_head)[0] for kv_head in range(own.num_kv_heads)]
    products = dict(match.products())
    by_sequence: dict[str, list[Tensor]] = defaultdict(list)
    for sequence in range(len(call.query)):
        queries, keys = [], []
        for head in range(own.num_query_heads):
            query, key = fields.operands(match.places[sequence, head])
            plain = query @ key.mT
            factor = call.scale * float(
                (products[sequence, head] * plain).sum() / plain.square().sum().clamp_min(1e-300)
            )
            queries.append(query * factor)
            keys.append(key)
        query, key = torch.stack(queries)[None], torch.stack(keys)[None]
        valid = [x[None] for x in match.valid(sequence)]
        if match.cut:
            valid = [x[x][None] for x in valid]
        for metric, values in float64_statistics(query, key, 1.0, *valid).items():
            by_sequence[metric].append(values[0][first_heads] if METRICS[metric].scope == "kv_head" else values[0])
    deviations = {}
    for metric, each in by_sequence.items():
        if metric not in sample.values or METRICS[metric].summary in FROM_ATTENTION:
            continue
        expected, actual = torch.stack(each).nanmean(0), sample.values[metric][call.layer].double()
        actual = actual * abs(own.scale) if metric == "query_rms" else actual
        gap = (actual - expected).abs() / expected.abs().clamp_min(1e-6)
        deviations[metric] = float(gap.nan_to_num(torch.inf).max())
    return deviations
