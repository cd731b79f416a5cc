"""Three families of small language models, and a vision transformer, whose heads can be broken one at a time.

They differ in what a monitor may get wrong: ``gpt2`` has biases, learned positions and fused attention; ``llama`` has
RoPE and grouped keys; ``qknorm`` has hand-written attention and normalizes queries and keys, so that weights can grow
while the logits do not; ``vit`` attends both ways.

Letters: B sequences, L positions, H query heads, G key heads, d size of a head, D width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES = ("gpt2", "llama", "qknorm")
"""The language models."""

Layout = Literal["pre_norm", "post_norm", "no_norm", "no_skips"]
"""How norms and skip connections stand in a block; ``"no_skips"`` is pre-norm without them."""


@dataclass(frozen=True)
class Shape:
    """Size of a model."""

    num_layers: int = 4
    num_heads: int = 4
    head_dim: int = 16
    vocabulary: int = 128
    length: int = 128

    @property
    def width(self) -> int:
        """D."""
        return self.num_heads * self.head_dim


def rotate(x: Tensor) -> Tensor:
    """Apply rotary positions to (B, H, L, d)."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequency = 1e4 ** (-torch.arange(half) / half)
    angle = torch.arange(length)[:, None] * frequency
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


class Attention(nn.Module):
    """Attention of one family, with access to the weights of one head."""

    def __init__(self, family: str, shape: Shape) -> None:
        super().__init__()
        self.family, self.shape, self.is_causal = family, shape, family != "vit"
        self.num_kv_heads = shape.num_heads // 2 if family == "llama" else shape.num_heads
        with_bias = family in ("gpt2", "vit")
        self.query = nn.Linear(shape.width, shape.width, bias=with_bias)
        self.key = nn.Linear(shape.width, self.num_kv_heads * shape.head_dim, bias=with_bias)
        self.value = nn.Linear(shape.width, self.num_kv_heads * shape.head_dim, bias=with_bias)
        self.output = nn.Linear(shape.width, shape.width, bias=with_bias)
        if family == "qknorm":
            self.query_gain = nn.Parameter(torch.ones(shape.num_heads, 1, shape.head_dim))
            self.key_gain = nn.Parameter(torch.ones(self.num_kv_heads, 1, shape.head_dim))
        self.extra_key: Tensor | None = None  # (G, L, d), added to the keys by a fault

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        heads = (-1, self.shape.head_dim)
        query, key, value = (p(x).unflatten(-1, heads).transpose(1, 2) for p in (self.query, self.key, self.value))
        if self.family == "qknorm":
            query = F.rms_norm(query, query.shape[-1:]) * self.query_gain
            key = F.rms_norm(key, key.shape[-1:]) * self.key_gain
        if self.family == "llama":
            query, key = rotate(query), rotate(key)
        if self.extra_key is not None:
            key = key + self.extra_key[:, : key.shape[-2]]
        if self.family == "qknorm":
            logits = query @ key.transpose(-1, -2) * self.shape.head_dim**-0.5
            visible = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
            mixed = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ value
        else:
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=self.is_causal, enable_gqa=self.family == "llama"
            )
        return self.output(mixed.transpose(1, 2).flatten(-2))

    def slices(self, side: str, head: int) -> list[Tensor]:
        """Return views of the weights that set the size of one head's queries or keys."""
        if self.family == "qknorm":
            return [getattr(self, f"{side}_gain").data[head]]
        projection = getattr(self, side)
        return [tensor.data[self._rows(head)] for tensor in (projection.weight, projection.bias) if tensor is not None]

    def key_matrix(self, head: int) -> Tensor:
        """Return a view of the (d, D) key projection of one KV head."""
        return self.key.weight.data[self._rows(head)]

    def weights_of(self, head: int) -> dict[str, list[Tensor]]:
        """Return views of all weights of one query head and of the KV head it reads, by side."""
        kv_head = head * self.num_kv_heads // self.shape.num_heads
        of_side = {side: self.slices(side, index) for side, index in (("query", head), ("key", kv_head))}
        if self.family == "qknorm":  # the gains alone do not make a head
            of_side["query"].append(self.query.weight.data[self._rows(head)])
            of_side["key"].append(self.key.weight.data[self._rows(kv_head)])
        biases = [] if self.value.bias is None else [self.value.bias.data[self._rows(kv_head)]]
        of_side["value"] = [self.value.weight.data[self._rows(kv_head)], *biases]
        of_side["output"] = [self.output.weight.data[:, self._rows(head)]]
        return of_side

    def _rows(self, head: int) -> slice:
        return slice(head * self.shape.head_dim, (head + 1) * self.shape.head_dim)


