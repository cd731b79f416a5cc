"""What a saved state of a monitor must hold to be loaded, and what of it can be continued."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from attnmonitor.messages import error_text
from attnmonitor.record.history import History
from attnmonitor.record.training_log import TrainingLog

__all__ = ["STATE_FORMAT", "changes_since", "check_state", "continue_curves"]

STATE_FORMAT = 1

_PARTS: dict[str, tuple[type, ...]] = {
    "global_step": (Integral,),
    "failures": (Integral,),
    "probe_fingerprint": (str,),
    "model_signature": (str,),
    "record": (str, type(None)),
    "history": (Mapping,),
    "alerts": (object,),  # of any version, or unreadable: alerts begin anew
}
"""What has no default where it is missing."""

_WAY_OUT = "give what `state_dict()` returned, as it was saved"


def check_state(state: Any) -> None:
    """Raise ValueError, with what arrived, for what `AttentionMonitor.state_dict` of this version did not return."""
    if not isinstance(state, Mapping):
        raise ValueError(f"state={state!r:.60} is a {type(state).__name__} and no mapping; {_WAY_OUT}")
    if state.get("format") != STATE_FORMAT:
        raise ValueError(f"state: format {state.get('format')!r} is not {STATE_FORMAT}, the one this version reads")
    missing = [name for name in _PARTS if name not in state]
    if missing:
        raise ValueError(f"state holds {', '.join(map(str, state))}, and no {', '.join(missing)}; {_WAY_OUT}")
    for name, kinds in _PARTS.items():
        if not isinstance(state[name], kinds):
            raise ValueError(f"state[{name!r}]={state[name]!r:.60} is a {type(state[name]).__name__}; {_WAY_OUT}")


def changes_since(state: Mapping[str, Any], identity: Mapping[str, str]) -> str:
    """Return what has changed since ``state`` was saved, so that numbers cannot be compared; ``""`` if nothing has."""
    named = (("the probe", "probe_fingerprint"), ("the model's attention", "model_signature"))
    return "; ".join(
        f"{what} was {state[key]}, is {identity[key]}" for what, key in named if state[key] != identity[key]
    )


def continue_curves(state: Mapping[str, Any], history: History, log: TrainingLog) -> list[str]:
    """Load both from a state; return a sentence about each that cannot be read and begins anew."""
    parts: dict[str, History | TrainingLog] = {"history": history, "logged": log}
    unreadable = []
    for name, part in parts.items():
        try:
            part.load_state_dict(state.get(name, {}))
        except Exception as error:
            unreadable.append(f"the state of {name!r} cannot be read ({error_text(error)}): it begins anew")
    return unreadable
