"""Weights applied to the features of a tensor: which a call applies, and what it makes of each head's part.

Letters: B sequences, H query heads, R rows, m and n features before and after a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from attnmonitor.capture.function_call import FunctionCall
from attnmonitor.capture.layouts import OutputPlace
from attnmonitor.capture.tracing.products import labeled, ordered

__all__ = ["WEIGHTS", "AppliedWeight", "applied_weight", "feature_scale", "is_plain", "through_weight"]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
WEIGHTS = ("linear", "addmm", "matmul", "mm", "einsum", *_CONVOLUTIONS)
"""The functions that `applied_weight` reads."""


@dataclass(frozen=True, eq=False)
class AppliedWeight:
    """A weight that was applied: ``x`` of ``given``, ``(..., m)``, times ``matrix``, ``(m, n)``.

    ``axis``: the axis of features, counted from the right, in ``given`` and in what the call returned.
    """

    given: Tensor
    x: Tensor
    matrix: Tensor
    axis: int = -1


def applied_weight(call: FunctionCall) -> AppliedWeight | None:
    """Return the weight that a call applies to the last axes of a tensor; None for another call."""
    if call.name in ("linear", "addmm"):
        is_linear = call.name == "linear"
        names = ("input", "weight") if is_linear else ("input", "mat1", "mat2")
        operands = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        x, weight = (operands.get(each) for each in names[-2:])
        if not is_plain(weight) or weight.dim() != 2 or not isinstance(x, Tensor) or call.kwargs.get("alpha", 1) != 1:
            return None
        return AppliedWeight(x, x, weight.mT if is_linear else weight)
    if call.name in _CONVOLUTIONS:
        return _pointwise_convolution(call)
    found = labeled(call)
    if found is None or not is_plain(found.right) or not is_plain(found.left):
        return None
    contracted = [axis for axis in found.left_axes if axis in found.contracted]
    rest = [axis for axis in found.left_axes if axis not in contracted]
    features = [axis for axis in found.right_axes if axis not in contracted]
    if not contracted or len(features) != 1 or features[0] in rest or found.out_axes[-1:] != features[0]:
        return None
    x = ordered(found.left, found.left_axes, [*rest, *contracted])
    matrix = ordered(found.right, found.right_axes, [*contracted, *features])
    return AppliedWeight(found.left, x.flatten(len(rest)), matrix.flatten(0, -2))


def _pointwise_convolution(call: FunctionCall) -> AppliedWeight | None:
    """Return the weight of a convolution of one position, which is a linear layer of each; None for another one."""
    x, weight = call.argument(0, "input"), call.argument(1, "weight")
    if not is_plain(x) or not is_plain(weight) or weight.shape[1] != x.shape[1 - weight.dim()]:
        return None
    sizes = weight.shape[2:], call.argument(3, "stride", 1), call.argument(4, "padding", 0)
    kernel, stride, padding = (set(each) if isinstance(each, Sequence) else {each} for each in sizes)
    if kernel != {1} or stride != {1} or padding not in ({0}, {"valid"}, {"same"}):
        return None
    axis = 1 - weight.dim()
    return AppliedWeight(x, x.movedim(axis, -1), weight.flatten(1).mT, axis)


def is_plain(x: Any) -> TypeGuard[Tensor]:
    """Return whether a tensor's entries can be read here: it is not quantized, nor divided among processes."""
    return type(x) in (Tensor, nn.Parameter) and x.is_floating_point() and x.layout is torch.strided


def through_weight(by_head: Tensor, matrix: Tensor, place: OutputPlace | None) -> Tensor:
    """Return parts ``(B, H, R, m)`` times a matrix; of the output itself each head times its own rows."""
    dtype = torch.promote_types(torch.promote_types(by_head.dtype, matrix.dtype), torch.float32)
    by_head, matrix = by_head.to(dtype), matrix.to(dtype)
    if place is None:
        after: Tensor = by_head @ matrix
        return after
    num_sequences, num_heads, num_rows, head_dim = by_head.shape
    if place.heads_last:
        matrix = matrix.unflatten(0, (head_dim, num_heads)).transpose(0, 1)
    else:
        matrix = matrix.unflatten(0, (num_heads, head_dim))
    through: Tensor = (by_head.transpose(0, 1).flatten(1, 2) @ matrix).unflatten(1, (num_sequences, num_rows))
    return through.transpose(0, 1)


def feature_scale(x: Any, output: Tensor, axis: int) -> Tensor | float | None:
    """Return a number, or one per feature, ``(n,)``, which ``axis`` counts; None for anything else."""
    if isinstance(x, int | float):
        return x
    if not is_plain(x) or not (
        x.numel() == 1 or (x.dim() >= -axis and x.numel() == x.shape[axis] == output.shape[axis])
    ):
        return None
    factors: Tensor = x.flatten().float()
    return factors
