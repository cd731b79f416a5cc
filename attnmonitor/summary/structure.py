"""What each layer does, in words: how it is captured, what it sees, where it differs from its kind."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence

from attnmonitor.messages import first_names, printable
from attnmonitor.sample import LayerCoverage

__all__ = [
    "COVERAGE_COLUMNS",
    "coverage_notes",
    "coverage_row",
    "grouped_lines",
    "likely_mistakes",
    "scale_text",
    "sees_text",
    "structure_lines",
    "structure_notes",
]

COVERAGE_COLUMNS = ("layer", "heads (query/KV)", "head size", "scale", "sees", "captured", "error", "outside the field")
"""Headings of a table of how layers are captured; `coverage_row` gives the cells."""

_LEAST_MASS = 1e-6  # what half precision leaves of a hidden key
_MIN_PEERS = 2
_MOST_ODD = 1 / 3
_MOST_OFF = 1 / 4  # of the positions: what reaches further is hardly a mask that is off


def coverage_row(layer: LayerCoverage) -> tuple[str, ...]:
    """Return how a layer was captured and verified, or why it was not measured: one text for each column."""
    if not layer.measured:
        return (layer.layer, "", "", "", "", "NOT MEASURED", "", layer.reason)
    return (
        layer.layer,
        f"{layer.num_query_heads}/{layer.num_kv_heads}",
        str(layer.head_dim),
        scale_text(layer),
        sees_text(layer),
        f"{layer.kind} {layer.how}",
        "not comparable" if layer.error is None else f"{layer.error:.1e}",
        ", ".join(layer.outside),
    )


def coverage_notes(coverage: Mapping[str, LayerCoverage]) -> dict[str, list[str]]:
    """Return what is said of layers beside their rows, for each of which something is.

    What may be a mistake in the model, and what could not be read or was left out of the weights, values and outputs.
    """
    structure = structure_notes(coverage)
    notes = {
        name: [*structure.get(name, ()), layer.weights_reason, layer.weights_note, layer.values_reason]
        for name, layer in coverage.items()
    }
    return {name: list(filter(None, said)) for name, said in notes.items() if any(said)}


def sees_text(layer: LayerCoverage) -> str:
    """Return what a layer's queries see, with the attention on later positions.

    Example:
        >>> sees_text(LayerCoverage("h.0", sees="both", future_mass=0.46))
        'both ways, 0.46 on later positions'
    """
    back, ahead = layer.reach_back, layer.reach_ahead
    is_causal = ahead == 0 or (layer.sees != "both" and not looks_ahead(layer))
    direction = "causal" if is_causal else "both ways" if ahead is None else f"{ahead} ahead"
    text = {
        "both": direction,
        "documents": f"{layer.documents} documents, {direction}",
        "window": f"{direction}, window" if back is None else f"{direction}, window of {back} back",
    }.get(layer.sees, layer.sees)
    if looks_ahead(layer):
        text += f", {layer.future_mass:.2g} on later positions"
    return text


def looks_ahead(layer: LayerCoverage) -> bool:
    """Return whether queries attend to later positions."""
    return layer.future_mass > _LEAST_MASS


def scale_text(layer: LayerCoverage) -> str:
    """Return the softmax scale, and what multiple of the usual 1/√d it is.

    Example:
        >>> scale_text(LayerCoverage("h.0", head_dim=64, scale=1.0))
        '1 = 8/√d'
    """
    return "" if math.isnan(layer.scale) else f"{layer.scale:.4g} = {layer.relative_scale:.3g}/√d"


def structure_notes(coverage: Mapping[str, LayerCoverage]) -> dict[str, list[str]]:
    """Return what may be a mistake in the model, of every layer where something is."""
    likely = likely_mistakes(coverage)
    notes: dict[str, list[str]] = {}
    for layer in _examined(coverage):
        padding = [f"attends to padding (mass {layer.padding_mass:.2g})"] if layer.padding_mass > _LEAST_MASS else []
        if found := [*padding, *layer.remarks, *likely.get(layer.layer, ())]:
            notes[layer.layer] = found
    return notes


def likely_mistakes(coverage: Mapping[str, LayerCoverage]) -> dict[str, list[str]]:
    """Return what is hardly ever meant: a causal mask that is off, a layer unlike its kind.

    Layers whose names differ only in numbers are of one kind. A layer is odd where at most a third of its kind does as
    it does, and the others all do something else.

    Example:
        >>> layers = [LayerCoverage(f"h.{i}", "sdpa", sees="causal", head_dim=4, scale=0.5) for i in range(4)]
        >>> layers[1] = LayerCoverage("h.1", "sdpa", sees="causal", head_dim=4, scale=1.0)
        >>> likely_mistakes({layer.layer: layer for layer in layers})
        {'h.1': ['odd: its scale is 2/√d, 1/√d in the other 3 layers of its kind']}
    """
    kinds: dict[str, list[LayerCoverage]] = {}
    for layer in _examined(coverage):
        kinds.setdefault(re.sub(r"\d+", "#", layer.layer), []).append(layer)
    found: dict[str, list[str]] = {}
    for layer, note in itertools.chain.from_iterable(map(_odd_notes, kinds.values())):
        found.setdefault(layer.layer, []).append(note)
    for layer in _examined(coverage):
        ahead = layer.reach_ahead or 0
        # A prefix that sees itself, or blocks that do, reach as far in some rows only.
        is_off = layer.reaches_evenly and layer.reach_back is None and 0 < ahead <= _MOST_OFF * layer.num_keys
        if layer.layer not in found and is_off and looks_ahead(layer):
            later = "1 later position" if ahead == 1 else f"{ahead} later positions"
            found[layer.layer] = [f"sees {later} and all earlier ones: is a causal mask off by {ahead}?"]
    return found


def structure_lines(coverage: Mapping[str, LayerCoverage]) -> list[str]:
    """Return what may be a mistake in the model, a line for each with its layers."""
    return grouped_lines(structure_notes(coverage))


def grouped_lines(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line for each note, with the layers it is said of.

    Example:
        >>> grouped_lines({"h.0": ["no position"], "h.1": ["no position", "odd"]})
        ['h.0, h.1: no position', 'h.1: odd']
    """
    layers_of: dict[str, list[str]] = {}
    for layer, found in notes.items():
        for note in found:
            layers_of.setdefault(note, []).append(layer)
    return [printable(f"{first_names(layers)}: {note}", one_line=True) for note, layers in layers_of.items()]


