"""Views of logits, masks and biases: how a trace goes on after each.

Decomposed relative positions (ViTDet, SAM, MViT) view the logits ``(..., L, L)`` as ``(..., h, w, h, w)``, add a term
per row and one per column of the image, and view them back; where a class token comes first, they do so on a slice that
is written back. All that happens in between is a sum, so it is kept as one bias on the whole logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.axes import index_parts
from attnmonitor.capture.tracing.split import Split, joined
from attnmonitor.capture.tracing.trace import Trace
from attnmonitor.capture.tracing.traced_call import TracedCall, add_rows, size_along
from attnmonitor.capture.verify import visible_keys

__all__ = ["CASTS", "RESHAPES", "in_split", "permuted", "reshaped", "sliced", "with_bias", "with_mask"]

CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach"}
RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}


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
    """Follow a reshape of sequences and heads; after one of positions only sums are followed."""
    before, shape = call.operands[0].shape, call.output.shape
    if {trace.query_axis, trace.key_axis} != {-1, -2}:
        return None
    if shape[-2:] != before[-2:]:
        return None if trace.stage == "after" else replace(trace, split=Split(call.operands[0]))
    lead = shape[:-2]
    return trace.then(lambda x, rows: x.reshape(lead + x.shape[-2:]), rearranges=True)


def sliced(trace: Trace, call: TracedCall) -> Trace | None:
    """Follow a slice that removes columns, or one of both positions that may be written back."""
    before, after = call.operands[0].shape, call.output.shape
    index = index_parts(call.args[1])
    fewer_heads = before[-2:] == after[-2:] and math.prod(before) > math.prod(after)
    if trace.stage == "after" and fewer_heads and {trace.query_axis, trace.key_axis} == {-1, -2}:
        some_heads = replace(trace, ambiguity="its weights are used by some of its heads alone")
        return some_heads.then(lambda x, rows: call.repeat_on(x)) if _picks_whole_rows(index) else None
    if not all(part is None or part is Ellipsis or isinstance(part, slice) for part in index):
        return None
    if len(before) != len(after):
        return reshaped(trace, call) if math.prod(before) == math.prod(after) else None
    axis = trace.key_axis
    if any(a != b for i, (a, b) in enumerate(zip(before, after, strict=True)) if i - len(before) != axis):
        return None if trace.stage == "after" else replace(trace, split=Split(call.operands[0], index))
    start = index[-1].start or 0 if isinstance(index[-1], slice) and axis == -1 else 0
    return trace.then(lambda x, rows: call.repeat_on(x), rearranges=True, first_column=trace.first_column - start)


def _picks_whole_rows(index: Sequence[Any]) -> bool:
    return all(part is None or part is Ellipsis or isinstance(part, slice | int) for part in index)


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


def with_mask(trace: Trace, mask: Tensor, logits: Tensor, *, true_hides: bool = False) -> Trace:
    """Return the trace with the keys that ``mask`` shows to at least one query, ``(*batch, Lk)``."""
    num_keys = trace.origin.product.key.shape[-2]
    if trace.stage == "after" or size_along(mask, trace.key_axis) != num_keys or mask.dim() < -trace.query_axis:
        return trace
    if true_hides and mask.dtype == torch.bool:
        seen = ~mask.all(trace.query_axis)
    else:
        seen = visible_keys(mask, trace.query_axis)
    if trace.key_axis != -1:
        seen = seen.movedim(trace.key_axis + (1 if trace.query_axis > trace.key_axis else 0), -1)
    lead = [
        size for axis, size in enumerate(logits.shape) if axis - logits.dim() not in (trace.query_axis, trace.key_axis)
    ]
    return replace(trace, visible=(*trace.visible, seen.expand(*lead, num_keys)), masked_by=(*trace.masked_by, mask))
