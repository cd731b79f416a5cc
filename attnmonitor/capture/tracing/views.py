"""Views of logits, masks and biases: how a trace goes on after each.

Decomposed relative positions (ViTDet, SAM, MViT) view the logits ``(..., L, L)`` as ``(..., h, w, h, w)``, add a term
per row and one per column of the image, and view them back; where a class token comes first, they do so on a slice that
is written back. All that happens in between is a sum, so it is kept as one bias on the whole logits.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnmonitor.capture.axes import index_parts, is_plain_index
from attnmonitor.capture.merged_rows import MergedRows
from attnmonitor.capture.tracing.split import Split, joined
from attnmonitor.capture.tracing.trace import Trace
from attnmonitor.capture.tracing.traced_call import TracedCall, add_rows, size_along
from attnmonitor.capture.verify import HIDDEN, visible_keys

__all__ = ["CASTS", "RESHAPES", "in_split", "permuted", "reshaped", "sliced", "with_bias", "with_mask"]

CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach"}
RESHAPES = {"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"}


def permuted(trace: Trace, call: TracedCall) -> Trace | None:
    """Follow a permutation, read off a tensor whose sizes number its axes."""
    source = call.operands[0]
    numbered = torch.empty(tuple(range(2, 2 + source.dim())), device="meta")
    landed = [size - 2 for size in call.repeat_on(numbered).shape]
    axes = [landed.index(axis % source.dim()) for axis in (trace.query_axis, trace.key_axis)]
    others = [axis for axis in landed if axis not in (trace.query_axis % source.dim(), trace.key_axis % source.dim())]
    if others != sorted(others):
        return None
    query_axis, key_axis = (axis - source.dim() for axis in axes)
    return trace.then(lambda x, rows: call.repeat_on(x), rearranges=True, query_axis=query_axis, key_axis=key_axis)


def reshaped(trace: Trace, call: TracedCall) -> Trace | None:
    """Follow a reshape of sequences and heads, also into the rows; after one of positions only sums are followed."""
    before, shape = call.operands[0].shape, call.output.shape
    rows = _into_rows(trace, before, shape) if trace.merged is None else _out_of_rows(trace, trace.merged, shape)
    if rows is not None:
        return rows
    if {trace.query_axis, trace.key_axis} != {-1, -2}:
        return None
    if shape[-2:] != before[-2:]:
        return None if trace.stage == "after" or trace.merged else replace(trace, split=Split(call.operands[0]))
    lead = shape[:-2]
    return trace.then(lambda x, rows: x.reshape(lead + x.shape[-2:]), rearranges=True)


def _into_rows(trace: Trace, before: torch.Size, shape: torch.Size) -> Trace | None:
    """Follow a reshape that merges heads into the rows.

    They are ``(.., H, L, Lk)`` or ``(.., L, H, Lk)`` before, and ``(.., n, Lk)`` after.
    """
    if trace.key_axis != -1 or len(shape) < 2 or shape[-1] != before[-1]:
        return None
    lead, num_positions = shape[:-2], before[trace.query_axis]
    if trace.query_axis == -2:
        count, rest = divmod(shape[-2], num_positions)
        merged = MergedRows(count, heads_first=True)
    elif trace.query_axis == -3:
        count, rest = before[-2], shape[-2] - num_positions * before[-2]
        merged = MergedRows(count, heads_first=False)
    else:
        return None
    if rest or count < 2:
        return None
    return trace.then(lambda x, rows: x.reshape(*lead, -1, x.shape[-1]), rearranges=True, merged=merged, query_axis=-2)


def _out_of_rows(trace: Trace, merged: MergedRows, shape: torch.Size) -> Trace | None:
    """Follow a reshape that views merged rows apart again."""
    num_positions = trace.origin.product.query.shape[-2]
    if (trace.query_axis, trace.key_axis) != (-2, -1):
        return None
    if merged.heads_first and shape[-2] == num_positions:
        lead, query_axis = (*shape[:-2], -1), -2
    elif not merged.heads_first and shape[-3:-1] == (num_positions, merged.num_heads):
        lead, query_axis = (*shape[:-3], -1, merged.num_heads), -3
    else:
        return None
    return trace.then(
        lambda x, rows: x.reshape(*lead, x.shape[-1]), rearranges=True, merged=None, query_axis=query_axis
    )


def sliced(trace: Trace, call: TracedCall) -> Trace | None:
    """Follow a slice that removes columns, or one of both positions that may be written back."""
    before, after = call.operands[0].shape, call.output.shape
    index, is_view = index_parts(call.args[1]), is_plain_index(call.args[1])
    fewer_heads = before[-2:] == after[-2:] and math.prod(before) > math.prod(after)
    if trace.stage == "after" and fewer_heads and {trace.query_axis, trace.key_axis} == {-1, -2}:
        some_heads = replace(trace, ambiguity="its weights are used by some of its heads alone")
        return some_heads.then(lambda x, rows: call.repeat_on(x)) if is_view else None
    if not is_view or any(type(part) is int for part in index):
        return None
    if len(before) != len(after):
        return reshaped(trace, call) if math.prod(before) == math.prod(after) else None
    axis = trace.key_axis
    if any(a != b for i, (a, b) in enumerate(zip(before, after, strict=True)) if i - len(before) != axis):
        return None if trace.stage == "after" else replace(trace, split=Split(call.operands[0], index))
    start = index[-1].start or 0 if isinstance(index[-1], slice) and axis == -1 else 0
    return trace.then(lambda x, rows: call.repeat_on(x), rearranges=True, first_column=trace.first_column - start)


def in_split(trace: Trace, split: Split, call: TracedCall) -> Trace | None:
    """Follow sums on logits whose positions are split, until they are joined again."""
    if call.name in CASTS:
        return trace
    if call.name == "add":
        return replace(trace, split=split.plus(call.operands[1 - call.slot], call.output.shape))
    if call.name not in RESHAPES:
        return None
    if not joined(split, call.output.shape):
        return trace
    lead = call.output.shape[:-2]
    trace = trace.then(lambda x, rows: x.reshape(lead + x.shape[-2:]), rearranges=True)
    return with_bias(trace, split.bias(call.output).reshape(call.output.shape), call.output)


def with_bias(trace: Trace, bias: Tensor, logits: Tensor) -> Trace:
    """Return the trace after a bias was added."""
    trace = replace(with_mask(trace, bias, logits), has_added=True, split=None)
    return trace.then(partial(add_rows, bias, 1.0, trace.query_axis, logits.shape[trace.query_axis]))


def with_mask(trace: Trace, mask: Tensor, logits: Tensor, *, true_hides: bool = False, is_taken: bool = False) -> Trace:
    """Return the trace with the keys that a mask shows to at least one query, ``(*batch, Lk)``.

    Args:
        trace: The trace.
        mask: What is added to the logits, or bool.
        logits: The result.
        true_hides: Whether True in a bool mask hides a key.
        is_taken: Whether the mask is subtracted.
    """
    num_keys = trace.origin.product.key.shape[-2]
    if trace.stage == "after" or size_along(mask, trace.key_axis) != num_keys or mask.dim() < -trace.query_axis:
        return trace
    if true_hides and mask.dtype == torch.bool:
        seen = ~mask.all(trace.query_axis)
    elif is_taken:
        seen = mask.amin(trace.query_axis) < -HIDDEN
    else:
        seen = visible_keys(mask, trace.query_axis)
    if trace.key_axis != -1:
        seen = seen.movedim(trace.key_axis + (1 if trace.query_axis > trace.key_axis else 0), -1)
    lead = [
        size for axis, size in enumerate(logits.shape) if axis - logits.dim() not in (trace.query_axis, trace.key_axis)
    ]
    seen = seen.expand(*lead, num_keys)
    if trace.merged is not None:
        seen = seen.unsqueeze(-2).expand(*lead, trace.merged.num_heads, num_keys)
    return replace(trace, visible=(*trace.visible, seen), masked_by=(*trace.masked_by, mask))
