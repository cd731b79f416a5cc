"""Small models for the tests, and a training loop that the monitor must not change."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CausalSelfAttention(nn.Module):
    """Grouped-query causal attention through ``F.scaled_dot_product_attention``."""

    def __init__(self, width: int, num_query_heads: int, num_kv_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_query_heads, self.num_kv_heads = num_query_heads, num_kv_heads
        self.head_dim = width // num_query_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, num_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(width, num_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = lambda y, n: y.unflatten(-1, (n, self.head_dim)).transpose(1, 2)  # noqa: E731
        return (
            split(self.q_proj(x), self.num_query_heads),
            split(self.k_proj(x), self.num_kv_heads),
            split(self.v_proj(x), self.num_kv_heads),
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.num_kv_heads != self.num_query_heads,
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, num_query_heads: int, num_kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, num_query_heads, num_kv_heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class TinyGPT(nn.Module):
    """A causal language model over ``vocabulary`` symbols with up to ``max_length`` positions."""

    def __init__(
        self,
        *,
        vocabulary: int = 50,
        width: int = 32,
        num_layers: int = 2,
        num_query_heads: int = 4,
        num_kv_heads: int | None = None,
        max_length: int = 32,
        dropout: float = 0.0,
        batch_norm: bool = False,
        layer_drop: str | None = None,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(max_length, width)
        kv_heads = num_kv_heads or num_query_heads
        self.blocks = nn.ModuleList(Block(width, num_query_heads, kv_heads, dropout) for _ in range(num_layers))
        self.batch_norm = nn.BatchNorm1d(width) if batch_norm else None
        self.layer_drop = layer_drop
        self.head = nn.Linear(width, vocabulary)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.tokens(token_ids) + self.positions(torch.arange(token_ids.shape[1], device=token_ids.device))
        for block in self.blocks:
            draw = {"python": random.random, "numpy": np.random.random}.get(self.layer_drop or "", lambda: 1.0)()
            x = block(x) if draw > 0.2 else x
        if self.batch_norm is not None:
            x = self.batch_norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x)


class CheckpointedGPT(TinyGPT):
    """Each block is recomputed in the backward pass by ``torch.utils.checkpoint`` itself, in eval mode as well."""

    def __init__(self, *, use_reentrant: bool, dropout: float) -> None:
        super().__init__(dropout=dropout)
        self.use_reentrant = use_reentrant

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.tokens(token_ids) + self.positions(torch.arange(token_ids.shape[1], device=token_ids.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


def token_batch(seed: int = 0, batch: int = 3, length: int = 24, vocabulary: int = 50) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def language_loss(logits: Tensor, token_ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, *, seed: int = 1) -> list[float]:
    """Train on batches drawn from the seeded global generators, and return the losses."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return [train_step(model, optimizer, torch.randint(50, (4, 24))).item() for _ in range(num_steps)]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, token_ids: Tensor) -> Tensor:
    """Take one optimizer step on one batch; return the loss before it."""
    loss = language_loss(model(token_ids), token_ids)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return weights, buffers, optimizer state, train flags and generator states, for a comparison bit by bit."""
    states = [value for group in optimizer.state.values() for value in group.values() if isinstance(value, Tensor)]
    flags = torch.tensor([module.training for module in model.modules()])
    python = torch.tensor(random.getstate()[1])
    numpy = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    return [*model.state_dict().values(), *states, flags, torch.get_rng_state(), python, numpy]
