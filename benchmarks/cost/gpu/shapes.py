"""Models of known shapes with random weights, built where they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

__all__ = ["SHAPES", "SMOKE_SHAPES", "Shape", "shapes_for"]


@dataclass(frozen=True)
class Shape:
    """A model and the size of its probe.

    Attributes:
        name: Its name in tables.
        build: Makes the model.
        vocabulary: Number of tokens.
        batch: Sequences of the probe.
        length: Positions of a sequence.
    """

    name: str
    build: Callable[[], nn.Module]
    vocabulary: int
    batch: int = 4
    length: int = 512

    def model(self, device: str, dtype: torch.dtype | None = None) -> nn.Module:
        """The model with random weights, bfloat16 by default (float32 on a CPU), in eval mode."""
        dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return self.build().eval()
        finally:
            torch.set_default_dtype(before)

    def tokens(self, device: str) -> Tensor:
        """Random tokens, ``(batch, length)``."""
        return torch.randint(self.vocabulary, (self.batch, self.length), device=device)


def llama(layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocabulary: int, **more: Any) -> nn.Module:
    """A LLaMA of this size."""
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=hidden,
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            **more,
        )
    )


SHAPES = (
    Shape("GPT-2 124M", lambda: GPT2LMHeadModel(GPT2Config()), 50257),
    Shape("SmolLM2-135M", lambda: llama(30, 576, 9, 3, 1536, 49152, tie_word_embeddings=True), 49152),
    Shape("LLaMA-3.2-1B", lambda: llama(16, 2048, 32, 8, 8192, 128256, tie_word_embeddings=True), 128256, length=1024),
    Shape("7B", lambda: llama(32, 4096, 32, 32, 11008, 32000), 32000, length=1024),
)
SMOKE_SHAPES = (
    Shape(
        "GPT-2, tiny",
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=None
            )
        ),
        64,
        batch=2,
        length=32,
    ),
    Shape("LLaMA, tiny", lambda: llama(2, 32, 4, 2, 48, 64), 64, batch=2, length=32),
)


def shapes_for(device: str) -> tuple[Shape, ...]:
    """The shapes to run on a device: tiny ones on a CPU."""
    return SHAPES if device == "cuda" else SMOKE_SHAPES
