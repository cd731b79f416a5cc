"""States of alerts that version 0.1 saved, with the names that they have now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["with_present_names"]


def with_present_names(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state of `Alerts` with the names of this version; one that has them is returned as it is.

    Args:
        state: What ``Alerts.state_dict()`` returned, in this version or in 0.1.
    """
    if "recent" not in state:
        return state
    recent = state["recent"]
    metrics = {metric: _renamed(past, is_sick="is_excluded") for metric, past in recent["pasts"].items()}
    rules = {
        name: {
            **_renamed(rule, samples="num_samples"),
            "references": [_renamed(reference, crowd="peers") for reference in rule["references"]],
        }
        for name, rule in state["rules"].items()
    }
    return {"past": {"heads": recent["heads"], "metrics": metrics}, "rules": rules}


def _renamed(state: Mapping[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in state.items()}
