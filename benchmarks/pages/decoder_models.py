"""Decoders of x-transformers, one for each of its ways to change attention, for the comparison of `agreement.py`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from benchmarks.pages.broad_models import Case, tokens
from benchmarks.pages.third_party_models import VOCABULARY

__all__ = ["x_transformers_cases"]


def x_transformers_cases() -> Iterator[Case]:
    """Yield the models."""
    options: dict[str, dict[str, Any]] = {
        "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 4},
        "rotary": {"rotary_pos_emb": True},
        "relative bias": {"rel_pos_bias": True},
        "dynamic bias": {"dynamic_pos_bias": True},
        "one key head": {"attn_one_kv_head": True},
        "memory keys": {"attn_num_mem_kv": 2},
        "talking heads": {"attn_pre_talking_heads": True},
        "soft-cap": {"attn_softclamp_logits": True},
        "sandwich": {"sandwich_norm": True},
        "xpos": {"rotary_xpos": True},
        "macaron": {"macaron": True},
        "gated values": {"attn_gate_values": True},
        "sigmoid": {"attn_sigmoid": True},
        "cog": {"attn_cog_signed": True},
        "forgetting": {"attn_data_dependent_alibi": True},
        "selective": {"attn_selective": True},
        "QK-norm": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
        "flash, fewer key heads": {"attn_kv_heads": 2, "attn_flash": True},
        "flash, alibi": {"alibi_pos_bias": True, "attn_flash": True},
        "top keys": {"attn_sparse_topk": 4},
        "talking heads after": {"attn_post_talking_heads": True},
        "residual attention": {"residual_attn": True},
        "zero key": {"attn_add_zero_kv": True},
        "laser": {"attn_laser": True},
        "residual streams": {"num_residual_streams": 2},
        "value residual": {"add_value_residual": True, "learned_value_residual_mix": True},
        "sinks": {"attn_head_learned_sink": True},
        "polar": {"polar_pos_emb": True},
        "contextual positions": {"attn_use_cope": True, "attn_cope_max_pos": 8},
        "memory keys, fewer": {"attn_num_mem_kv": 2, "attn_kv_heads": 2},
    }
    for name, settings in options.items():

        def build(settings: dict[str, Any] = settings) -> Any:
            library = importlib.import_module("x_transformers")
            own = {"attn_flash": False, **settings}
            layers = library.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **own)
            return library.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=32, attn_layers=layers), (tokens(),)

        yield Case(f"x-transformers {name}", "x_transformers", build)
