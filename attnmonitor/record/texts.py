"""Values of the user as a record can hold them: any object in, plain containers and valid UTF-8 out.

An error message may hold a file name that is not UTF-8, a configuration may hold objects of any class. None of them may
keep a sample from being written, so a value that cannot be stored as it is loses its form, and never raises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

__all__ = ["decode_json", "json_of", "plain", "storable", "typed"]

_MAX_TEXT = 20_000  # characters: a text beyond it is cut in the middle
_MAX_DEPTH = 12
_MAX_BITS = 64


def storable(text: str) -> str:
    """Return a text that SQLite, JSON and a UTF-8 file can hold: no lone surrogates, no NUL, of bounded length."""
    if len(text) <= _MAX_TEXT and str.isascii(text) and "\0" not in text:
        return text
    if len(text) > _MAX_TEXT:
        half = _MAX_TEXT // 2
        text = f"{text[:half]} ... ({len(text) - _MAX_TEXT:,} characters left out) ... {text[-half:]}"
    return str.encode(text, "utf-8", "replace").decode().replace("\0", "\ufffd")


def plain(value: Any, depth: int = 0) -> Any:
    """Return ``value`` as dicts, lists, numbers, texts and None; other objects by their ``str``."""
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 2**63):
        return value
    if isinstance(value, str):
        return storable(value)
    try:
        if isinstance(value, Integral):  # numpy's among them
            number = int(value)
            return number if number.bit_length() <= _MAX_BITS else f"{number:#x}"[:_MAX_BITS]
        if isinstance(value, Real):
            return float(value)
        if depth < _MAX_DEPTH and isinstance(value, Mapping):
            return {_text_of(key): plain(item, depth + 1) for key, item in value.items()}
        if depth < _MAX_DEPTH and isinstance(value, (list, tuple)):
            return [plain(item, depth + 1) for item in value]
    except Exception:  # any class may have methods that fail
        return _text_of(value)
    return _text_of(value)


def json_of(value: Any) -> str:
    """Return ``value``, made `plain`, as JSON."""
    return json.dumps(plain(value))


def decode_json(text: Any) -> Any:
    """Return what a JSON text holds, `plain`."""
    return plain(json.loads(typed(text, str)))


def typed(value: Any, *kinds: type) -> Any:
    """Return ``value`` if it is of one of these types.

    Raises:
        TypeError: It is not; a bool is no int.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{value!r:.40} where {' or '.join(kind.__name__ for kind in kinds)} belongs")
    return value


def _text_of(value: object) -> str:
    try:
        return storable(str(value))
    except Exception as error:
        return f"<{type(value).__name__}: {type(error).__name__}>"
