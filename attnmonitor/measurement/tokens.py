"""The tokens at positions of the probe, as text: from the ids that it holds, by the user's decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnmonitor.measurement.batches import is_plain, tensors_of
from attnmonitor.messages import error_text, printable

__all__ = ["Keys", "ProbeTokens", "checked_decode"]

_MAX_TOKEN = 24  # characters
_NO_IDS = ("mask", "label", "type", "position", "segment", "target", "document")
"""Parts of the names of integer tensors that hold no tokens."""

Decode = Callable[[int], Any]


def checked_decode(decode: Any) -> Decode | None:
    """Return the function from a token id to its text; None where none is given.

    Raises:
        ValueError: It is neither a function nor a tokenizer.
    """
    if decode is None:
        return None
    of_list = getattr(decode, "decode", None)
    if callable(of_list) and not isinstance(decode, (str, bytes, type)):
        return lambda token: of_list([token])
    if not callable(decode):
        raise ValueError(
            f"decode={decode!r:.60} is neither a function nor a tokenizer; give decode=tokenizer, or a function of one "
            "id: decode=lambda token: vocabulary[token]"
        )

    def call(token: int) -> Any:
        try:
            return decode(token)
        except TypeError:  # a tokenizer's method, which takes a list
            return decode([token])

    return call


@dataclass(frozen=True)
class Keys:
    """What the keys of a layer are.

    Attributes:
        num_sequences: Rows of the probe that they are of.
        length: Their positions in a row.
        kind: ``"self"`` or ``"cross"``.
        beside_cross: Whether the model has cross attention, so that its decoder has other ids than its encoder.
    """

    num_sequences: int
    length: int
    kind: str
    beside_cross: bool


class ProbeTokens:
    """Tokens by their positions in a probe.

    Args:
        decode: As `checked_decode` returns it.
    """

    def __init__(self, decode: Decode | None) -> None:
        self._decode = decode
        self._failure = ""

    def take_failure(self) -> str:
        """Return why a token has no text, once; ``""`` where all have."""
        failure, self._failure = self._failure, ""
        return failure

    def of(self, batch: Any, layer: str, keys: Keys) -> Callable[[int, int], str | None]:
        """Return the function from sequence and position to a token, for the keys of a layer.

        Args:
            batch: The probe's batch.
            layer: Name of the layer.
            keys: What the layer's keys are.
        """
        ids = None if self._decode is None else _ids(batch, layer, keys)
        if ids is None:
            return lambda sequence, position: None
        return lambda sequence, position: self._text(int(ids[sequence, position]))

    def _text(self, token: int) -> str | None:
        """Return a token's text, cut and without control characters; None where the decoder gives none."""
        assert self._decode is not None
        try:
            text = self._decode(token)
            if not isinstance(text, str):
                raise TypeError(f"decode({token}) gave a {type(text).__name__}, not a text")
            return _short(text)
        except Exception as error:  # a function of the user's
            self._failure = error_text(error)
            return None


def _short(text: str) -> str:
    shown = printable(str.__str__(text[: 2 * _MAX_TOKEN]), one_line=True)
    return shown if len(shown) <= _MAX_TOKEN else f"{shown[: _MAX_TOKEN - 1]}…"


def _ids(batch: Any, layer: str, keys: Keys) -> Tensor | None:
    """Return the ids of a layer's key positions, ``(B, L)``; None where it is unsure which they are."""
    named = {
        where.lower(): tensor
        for where, tensor in tensors_of(batch)
        if is_plain(tensor)
        and tensor.dtype in (torch.int64, torch.int32)
        and tensor.dim() == 2
        and not any(word in where.lower() for word in _NO_IDS)
    }
    batches = (keys.num_sequences, 2 * keys.num_sequences, 2 * keys.num_sequences + 1)  # half of it, without memory
    fitting = [where for where, ids in named.items() if ids.shape[1] == keys.length and len(ids) in batches]
    if keys.beside_cross:
        of_decoder = keys.kind == "self" and "decoder" in layer.lower()
        is_sure = len(named) > 1 or not of_decoder
        fitting = [where for where in fitting if is_sure and ("decoder" in where or "tgt" in where) is of_decoder]
        return named[fitting[0]] if len(fitting) == 1 else None
    fitting.sort(key=lambda where: "input_ids" not in where)  # else the model's first argument
    return named[fitting[0]] if fitting else None
