"""Which keys queries see, read in blocks of rows, so that no ``L × L`` tensor is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.capture.verify import Attention

__all__ = ["BLOCK_NUMBERS", "Pattern", "pattern_of", "row_blocks", "spans_of"]

BLOCK_NUMBERS = 2**22
"""Logits that a block of rows holds at most, all heads of all sequences counted; one row always fits."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """What the queries of self-attention see in any head.

    Attributes:
        itself: ``(B, L)``, whether a position sees itself.
        sees_others: ``(B, L)``, whether it sees another position.
        seen_by_others: ``(B, L)``, whether another position sees it.
        looks_ahead: ``(B,)``, whether some position sees a later one.
        first: ``(B, L)``, the first position that each sees.
        explained_by: Of the candidates for the tokens, the first that explains what is seen; None if none does.
    """

    itself: Tensor
    sees_others: Tensor
    seen_by_others: Tensor
    looks_ahead: Tensor
    first: Tensor
    explained_by: Tensor | None


def row_blocks(attention: Attention, rows: Tensor) -> Iterator[Tensor]:
    """Yield rows in blocks whose logits have a bounded number of entries."""
    num_sequences, num_heads = attention.query.shape[:2]
    yield from rows.split(max(1, BLOCK_NUMBERS // (num_sequences * num_heads * attention.key.shape[-2])))


def _seen(attention: Attention) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows ``(R,)`` and what they see in any head, ``(B, R, Lk)``."""
    bias = attention.without_product()
    for rows in row_blocks(attention, torch.arange(attention.query.shape[-2], device=attention.query.device)):
        yield rows, (bias.logit_rows(rows) > -torch.inf).any(1)


def pattern_of(attention: Attention, candidates: Sequence[Tensor]) -> Pattern:
    """Return what the queries of self-attention see; waits for the device.

    Args:
        attention: The attention.
        candidates: Which positions may be the tokens, ``(B, L)`` bool each. One explains what is seen where no token
            sees padding and every token sees itself. Of ids both readings may: the ids 0 and 1 of two documents, or 0
            for padding after the tokens.
    """
    by_row: dict[str, list[Tensor]] = {"itself": [], "sees_others": [], "first": []}
    shape = (len(attention.key), attention.key.shape[-2])
    seen_by_others = torch.zeros(shape, dtype=torch.bool, device=attention.key.device)
    looks_ahead = seen_by_others.new_zeros(shape[0])
    fails = [seen_by_others.new_zeros(()) for _ in candidates]
    columns = torch.arange(shape[1], device=attention.key.device)
    for rows, seen in _seen(attention):
        own = columns == rows[:, None]
        others = seen & ~own
        by_row["itself"].append((seen & own).any(-1))
        by_row["sees_others"].append(others.any(-1))
        by_row["first"].append(seen.int().argmax(-1))
        seen_by_others |= others.any(1)
        looks_ahead |= (others & (columns > rows[:, None])).any((1, 2))
        for number, valid in enumerate(candidates):
            fails[number] |= (seen & valid[:, rows, None] & ~valid[:, None, :]).any()
    found = {name: torch.cat(parts, dim=1) for name, parts in by_row.items()}
    explaining = []
    for valid, failed in zip(candidates, fails, strict=True):
        if bool(~failed & (found["itself"] | ~valid).all()):
            explaining.append(valid)
    explained_by = next(
        (x for n, x in enumerate(explaining) if _has_both(x) and not _is_document(x, explaining[:n], explaining[n:])),
        None,
    )
    return Pattern(seen_by_others=seen_by_others, looks_ahead=looks_ahead, explained_by=explained_by, **found)


def _has_both(valid: Tensor) -> bool:
    """Return whether some positions are no tokens, and every sequence has a token."""
    return bool((~valid).any() & valid.any(-1).all())


def _is_document(valid: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Return whether positions are one of two documents: their complement explains as much, and is not behind."""
    if any(torch.equal(valid, ~other) for other in before):
        return True
    comes_first = bool((valid[:, :-1] >= valid[:, 1:]).all())
    return not comes_first and any(torch.equal(valid, ~other) for other in after)


def spans_of(attention: Attention, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last token that each position sees, ``(B, L)`` each; waits for the device.

    Args:
        attention: The attention.
        valid: ``(B, L)`` bool, True for a token.
    """
    firsts, lasts, length = [], [], valid.shape[-1]
    for _, seen in _seen(attention):
        tokens = seen & valid[:, None, :]
        firsts.append(tokens.int().argmax(-1))
        lasts.append(length - 1 - tokens.flip(-1).int().argmax(-1))
    return torch.cat(firsts, 1), torch.cat(lasts, 1)