class Block(nn.Module):
    """Attention and MLP; pre-norm with skips unless the layout says otherwise."""

    def __init__(self, family: str, shape: Shape, layout: Layout) -> None:
        super().__init__()
        norm = nn.LayerNorm if family in ("gpt2", "vit") else nn.RMSNorm
        self.attention_norm, self.mlp_norm = (
            nn.Identity() if layout == "no_norm" else norm(shape.width) for _ in range(2)
        )
        self.layout = layout
        self.attention = Attention(family, shape)
        self.is_gated = family == "llama"
        inner = 3 * shape.width
        self.up = nn.Linear(shape.width, 2 * inner if self.is_gated else inner, bias=family in ("gpt2", "vit"))
        self.down = nn.Linear(inner, shape.width, bias=family in ("gpt2", "vit"))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        for part, norm in ((self.attention, self.attention_norm), (self._mlp, self.mlp_norm)):
            if self.layout == "post_norm":
                x = norm(x + part(x))
            else:
                x = part(norm(x)) if self.layout == "no_skips" else x + part(norm(x))
        return x

    def _mlp(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.is_gated:
            gate, up = up.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(up))


class TinyLM(nn.Module):
    """A character model of one family."""

    def __init__(self, family: str, shape: Shape, *, layout: Layout = "pre_norm", query_key_gain: float = 1.0) -> None:
        super().__init__()
        self.embedding = self._embedding(shape)
        self.positions = None if family == "llama" else nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(family, shape, layout) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.width) if family in ("gpt2", "vit") else nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Embedding) else shape.width**-0.5)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            block.down.weight.data /= (2 * shape.num_layers) ** 0.5
            block.attention.output.weight.data /= (2 * shape.num_layers) ** 0.5
            for side in ("query", "key"):
                for head in range(block.attention.num_kv_heads if side == "key" else shape.num_heads):
                    for tensor in block.attention.slices(side, head):
                        tensor *= query_key_gain

    def _embedding(self, shape: Shape) -> nn.Module:
        return nn.Embedding(shape.vocabulary, shape.width)

    def features(self, x: Tensor) -> Tensor:
        """Map the input to (B, L, D)."""
        x = self.embedding(x)
        if self.positions is not None:
            x = x + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, characters: Tensor) -> Tensor:
        """Map (B, L) characters to (B, L, vocabulary) logits."""
        return self.head(self.features(characters))

    def loss(self, batch: Tensor) -> Tensor:
        """Return the mean loss of predicting each next character of (B, L + 1)."""
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class TinyViT(TinyLM):
    """A vision transformer that names the class of an image; its vocabulary is the classes."""

    PATCH = 16  # pixels

    def _embedding(self, shape: Shape) -> nn.Module:
        return nn.Linear(self.PATCH, shape.width)

    def forward(self, patches: Tensor) -> Tensor:
        """Map (B, L, 16) patches to (B, classes) logits."""
        return self.head(self.features(patches).mean(dim=1))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean loss of (B, L, 16) patches with (B,) labels."""
        patches, labels = batch
        return F.cross_entropy(self(patches), labels)
