r"""The evidence of heads, from what was kept of their layer: the same formulas as the metrics, for one head.

Leverage :math:`\ell_j`, the shares :math:`\|\tilde E e_j\|^2 / \|\tilde E\|_F^2` and the singular values of the energy
field follow from the keys and the queries' Gram matrix. Of a KV head the queries of all heads that read it are taken
together: stacking rows sums Gram matrices.

Letters: B sequences, H heads, L key positions, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnmonitor.capture.verify import HIDDEN
from attnmonitor.functional import query_gram
from attnmonitor.functional.key_basis import key_gram
from attnmonitor.functional.precision import full_precision
from attnmonitor.functional.queries import QueryGram
from attnmonitor.functional.summaries import layer_summaries
from attnmonitor.measurement.kept import KeptLayer
from attnmonitor.sample import HeadEvidence, Position, Scope

__all__ = ["evidence_of"]

TokenAt = Callable[[int, int], str | None]

_MOST_POSITIONS = 8  # by leverage, and as many by energy share
_MOST_VALUES = 16  # singular values
_MOST_ROWS = _MOST_COLUMNS = 32  # of attention


def evidence_of(
    kept: KeptLayer, layer: str, scope: Scope, heads: Sequence[int], *, global_step: int, token_at: TokenAt
) -> list[HeadEvidence]:
    """Return the evidence of some heads of a layer: of one of them, or of all.

    Args:
        kept: What was kept of the layer.
        layer: Its name.
        scope: What ``heads`` counts.
        heads: One index, or all of them in order.
        global_step: Optimizer steps done when the layer ran.
        token_at: From sequence and position in the probe to a token.
    """
    members = [_members(kept, scope, head) for head in heads]
    by_key = sorted(members)
    kv_heads = list(dict.fromkeys(kv_head for kv_head, _ in by_key))
    key = kept.key[:, kv_heads]
    grouped = [[_place(kept, head) for head in queries] for _, queries in by_key]
    with full_precision(key.device):
        found = layer_summaries(
            _stacked(kept, grouped),
            key_gram(key, kept.heads.key_mask),
            {"leverage", "energy_shares", "energy_spectrum"},
            scale=kept.heads.scale,
            method="exact",
        )
    leverage, shares = found["leverage"].weights.cpu(), found["energy_shares"].weights.cpu()  # (B, H, L)
    values = found["energy_spectrum"].singular_values[..., :_MOST_VALUES].float().cpu()
    broken = ~key.isfinite().all(-1)
    if kept.heads.key_mask is not None:
        broken = broken & kept.heads.key_mask[:, None]
    broken = broken.cpu()
    at_probe = _ProbePlaces(kept)
    evidence: dict[int, HeadEvidence] = {}
    for unit, (kv_head, queries) in enumerate(by_key):
        at, index = kv_heads.index(kv_head), members.index((kv_head, queries))
        places = _leading(leverage[:, at].float(), shares[:, unit].float(), broken[:, at])
        rows, attention = _strip(kept, queries, first=[sequence for sequence, _ in places])
        positions: list[Position] = []
        for sequence, position in places:
            row, place = at_probe(sequence, position)
            numbers = float(leverage[sequence, at, position]), float(shares[sequence, unit, position])
            positions.append((row, place, *numbers, token_at(row, place) if kept.on_positions else None))
        shown = places[0][0] if places else 0
        evidence[index] = HeadEvidence(
            layer=layer,
            head=heads[index],
            scope=scope,
            global_step=global_step,
            rule=None,
            positions=positions,
            attention=attention,
            singular_values=values[shown, unit].clone(),
            rows=[at_probe(sequence, row) for sequence, row in rows],
            num_keys=key.shape[2],
            sequence=at_probe(shown, 0)[0],
            group=len(queries),
        )
    return [evidence[index] for index in range(len(heads))]


def _members(kept: KeptLayer, scope: Scope, head: int) -> tuple[int, list[int]]:
    """Return the KV head, and the query heads in the model's order that are taken together."""
    if scope == "query_head":
        return _place(kept, head) // _group(kept), [head]
    members = [each for each in range(kept.num_heads["query_head"]) if _place(kept, each) // _group(kept) == head]
    return head, members


def _place(kept: KeptLayer, head: int) -> int:
    """Return where the queries of a head are, which stand beside those of the heads that share its key head."""
    num_kv_heads = kept.num_heads["kv_head"]
    return (head % num_kv_heads) * _group(kept) + head // num_kv_heads if kept.tiled else head


def _group(kept: KeptLayer) -> int:
    """Return how many query heads share a key head."""
    return kept.num_heads["query_head"] // kept.num_heads["kv_head"]


def _stacked(kept: KeptLayer, grouped: Sequence[Sequence[int]]) -> QueryGram:
    """Return the Gram matrices of the queries of each group of heads, taken together."""
    places = [place for group in grouped for place in group]
    if isinstance(kept.query, Tensor):
        grams = query_gram(kept.query[:, places], kept.heads.query_mask)
    else:
        grams = replace(kept.query, gram=kept.query.gram[:, places])
    size = len(grouped[0])
    num_sequences, _, length, head_dim = kept.query.shape
    return replace(
        grams,
        shape=torch.Size((num_sequences, len(grouped), length, head_dim)),
        gram=grams.gram.unflatten(1, (-1, size)).sum(2),
        num_queries=grams.num_queries * size,
    )


def _leading(leverage: Tensor, shares: Tensor, broken: Tensor) -> list[tuple[int, int]]:
    """Return sequence and position of the keys that stand out, ``(B, L)`` each, the most first."""
    both = leverage.nan_to_num() + shares.nan_to_num() + 4.0 * broken
    found: set[int] = set()
    for each in (leverage.nan_to_num() + 4.0 * broken, shares.nan_to_num()):
        top = each.flatten().topk(min(_MOST_POSITIONS, each.numel()))
        found |= {place for weight, place in zip(top.values.tolist(), top.indices.tolist(), strict=True) if weight > 0}
    ordered = sorted(found, key=lambda place: (-float(both.flatten()[place]), place))
    return [divmod(place, leverage.shape[1]) for place in ordered]


def _strip(kept: KeptLayer, queries: Sequence[int], first: Sequence[int]) -> tuple[list[tuple[int, int]], Tensor]:
    """Return sequence and position of some rows, and their attention with the keys pooled, ``(R, C)``.

    Args:
        kept: What was kept of the layer.
        queries: The heads whose mean is taken.
        first: The sequences whose rows come first.
    """
    of_heads = kept.logits[:, queries]  # (B, G, R, L)
    counts = ((of_heads > HIDDEN) | of_heads.isnan()).any(-1).any(1)
    if kept.heads.query_mask is not None:
        counts = counts & kept.heads.query_mask[:, kept.rows]
    is_counted = counts.tolist()
    order = dict.fromkeys([*first, *range(len(is_counted))])
    places = [(sequence, row) for sequence in order for row, counted in enumerate(is_counted[sequence]) if counted]
    places = places[:_MOST_ROWS]
    num_keys = kept.logits.shape[-1]
    columns = min(_MOST_COLUMNS, num_keys)
    if not places:
        return [], torch.zeros(0, columns, dtype=torch.float32)
    at, rows = (list(each) for each in zip(*places, strict=True))
    logits = of_heads[at, :, rows].float().cpu()  # (R, G, L)
    probability = logits.exp() if kept.is_log_probability else logits.softmax(-1)
    probability = probability.masked_fill(logits <= HIDDEN, 0).mean(1)
    parts = torch.arange(num_keys) * columns // num_keys
    pooled = probability.new_zeros(len(places), columns).index_add_(1, parts, probability)
    positions = kept.rows.tolist()
    return [(sequence, positions[row]) for sequence, row in places], pooled


class _ProbePlaces:
    """From sequence and position of a layer to row and position of the probe: documents are parts of its rows."""

    def __init__(self, kept: KeptLayer) -> None:
        self._index = None if kept.documents is None else kept.documents.index.cpu()
        self._length = kept.size[1]

    def __call__(self, sequence: int, position: int) -> tuple[int, int]:
        if self._index is None:
            return sequence, position
        return divmod(int(self._index[sequence, position]), self._length)