def _examined(coverage: Mapping[str, LayerCoverage]) -> list[LayerCoverage]:
    return [layer for layer in coverage.values() if layer.measured and layer.how]


def _odd_notes(peers: Sequence[LayerCoverage]) -> Iterator[tuple[LayerCoverage, str]]:
    """Yield each layer that is odd among its peers, and how."""
    directed = [layer for layer in peers if not math.isnan(layer.future_mass)]
    for layer, others in _odd(directed, [looks_ahead(layer) for layer in directed]):
        does = "attends" if looks_ahead(layer) else "does not attend"
        mass = f" (mass {layer.future_mass:.2g})" if looks_ahead(layer) else ""
        yield layer, f"odd: it {does} to later positions{mass}, unlike the other {_others(others)}"
    for layer, others in _odd(peers, [float(f"{layer.relative_scale:.3g}") for layer in peers]):
        scale, usual = (f"{one.relative_scale:.3g}/√d" for one in (layer, others[0]))
        yield layer, f"odd: its scale is {scale}, {usual} in the other {_others(others)}"


def _others(layers: Sequence[LayerCoverage]) -> str:
    return f"{len(layers)} layers of its kind"


def _odd(
    layers: Sequence[LayerCoverage], values: Sequence[Hashable]
) -> list[tuple[LayerCoverage, list[LayerCoverage]]]:
    """Return the few layers whose value is not that of all others, each with those others."""
    if len(layers) <= _MIN_PEERS:
        return []
    usual, count = Counter(values).most_common(1)[0]
    odd = [layer for layer, value in zip(layers, values, strict=True) if value != usual]
    if count < _MIN_PEERS or len(odd) > _MOST_ODD * len(layers):
        return []
    others = [layer for layer, value in zip(layers, values, strict=True) if value == usual]
    return [(layer, others) for layer in odd]
