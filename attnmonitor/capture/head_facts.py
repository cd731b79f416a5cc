"""What stands out in the queries and keys of a layer's heads at the first forward: zeros, constants, copies, position.

Verification proves that an attention was captured as the model computes it, not that the model is as its author meant
it. These facts show mistakes such as a projection that is not used, heads tied by accident, or rotary embedding on the
queries alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

__all__ = ["NO_POSITION", "head_facts"]

NO_POSITION = "equal tokens have equal queries and keys"
"""How the fact begins that position is in neither queries nor keys."""

_NUM_ROWS = 64  # positions on which heads are compared
_NUM_TOKENS = 256  # positions among which equal tokens are looked for
_NUM_SEQUENCES = 4
_NEAR = 1e-5  # relative; embeddings turned by a rotary embedding differ by far more
_NUM_NAMED = 4


def head_facts(
    query: Tensor, key: Tensor, query_mask: Tensor | None, key_mask: Tensor | None, *, on_positions: bool
) -> tuple[str, ...]:
    """Return what stands out in the queries and keys of each head; waits for the device.

    Args:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``.
        query_mask: ``(B, Lq)``, True for a token.
        key_mask: ``(B, Lk)``, likewise.
        on_positions: Whether queries and keys are those of the same positions.
    """
    facts = [
        *_facts("queries", "head", query[:_NUM_SEQUENCES], query_mask),
        *_facts("keys", "head" if key.shape[1] == query.shape[1] else "KV head", key[:_NUM_SEQUENCES], key_mask),
    ]
    if on_positions and not facts:
        facts += _position_facts(query[:_NUM_SEQUENCES], key[:_NUM_SEQUENCES], key_mask)
    return tuple(facts)


def _facts(what: str, noun: str, heads: Tensor, mask: Tensor | None) -> list[str]:
    """Return which heads ``(B, H, L, d)`` are zero, constant over positions or equal to another."""
    length = heads.shape[-2]
    rows = torch.arange(0, length, -(-length // _NUM_ROWS), device=heads.device)
    x = heads.index_select(-2, rows).double()
    valid = x.new_ones(len(x), len(rows), dtype=torch.bool)
    if mask is not None and mask.shape[-1] == length:
        valid = mask[: len(x)].index_select(-1, rows)
    valid = valid[:, None, :, None]
    x = x.masked_fill(~valid, 0.0)
    size = x.abs().amax((0, 2, 3))  # (H,)
    mean = x.sum(-2, keepdim=True) / valid.sum(-2, keepdim=True).clamp_min(1)
    varies = (x - mean).masked_fill(~valid, 0.0).abs().amax((0, 2, 3)) > _NEAR * size
    sizes, moving = size.tolist(), varies.tolist()
    zero = [head for head, of_head in enumerate(sizes) if of_head == 0]
    constant = [head for head, moves in enumerate(moving) if not moves and head not in zero]
    facts = []
    if zero:
        facts.append(f"{what} of {_named(noun, zero, len(sizes))} are zero")
    if constant and int(valid.sum(-2).max()) > 1:
        facts.append(f"{what} of {_named(noun, constant, len(sizes))} are the same at every position")
    by_head = x.transpose(0, 1).flatten(1)  # (H, B·R·d)
    near = torch.cdist(by_head, by_head, p=torch.inf) <= _NEAR * size[:, None]
    equal = [(a, b) for a, b in combinations(range(len(sizes)), 2) if near[a, b] and a not in zero]
    if equal:
        alike = sorted({head for pair in equal for head in pair})
        facts.append(f"{what} of {_named(noun, alike, len(sizes))} are equal to another's")
    return facts


def _named(noun: str, heads: Sequence[int], count: int) -> str:
    if len(heads) == count > 1:
        return f"all {count} {noun}s"
    if len(heads) == 1:
        return f"{noun} {heads[0]}"
    *first, last = map(str, heads[:_NUM_NAMED])
    if len(heads) > _NUM_NAMED:
        return f"{noun}s {', '.join([*first, last])} and {len(heads) - _NUM_NAMED} more"
    return f"{noun}s {', '.join(first)} and {last}"


def _position_facts(query: Tensor, key: Tensor, mask: Tensor | None) -> list[str]:
    """Return whether position reaches queries and keys, where equal tokens at several positions show it."""
    equal = [_equal_positions(x, mask) for x in (query, key)]
    in_queries, in_keys, in_both = (bool(x.any()) for x in (*equal, equal[0] & equal[1]))
    if in_both:
        return [f"{NO_POSITION}: they do not depend on position"]
    if in_keys:
        return ["equal tokens have equal keys but not equal queries: only the queries depend on position"]
    if in_queries:
        return ["equal tokens have equal queries but not equal keys: only the keys depend on position"]
    return []


def _equal_positions(heads: Tensor, mask: Tensor | None) -> Tensor:
    """Return which pairs of positions have equal rows in all heads, ``(B, L, L)`` bool."""
    rows = heads[:, :, :_NUM_TOKENS].transpose(1, 2).flatten(2).double()
    equal = torch.cdist(rows, rows, p=torch.inf) <= _NEAR * rows.abs().amax()
    equal = equal & ~torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)
    if mask is not None:
        valid = mask[: len(rows), : rows.shape[1]]
        equal = equal & valid[:, :, None] & valid[:, None, :]
    return equal
