"""Which layers of several runs belong together: those of one name, else those at one place among the measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnmonitor.summary.names import count_text

__all__ = ["paired_layers"]


def paired_layers(runs: Sequence[Mapping[str, Any]]) -> tuple[list[list[int]], list[str]]:
    """Give layers that belong together one number.

    Args:
        runs: What `run_numbers` returns, for each run; all are paired with the first.

    Returns:
        For each run the number of each of its layers, and one sentence for each run but the first.

    Example:
        >>> runs = [{"name": name, "layers": layers, "reasons": ["", "", "sees no text"]} for name, layers in
        ...         {"a": ["h.0", "h.1", "pool"], "b": ["blocks.0", "blocks.1", "pool"]}.items()]
        >>> slots, (note,) = paired_layers(runs)
        >>> slots, note
        ([[0, 1, 2], [0, 1, 2]], 'Layers of b and a are paired by position: no measured layer has the same name.')
    """
    first = runs[0]
    slot_of = {layer: slot for slot, layer in enumerate(first["layers"])}
    slots, notes = [list(slot_of.values())], []
    for run in runs[1:]:
        ours, theirs = _measured(first), _measured(run)
        by_name = bool(set(ours) & set(theirs)) or not (ours and theirs)
        partner = {layer: layer for layer in run["layers"]} if by_name else dict(zip(theirs, ours, strict=False))
        # A layer without a partner may have the name of one that was given to another: it is a layer of its own.
        own = {layer: f"{run['name']}\n{layer}" for layer in run["layers"] if layer in ours}
        keys = [partner.get(layer, own.get(layer, layer)) for layer in run["layers"]]
        slots.append([slot_of.setdefault(key, len(slot_of)) for key in keys])
        alone = sum(partner.get(layer) not in ours for layer in theirs) if ours else 0
        how = "name" if by_name else "position: no measured layer has the same name"
        rest = f"; {count_text(alone, 'layer')} of it without a partner" if alone else ""
        notes.append(f"Layers of {run['name']} and {first['name']} are paired by {how}{rest}.")
    return slots, notes


def _measured(run: Mapping[str, Any]) -> list[str]:
    return [layer for layer, reason in zip(run["layers"], run["reasons"], strict=True) if not reason]
