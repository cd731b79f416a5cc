"""Attention that arrives as one call: `scaled_dot_product_attention` and FlexAttention name their operands outright."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.rebuild import Attention, Step, grouped_product, visible_keys

__all__ = ["attend", "hide_future", "mask_step", "mask_visibility", "read_flex", "read_sdpa"]


def read_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attention:
    """A call of ``scaled_dot_product_attention`` on ``(B, H, L, d)`` operands."""
    attention = Attention(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        attention.affine.append(mask_step(attn_mask, query.shape[-2]))
        attention.visible.extend(mask_visibility(attn_mask, query, key))
    if is_causal:
        attention.affine.append(Step(hide_future))
    attention.after.append(attend(value))
    attention.exact = dropout_p == 0
    return attention


def read_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: Any = None,
    score_mod_other_buffers: tuple[Any, ...] = (),
    mask_mod_other_buffers: tuple[Any, ...] = (),
) -> Attention:
    """A call of FlexAttention's operator. Its score and mask functions are evaluated on the wanted rows only."""
    mask_mod = block_mask[-1]
    attention = Attention(query, key, scale)

    def grid(rows: Tensor) -> list[Tensor]:
        sizes = (query.shape[0], query.shape[1])
        batch, head, column = (torch.arange(size, device=query.device) for size in (*sizes, key.shape[-2]))
        return list(torch.meshgrid(batch, head, rows, column, indexing="ij"))

    def modify(x: Tensor, rows: Tensor) -> Tensor:
        flat = torch.vmap(lambda *point: score_mod(*point, *score_mod_other_buffers))
        return flat(x.flatten(), *(index.flatten() for index in grid(rows))).reshape(x.shape)

    def hide(x: Tensor, rows: Tensor) -> Tensor:
        flat = torch.vmap(lambda *point: mask_mod(*point, *mask_mod_other_buffers))
        seen = flat(*(index.flatten() for index in grid(rows)))
        return x.masked_fill(~seen.reshape(x.shape), -torch.inf)

    attention.bent += [Step(modify), Step(hide)]
    attention.after.append(attend(value))
    attention.visible.append(_flex_visibility(mask_mod, mask_mod_other_buffers, query, key))
    return attention


def _flex_visibility(mask_mod: Callable[..., Tensor], buffers: tuple[Any, ...], query: Tensor, key: Tensor) -> Tensor:
    """Keys ``(B, Lk)`` that their own position or the last query may see.

    A mask function has no tensor to reduce, and evaluating it on every pair would grow with L². Padding hides a key from
    everyone, itself and the last query included; causal, windowed and packed masks let a key be seen by its own position.
    """
    num_rows, num_keys = query.shape[-2], key.shape[-2]
    column = torch.arange(num_keys, device=query.device).repeat(query.shape[0])
    batch = torch.arange(query.shape[0], device=query.device).repeat_interleave(num_keys)
    head = torch.zeros_like(batch)
    see = torch.vmap(lambda *point: mask_mod(*point, *buffers))
    own = see(batch, head, column.clamp_max(num_rows - 1), column)
    last = see(batch, head, torch.full_like(column, num_rows - 1), column)
    return (own | last).reshape(query.shape[0], num_keys)


def mask_step(mask: Tensor, num_rows: int) -> Step:
    """Apply a bool (True = may be seen) or additive mask, broadcast against ``(B, Hq, Lq, Lk)``."""

    def apply(x: Tensor, rows: Tensor) -> Tensor:
        part = mask.index_select(-2, rows) if mask.dim() >= 2 and mask.shape[-2] == num_rows and num_rows > 1 else mask
        return torch.where(part, x, -torch.inf) if mask.dtype == torch.bool else x + part

    return Step(apply)


def mask_visibility(mask: Tensor, query: Tensor, key: Tensor) -> list[Tensor]:
    """The keys a mask ``(B|1, H|1, Lq|1, Lk)`` lets be seen, as one ``(B, Lk)`` tensor; none if it has no key axis."""
    if mask.shape[-1] != key.shape[-2]:
        return []
    seen = visible_keys(mask if mask.dim() >= 2 else mask[None])  # (..., Lk)
    while seen.dim() > 2:
        seen = seen.any(1)
    return [seen.expand(query.shape[0], -1)]


def hide_future(x: Tensor, rows: Tensor) -> Tensor:
    """The causal mask, row i seeing keys 0 to i."""
    future = torch.arange(x.shape[-1], device=x.device) > rows[:, None]
    return x.masked_fill(future, -torch.inf)


def attend(value: Tensor) -> Step:
    """Softmax over the keys, then the mean of ``value`` ``(B, Hv, Lk, dv)``."""
    return Step(lambda logits, rows: grouped_product(logits.softmax(-1), value.transpose(-1, -2)))
