"""Attention in one call: `scaled_dot_product_attention` and FlexAttention have q, k and scale as arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor.capture.heads import Lead
from attnmonitor.capture.nested import read_by
from attnmonitor.capture.verify import Attention, Step, grouped_product, visible_keys

__all__ = [
    "add_mask",
    "add_soft_cap",
    "attend",
    "hide_future",
    "mask_step",
    "padded",
    "read_flex",
    "read_sdpa",
    "with_lead",
    "without_overrides",
]


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
    """Return the attention of one ``scaled_dot_product_attention``, with its operands as they are."""
    attention = Attention(query, key, query.shape[-1] ** -0.5 if scale is None else scale, value=value)
    if attn_mask is not None:
        add_mask(attention, attn_mask, attention.affine)
    if is_causal:
        attention.nonlinear.append(Step(hide_future))
    attention.after.append(attend(value))
    attention.exact = dropout_p == 0
    return attention


def without_overrides(func: FunctionType) -> FunctionType:
    """Return a copy of a function of torch whose inner calls a mode sees.

    Torch passes such a function, ``multi_head_attention_forward``, to a mode as one opaque call. A copy whose test for
    overrides is always false computes the same. Torch's own module stays as it is.
    """
    copied = FunctionType(
        func.__code__,
        {**func.__globals__, "has_torch_function": lambda _: False},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    copied.__kwdefaults__ = func.__kwdefaults__
    return copied


def with_lead(attention: Attention, lead: Lead) -> Attention:
    """Return an attention read from operands ``(*lead, L, d)`` with operands ``(B, H, L, d)``."""
    heads_of = attention.heads_of
    of_keys = lead.resized(attention.key.shape[:-2], heads=True) or lead
    return replace(
        attention,
        query=lead.split(attention.query),
        key=of_keys.split(attention.key),
        value=None if attention.value is None else lead.values(attention.value),
        heads_of=None if heads_of is None else lambda x: lead.split(heads_of(x)),
        lead=lead,
        arrange=lead.join,
        restore=lead.split,
        visible=[lead.of_sequences(seen) for seen in attention.visible],
    )


def padded(named: Mapping[str, Any], output: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Return the arguments and the output of a call on nested tensors as padded ones with a mask."""
    operands = {name: _as_padded(named[name]) for name in ("query", "key", "value")}
    rows, columns = (
        torch.arange(operands[name][0].shape[-2], device=lengths.device) < lengths[:, None]
        for name, (_, lengths) in list(operands.items())[:2]
    )
    seen = rows[:, None, :, None] & columns[:, None, None, :]
    arguments = {**named, **{name: x for name, (x, _) in operands.items()}, "attn_mask": seen}
    return arguments, _as_padded(output)[0]


def _as_padded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a nested tensor of heads ``(H, L, d)`` as ``(B, H, L, d)``, and the lengths."""
    sequences = x.transpose(1, 2).unbind()  # (L, H, d)
    lengths = torch.tensor([len(each) for each in sequences], device=x.device)
    return nn.utils.rnn.pad_sequence(list(sequences), batch_first=True).transpose(1, 2), lengths


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
    """Return the attention of one call of FlexAttention's operator.

    Its score and mask functions are written for one entry, in elementwise operations and indexing, so broadcast indices
    evaluate them on the wanted rows.
    """
    mask_mod = block_mask[-1]
    attention = Attention(query, key, scale, value=value)
    batch = torch.arange(query.shape[0], device=query.device)[:, None, None, None]
    head = torch.arange(query.shape[1], device=query.device)[:, None, None]
    column = torch.arange(key.shape[-2], device=query.device)

    def modify(x: Tensor, rows: Tensor) -> Tensor:
        return score_mod(x, batch, head, rows[:, None], column, *score_mod_other_buffers)

    def hide(x: Tensor, rows: Tensor) -> Tensor:
        seen = mask_mod(batch, head, rows[:, None], column, *mask_mod_other_buffers)
        return torch.where(seen, x, -torch.inf)

    def seen_by(row: Tensor) -> Tensor:
        seen: Tensor = mask_mod(batch[..., 0, 0], torch.zeros_like(column), row, column, *mask_mod_other_buffers)
        return seen.expand(query.shape[0], key.shape[-2])

    attention.nonlinear += [Step(modify), Step(hide)]
    attention.has_added = True
    attention.masked_by = (*read_by(mask_mod), *mask_mod_other_buffers)
    attention.after.append(attend(value))
    # A mask function has no tensor to reduce, and evaluating it on every pair would grow with L². Padding hides a key
    # from all queries, also from that at its own position and the last one; other masks show it to one of these two.
    last = torch.full_like(column, query.shape[-2] - 1)
    attention.visible.append((seen_by(torch.minimum(column, last)) | seen_by(last))[:, None])
    return attention


def mask_step(mask: Tensor, num_rows: int) -> Step:
    """Return the step that applies a bool (True = visible) or additive mask, broadcast against ``(B, Hq, Lq, Lk)``."""

    def apply(x: Tensor, rows: Tensor) -> Tensor:
        part = mask.index_select(-2, rows) if mask.dim() >= 2 and mask.shape[-2] == num_rows and num_rows > 1 else mask
        return torch.where(part, x, -torch.inf) if mask.dtype == torch.bool else x + part

    return Step(apply)


def add_mask(attention: Attention, mask: Tensor, steps: list[Step]) -> None:
    """Add a mask to an attention, bool (True = visible) or additive, broadcast against ``(B, Hq, Lq, Lk)``.

    Args:
        attention: The attention.
        mask: The mask.
        steps: The steps of the attention that it is the next of.
    """
    steps.append(mask_step(mask, attention.query.shape[-2]))
    attention.masked_by = (mask,)
    attention.has_added |= mask.is_floating_point()
    if mask.shape[-1] == attention.key.shape[-2]:
        attention.visible.append(visible_keys(mask if mask.dim() >= 2 else mask[None]))


def add_soft_cap(attention: Attention, cap: float) -> None:
    """Add ``cap · tanh(logits / cap)`` as the next step of an attention."""
    attention.nonlinear.append(Step(lambda x, rows: cap * torch.tanh(x / cap)))
    attention.outside.add("softcap")


def hide_future(x: Tensor, rows: Tensor) -> Tensor:
    """Apply the causal mask: row i sees keys 0 to i."""
    future = torch.arange(x.shape[-1], device=x.device) > rows[:, None]
    return x.masked_fill(future, -torch.inf)


def attend(value: Tensor) -> Step:
    """Return the step from logits to output: softmax times ``value``, ``(B, Hv, Lk, dv)`` or ``(*lead, Lk, dv)``."""
    if value.dim() == 4:
        return Step(lambda logits, rows: grouped_product(logits.softmax(-1), value.transpose(-1, -2)))

    def apply(logits: Tensor, rows: Tensor) -> Tensor:
        repeats = logits.shape[-3] // value.shape[-3]
        values = value.repeat_interleave(repeats, -3) if value.shape[-3] > 1 else value
        return logits.softmax(-1) @ values.to(logits.dtype)

    return Step(apply)
