"""Finds out what a layer's attention does beside ``s q kᵀ``, at its first forward.

Which positions are padding, which keys a query sees, what acts on the logits, and the documents in a row: finding these
out reads values, for which the host waits for the device. So it is done once, and a `Layout` keeps what was found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnmonitor.capture.documents import Documents, blocks_in, documents_at, numbered_documents
from attnmonitor.capture.head_facts import NO_POSITION, head_facts
from attnmonitor.capture.layouts import Layout
from attnmonitor.capture.pattern import Pattern, pattern_of, row_blocks, spans_of
from attnmonitor.capture.verify import Attention, checked_rows

__all__ = ["Surroundings", "examined", "fitting_mask", "is_padding_argument"]

_VALID_NAME = re.compile(r"(^|_)attention_mask$")
_PADDING_NAME = re.compile(r"(^|_)padding_mask$")
_NUM_ROWS = 64  # rows on which masses of attention are measured


@dataclass(frozen=True)
class Surroundings:
    """What is known of a forward around an attention.

    Attributes:
        arguments: The tensors the model was called with, by name.
        packed: ``"documents"`` to cut rows that hold several, ``"one"`` to leave them whole.
        on_main_input: Whether the keys are positions of the model's first input.
        masked_by_inputs: Whether a mask follows from an input of the model beside its padding mask.
        masked_alike: Whether all masks follow from none, so that they are those of any text and show no padding.
    """

    arguments: Mapping[str, Tensor]
    packed: str
    on_main_input: bool
    masked_by_inputs: bool
    masked_alike: bool


def examined(known: Layout, attention: Attention, query_mask: Tensor | None, around: Surroundings) -> Layout:
    """Return what an attention does beside ``s q kᵀ``; waits for the device.

    Args:
        known: What is known of the layer so far: whether it is self-attention.
        attention: Its attention.
        query_mask: ``(B, Lq)``, the padding of a cross attention's queries.
        around: What is known of the forward.
    """
    square = known.is_self and not known.between_channels and attention.query.shape[-2] == attention.key.shape[-2]
    arrived = attention.key_mask()
    valid = arrived
    pattern = None
    if square:
        given = _given_padding(attention, around)
        if attention.documents is None and not any(known.ranked_masks) and _hides_tokens(attention, arrived):
            pattern = pattern_of(attention, _candidates(attention, around.arguments))
            valid = arrived if around.masked_alike else _valid_keys(pattern, arrived, given)
        if given is not None and (valid is None or bool((valid & ~given).any())):
            valid = given if valid is None else valid & given
        query_mask = valid
    key_mask = None if valid is None or valid is arrived else valid
    has_window = False
    found = replace(known, key_mask=key_mask, positions=(len(attention.key), attention.key.shape[-2]))
    if around.packed == "documents":
        if attention.documents is not None:
            found = replace(found, documents=attention.documents())
        elif pattern is not None:
            documents, has_window = _documents(attention, valid, around)
            found = replace(found, documents=documents)
    outside = attention.outside_effects(query_mask, valid, is_self=square)
    if found.documents is not None and not has_window:
        outside = tuple(name for name in outside if name != "window")
    on_positions = not known.between_channels
    facts = head_facts(
        attention.query,
        attention.key,
        query_mask if on_positions else None,
        valid if on_positions else None,
        on_positions=square,
    )
    if "bias" in outside:  # position may act through the bias alone
        facts = tuple(fact for fact in facts if not fact.startswith(NO_POSITION))
    found = replace(found, outside=outside, remarks=(*known.remarks, *facts))
    return _with_masses(found, attention, query_mask, valid, square=square)


def _with_masses(
    layout: Layout, attention: Attention, query_mask: Tensor | None, key_mask: Tensor | None, *, square: bool
) -> Layout:
    """Return the layout with what the layer's queries see."""
    num_rows, num_keys = attention.query.shape[-2], attention.key.shape[-2]
    step = max(1, num_rows // _NUM_ROWS)
    rows = torch.arange(num_rows - 1, -1, -step, device=attention.query.device)
    padded = key_mask is not None and not bool(key_mask.all())
    sums = torch.zeros(3, device=rows.device)  # rows that see something, mass later, on padding
    reached = []
    # Where queries have keys of their own and more (a prefix, a cache, a learned key), these stand before or after.
    more = max(num_keys - num_rows, 0) if layout.is_self else 0
    own_keys = [slice(more, num_keys), slice(0, num_rows)] if more else [slice(None)]
    for part in row_blocks(attention, rows):
        logits = attention.logit_rows(part)
        weights = logits.softmax(-1).nan_to_num(0.0)
        counted = (logits > -torch.inf).any(-1)  # (B, H, R): a row that sees nothing has no attention
        if query_mask is not None and query_mask.shape[-1] == num_rows:
            counted = counted & query_mask.index_select(-1, part)[:, None, :]
        weights = weights.masked_fill(~counted[..., None], 0.0)
        later = torch.arange(num_keys, device=rows.device) > part[:, None]
        hides = None if key_mask is None else key_mask[:, None, None, :]
        on_padding = weights.new_zeros(()) if hides is None else weights.masked_fill(hides, 0.0).sum()
        sums += torch.stack([counted.sum(), weights.masked_fill(~later, 0.0).sum(), on_padding])
        seen = (logits > -torch.inf) & counted[..., None]
        if key_mask is not None:
            seen = seen & key_mask[:, None, None, :]
        reached.append(torch.stack([_reached(seen, part, key_mask, own) for own in own_keys]))
    count, later_mass, mass_on_padding = sums.tolist()
    padding_mass = mass_on_padding / count if padded and count else math.nan
    future_mass = later_mass / count if square and count else math.nan
    by_row = torch.cat(reached, 1)  # (ways to count, R, 4)
    reaches = [_reach(each) for each in by_row.amax(1).tolist()]
    back, ahead = reaches[0] if square else (None, None)
    return replace(
        layout,
        sees=_sees(layout, looks_ahead=all(later != 0 for _, later in reaches)),
        future_mass=future_mass,
        padding_mass=padding_mass,
        reach_back=back,
        reach_ahead=ahead,
        reaches_evenly=ahead not in (None, 0) and torch.equal(by_row[0, :, 2], by_row[0, :, 3].clamp_max(ahead)),
    )


def _sees(layout: Layout, *, looks_ahead: bool) -> str:
    """Return what a layer's queries see, in the words of `Layout`."""
    if layout.between_channels:
        return "channels"
    if not layout.is_self:
        return "cross"
    if layout.documents is not None:
        return "documents"
    if "window" in layout.outside:
        return "window"
    return "both" if looks_ahead else "causal"


def _reached(seen: Tensor, rows: Tensor, key_mask: Tensor | None, own: slice) -> Tensor:
    """Return how many positions each row sees before and after its own, and how many there are, ``(R, 4)``.

    Args:
        seen: ``(B, H, R, Lk)``, which keys a row sees.
        rows: ``(R,)``, the rows.
        key_mask: ``(B, Lk)``, True for a token.
        own: The keys that are of the queries' positions.
    """
    seen, key_mask = seen[..., own], None if key_mask is None else key_mask[:, own]
    ahead = torch.arange(seen.shape[-1], device=rows.device) - rows[:, None]  # (R, Lk)
    there = seen.any(-1, keepdim=True)
    if key_mask is not None:
        there = there & key_mask[:, None, None, :]
    each_row = [(sign * ahead).where(which, 0).amax((0, 1, 3)) for sign in (-1, 1) for which in (seen, there)]
    return torch.stack(each_row, -1)


def _reach(reached: list[int]) -> tuple[int | None, int | None]:
    """Return how many earlier and later positions the rows see at most, None where some row sees all there are."""
    back, all_back, later, all_later = reached
    # A query that sees one position after it differs from one that sees all of one position.
    return (None if back == all_back else back), (None if later == all_later > 0 else later)


# Padding.


def _hides_tokens(attention: Attention, key_mask: Tensor | None) -> bool:
    """Return whether a checked row hides a key that others see, for another reason than that it comes later."""
    if not attention.affine and not attention.nonlinear:
        return False
    rows = checked_rows(attention.query)
    seen = attention.without_product().logit_rows(rows) > -torch.inf  # (B, H, R, Lk)
    later = torch.arange(seen.shape[-1], device=rows.device) > rows[:, None]
    looks_ahead = (seen & later).any()
    hidden = ~seen & seen.any(-1, keepdim=True) & (~later | looks_ahead)
    if key_mask is not None:
        hidden = hidden & key_mask[:, None, None, :]
    return bool(hidden.any())


def _candidates(attention: Attention, arguments: Mapping[str, Tensor]) -> list[Tensor]:
    """Return what arguments of the model may say of which positions are tokens, ``(B, L)`` bool each."""
    shape = (len(attention.key), attention.key.shape[-2])
    readings = [valid for name, argument in arguments.items() for valid in _readings(name, argument)]
    return [valid.to(attention.key.device) for valid in readings if valid.shape == shape]


def _valid_keys(pattern: Pattern, arrived: Tensor | None, given: Tensor | None) -> Tensor | None:
    """Return the keys that are tokens where padding may see itself or everything; ``arrived`` where all is plain.

    Args:
        pattern: What is seen.
        arrived: The keys that every mask shows to some query.
        given: The tokens by the model's own padding argument.
    """
    if pattern.explained_by is not None:
        return pattern.explained_by if arrived is None else arrived & pattern.explained_by
    padding = _self_seeing(pattern)
    if given is not None:
        padding = padding & ~given
    if not bool(padding.any()):
        return arrived
    return ~padding if arrived is None else arrived & ~padding


def _self_seeing(pattern: Pattern) -> Tensor:
    """Return the keys that only their own position sees although others could, ``(B, L)`` bool.

    Under a causal mask the last token of a row, or of a document, is also seen by itself alone. Padding is known by the
    later positions that see what is before it, or by seeing nothing else itself.
    """
    length = pattern.first.shape[-1]
    alone = ~pattern.seen_by_others
    earliest = pattern.first.flip(-1).cummin(-1).values.flip(-1).roll(-1, -1)  # that a later row sees
    earliest[:, -1] = length
    passed_over = earliest < torch.arange(length, device=earliest.device)
    padding = alone & (passed_over | ~pattern.sees_others | pattern.looks_ahead[:, None])
    if length > 1:
        padding[:, -1] |= alone[:, -1] & padding[:, -2]
    return padding & ~alone.all(-1, keepdim=True)


def _readings(name: str, argument: Tensor) -> list[Tensor]:
    """Return the ways to read an argument as tokens, ``(B, L)`` bool; none if it is no mask."""
    if argument.dim() != 2 or bool(((argument != 0) & (argument != 1)).any()):
        return []
    valid = argument.bool()
    if _VALID_NAME.search(name):
        return [valid]
    return [~valid] if _PADDING_NAME.search(name) else [valid, ~valid]


def is_padding_argument(name: str) -> bool:
    """Return whether an argument of a model, by its name, says which positions are padding."""
    return bool(_VALID_NAME.search(name) or _PADDING_NAME.search(name))


def _given_padding(attention: Attention, around: Surroundings) -> Tensor | None:
    """Return the tokens by the model's own padding argument, for attention on the sequence of its main input."""
    if not around.on_main_input:
        return None
    for name, argument in around.arguments.items():
        if is_padding_argument(name) and not name.startswith("decoder"):
            for reading in _readings(name, argument):
                if reading.shape == (len(attention.key), attention.key.shape[-2]):
                    return reading.to(attention.key.device)
    return None


def fitting_mask(mask: Tensor | None, attention: Attention, *, may_append: bool) -> Tensor | None:
    """Return the mask of an attention's query positions, None where there is none that fits."""
    num_sequences, _, num_rows, _ = attention.query.shape
    if mask is not None and may_append:
        mask = mask[:, :num_rows]  # nn.MultiheadAttention appends its learned and its zero key
    return mask if mask is not None and mask.shape == (num_sequences, num_rows) else None


# Documents.


def _documents(attention: Attention, valid: Tensor | None, around: Surroundings) -> tuple[Documents | None, bool]:
    """Return the documents of rows that hold several, and whether their tokens see less than all of their own.

    None where blocks are a part of the architecture.
    """
    shape, device = (len(attention.key), attention.key.shape[-2]), attention.key.device
    tokens = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    firsts, lasts = spans_of(attention, tokens)
    blocks = blocks_in(firsts, lasts, tokens)
    if all(len(spans) < 2 for spans in blocks) or not bool(((firsts < lasts) & tokens).any()):
        return None, False  # each row is one sequence, or no token sees another
    sizes = {end - start for spans in blocks for start, end in spans[:-1]}
    last = max((spans[-1][1] - spans[-1][0] for spans in blocks if spans), default=0)
    in_step = len(sizes) == 1 and last <= max(sizes)
    if in_step and not around.masked_by_inputs:
        return None, False
    whole = numbered_documents(blocks, tokens, around.arguments)
    length, unnumbered = shape[1], _unnumbered(shape, around.arguments)
    spans = [
        (row * length + start, row * length + end)
        for row, found in enumerate(whole)
        for start, end in found
        if end - start > 1  # one token alone has no attention to measure
        and not unnumbered[row, start:end].all()
    ]
    return documents_at(spans, device, tokens.flatten().cpu()), whole != blocks


def _unnumbered(shape: tuple[int, int], arguments: Mapping[str, Tensor]) -> Tensor:
    """Return the positions that ids or labels leave out by a number below 0, such as padding that sees itself."""
    whole = [x for x in arguments.values() if x.shape == shape and not x.is_floating_point() and not x.is_complex()]
    return torch.stack([torch.zeros(shape, dtype=torch.bool), *((x < 0).cpu() for x in whole)]).any(0)
