"""Attention of torch's own modules and attention written out by hand, in the ways that people write it.

Shapes: q, k, v are ``(B, H, L, d)``, or ``(B, L, H, d)`` where the layout says ``bthd``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LENGTH, BATCH = 12, 2


def hidden(padded: bool) -> dict[str, Any]:
    return {"x": torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(1))}


def hidden_masked(padded: bool) -> dict[str, Any]:
    inputs = hidden(padded)
    if padded:
        inputs["padding"] = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        inputs["padding"][1, LENGTH - 4 :] = True
    return inputs


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention` as a layer of its own."""

    def __init__(self, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True, **options)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Map ``(B, L, 32)`` to ``(B, L, 32)``; ``padding`` is True at padding."""
        return self.attn(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)[0]


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder`, which has a fused path for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Map ``(B, L, 32)`` to ``(B, L, 32)``; ``padding`` is True at padding."""
        return self.encoder(x, src_key_padding_mask=padding)


class TorchSeq2Seq(nn.Module):
    """`nn.Transformer` on ``(L, B, 32)``: a causal decoder, cross attention between sequences of equal length."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(32, 4, 2, 2, 48)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Map ``(B, L, 32)`` to ``(B, L, 32)``; ``padding`` is True at padding."""
        source = x.transpose(0, 1)
        causal = nn.Transformer.generate_square_subsequent_mask(len(source))
        return self.transformer(
            source,
            source.flip(0).contiguous(),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )


class HandWritten(nn.Module):
    """Causal self-attention whose softmax and products are written out by ``attend(q, k, v, blocked)``."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], layout: str = "bhtd") -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.attend, self.layout = attend, layout

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Map ``(B, L, 32)`` to ``(B, L, 32)``; ``padding`` is True at padding."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
        if self.layout == "bhtd":
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        blocked = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        y = self.attend(q, k, v, blocked)
        return self.out((y.transpose(1, 2) if self.layout == "bhtd" else y).flatten(2))


def by_matmul(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return nn.functional.softmax(logits.masked_fill(blocked, float("-inf")), dim=-1) @ v


def keys_first(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = (k @ q.mT / 8**0.5).masked_fill(blocked.mT, float("-inf"))
    return (v.mT @ logits.softmax(-2)).mT


def in_place(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = torch.matmul(q, k.mT)
    logits /= 8**0.5
    logits.masked_fill_(blocked[None, None], -1e9)
    return torch.matmul(logits.softmax(-1), v)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = torch.einsum("bthd,bshd->bhts", q, k).div(8**0.5)
    weights = torch.where(blocked, torch.finfo(logits.dtype).min, logits).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def sequence_first(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = torch.einsum("bind,bjnd->ijbn", q, k) * 8**-0.5
    weights = torch.softmax(logits - 1e30 * blocked[:, :, None, None], dim=1)
    return torch.einsum("ijbn,bjnd->bind", weights, v)


def flattened(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    q, k, v = (y.reshape(-1, LENGTH, 8) for y in (q, k, v))
    bias = torch.zeros(LENGTH, LENGTH).masked_fill(blocked, float("-inf"))
    logits = torch.baddbmm(bias.expand(len(q), -1, -1), q * 8**-0.5, k.transpose(1, 2))
    return torch.bmm(torch.softmax(logits, -1), v).view(BATCH, 4, LENGTH, 8)


def learned_temperature(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
    temperature = torch.tensor([4.0, 6.0, 8.0, 10.0])[:, None, None]
    return (q @ k.transpose(-2, -1) * temperature).masked_fill(blocked, float("-inf")).softmax(-1) @ v


def imported_by_name(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, is_causal=True)
