"""A small GPT and the English that every Python carries: what the other examples train.

The text is Python's own language reference (``pydoc_data.topics``, about half a million characters), read character by
character, so that nothing is downloaded.
"""

from __future__ import annotations

import pydoc_data.topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions: ``(B, L, width)`` in and out."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then MLP: ``(B, L, width)`` in and out."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class SmallGPT(nn.Module):
    """A GPT-2-like language model; 6.4 million parameters in 64 heads at its default size."""

    def __init__(
        self, vocabulary: int, *, width: int = 256, num_layers: int = 8, num_heads: int = 8, max_length: int = 128
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits of the next token: ``(B, L)`` to ``(B, L, vocabulary)``."""
        x = self.tokens(token_ids) + self.positions(torch.arange(token_ids.shape[1], device=token_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def english() -> tuple[Tensor, int]:
    """Return the text as token ids, and the number of different characters in it."""
    text = "\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    characters = sorted(set(text))
    ids = {character: index for index, character in enumerate(characters)}
    return torch.tensor([ids[character] for character in text]), len(characters)


def windows(token_ids: Tensor, length: int) -> Tensor:
    """Cut a text into non-overlapping training examples, ``(num_windows, length)``."""
    return token_ids[: len(token_ids) // length * length].view(-1, length)


def next_token_loss(model: nn.Module, token_ids: Tensor) -> Tensor:
    """Mean cross-entropy of predicting each token from those before it, in nats."""
    logits = model(token_ids)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())
