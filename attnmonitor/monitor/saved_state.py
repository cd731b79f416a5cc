"""What a saved state of a monitor must hold to be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

__all__ = ["STATE_FORMAT", "check_state"]

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
