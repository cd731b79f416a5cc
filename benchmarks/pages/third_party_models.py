"""Tiny random models of every attention architecture the project claims to measure.

Each model is built from its own library's classes, with small sizes and with weights so large that attention is far
from uniform: with the usual standard deviation of 0.02 a wrong reconstruction would pass as well. The tests and the
page `docs/architectures.md` use this one list.
"""

# ruff: noqa: E501 - the tables read best with one architecture a line
from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor.capture import AttentionCall, capture_attention
from benchmarks.pages.handwritten_models import (
    BATCH,
    LENGTH,
    HandWritten,
    TorchAttention,
    TorchEncoder,
    TorchSeq2Seq,
    by_einsum,
    by_matmul,
    flattened,
    hidden,
    hidden_masked,
    imported_by_name,
    in_place,
    keys_first,
    learned_temperature,
    sequence_first,
)

VOCABULARY = 67


@dataclass(frozen=True)
class Architecture:
    """One architecture: how to build it, its inputs, and what capture must find.

    Attributes:
        name: Its name in the tests and on the page.
        build: Builds the model from the name of an attention implementation.
        implementations: The attention implementations tried; ``("own",)`` where the library has only one.
        inputs: Returns the keyword arguments of its forward, given ``padded``.
        num_layers: Attention calls of one forward.
        library: The package it comes from.
        outside: What acts on its logits outside the energy field.
        num_cross: How many of its attention calls are cross attention.
    """

    name: str
    build: Callable[[str], nn.Module]
    implementations: Sequence[str]
    inputs: Callable[[bool], dict[str, Any]]
    num_layers: int
    library: str
    outside: frozenset[str] = frozenset()
    num_cross: int = 0

    @property
    def missing(self) -> str:
        """The reason why it cannot be built here, ``""`` if it can."""
        return "" if importlib.util.find_spec(self.library) else f"{self.library} is not installed"


def sharpen(model: nn.Module) -> nn.Module:
    """Draw weights so that logits have a spread of order one, and put the model in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if parameter.dim() == 2 else parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            else:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def token_ids(padded: bool) -> dict[str, Tensor]:
    """Return random tokens, with an attention mask that hides the end of the second sequence where ``padded``."""
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][1, LENGTH - 4 :] = 0
    return inputs


def _without_cache(padded: bool) -> dict[str, Any]:
    return {**token_ids(padded), "use_cache": False}


def _encoder_decoder(padded: bool) -> dict[str, Any]:
    return {**_without_cache(padded), "decoder_input_ids": token_ids(False)["input_ids"].flip(0)[:, : LENGTH - 2]}


def _audio(padded: bool) -> dict[str, Any]:
    features = torch.randn(BATCH, 8, 2 * LENGTH, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": token_ids(False)["input_ids"], "use_cache": False}


def _pixels(padded: bool) -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


ROPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**ROPE, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

Row = tuple[str, str, dict[str, Any], dict[str, Any]]
TRANSFORMERS: list[Row] = [
    # name, model class, configuration, what differs from a decoder of two self-attention layers
    ("gpt2", "GPT2LMHeadModel", GPT, {}),
    ("gpt2 upcast", "GPT2LMHeadModel", {**GPT, "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}, {}),
    ("gpt_neox", "GPTNeoXForCausalLM", {**ROPE, "vocab_size": VOCABULARY}, {}),
    ("opt", "OPTForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}, {}),
    ("llama", "LlamaForCausalLM", GROUPED, {}),
    ("qwen2", "Qwen2ForCausalLM", GROUPED, {}),
    ("qwen3", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, {}),
    ("phi", "PhiForCausalLM", {**ROPE, "vocab_size": VOCABULARY, "qk_layernorm": True}, {}),
    ("phi3", "Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}, {}),
    ("mistral", "MistralForCausalLM", {**GROUPED, "sliding_window": 4}, {"outside": {"window"}}),
    ("gemma2", "Gemma2ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 4}, {"outside": {"window", "softcap"}}),
    ("gemma3", "Gemma3ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 4}, {"outside": {"window"}}),
    ("olmo2", "Olmo2ForCausalLM", GROUPED, {}),
    ("mixtral", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, {}),
    ("qwen2_moe", "Qwen2MoeForCausalLM", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16}, {}),
    ("qwen3_moe", "Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS, "head_dim": 8}, {}),
    ("gpt_oss", "GptOssForCausalLM", {**GROUPED, "head_dim": 8, "num_local_experts": 4, "sliding_window": 4}, {"outside": {"window", "sinks"}}),
    ("llama4", "Llama4ForCausalLM", {**GROUPED, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4}, {"outside": {"window"}}),
    ("deepseek_v3", "DeepseekV3ForCausalLM", {**ROPE, "vocab_size": VOCABULARY, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}, {}),
    ("falcon", "FalconForCausalLM", {**ROPE, "vocab_size": VOCABULARY, "multi_query": True}, {}),
    ("falcon alibi", "FalconForCausalLM", {**ROPE, "vocab_size": VOCABULARY, "multi_query": False, "alibi": True}, {"outside": {"bias"}}),
    ("bloom", "BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, {"outside": {"bias"}}),
    ("mpt", "MptForCausalLM", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, {"outside": {"bias"}}),
    ("gptj", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}, {}),
    ("gpt_neo", "GPTNeoForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 64}, {"outside": {"window"}}),
    ("codegen", "CodeGenForCausalLM", {**GPT, "rotary_dim": 4}, {}),
    ("t5", "T5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, {"inputs": _encoder_decoder, "num_layers": 6, "num_cross": 2, "outside": {"bias"}}),
    ("whisper", "WhisperForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": LENGTH, "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}, {"inputs": _audio, "num_layers": 6, "num_cross": 2}),
    ("bert", "BertModel", {**ROPE, "vocab_size": VOCABULARY}, {"inputs": token_ids}),
    ("roberta", "RobertaModel", {**ROPE, "vocab_size": VOCABULARY}, {"inputs": token_ids}),
    ("deberta_v2", "DebertaV2Model", {**ROPE, "vocab_size": VOCABULARY, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}, {"inputs": token_ids, "outside": {"bias"}}),
    ("mpnet", "MPNetModel", {**ROPE, "vocab_size": VOCABULARY}, {"inputs": token_ids, "outside": {"bias"}}),
    ("clip_text", "CLIPTextModel", {**ROPE, "vocab_size": VOCABULARY, "max_position_embeddings": 64}, {"inputs": token_ids}),
    ("vit", "ViTModel", {**ROPE, "image_size": 16, "patch_size": 4}, {"inputs": _pixels}),
    ("albert", "AlbertModel", {**ROPE, "vocab_size": VOCABULARY, "embedding_size": 16, "num_hidden_layers": 3}, {"inputs": token_ids, "num_layers": 3}),
]  # fmt: skip


def _hugging_face(model_class: str, options: dict[str, Any]) -> Callable[[str], nn.Module]:
    def build(implementation: str) -> nn.Module:
        transformers = importlib.import_module("transformers")
        cls = getattr(transformers, model_class)
        config = cls.config_class(**options)
        return sharpen(cls._from_config(config, attn_implementation=implementation))

    return build


DIFFERENT_IN_TRANSFORMERS_4 = {
    ("gpt2 upcast", "sdpa"): "its sdpa leaves out the scale of each layer that its eager attention has",
    ("gemma2", "sdpa"): "its sdpa leaves out the soft-cap",
    ("deepseek_v3", "eager"): "its experts do not run in float64, so there is no reference",
    ("deepseek_v3", "sdpa"): "its experts do not run in float64, so there is no reference",
    ("t5", "eager"): "its layers cannot be told apart from sums of several products, and are named as not seen",
    ("t5", "sdpa"): "it has no sdpa",
    ("clip_text", "flex_attention"): "its mask has one row for all queries: its layers are named as not seen",
}
"""Where the last transformers 4 differs from what the tests expect, by architecture and implementation."""


def transformers_difference(architecture: str, implementation: str) -> str:
    """Return why the installed transformers differs from what the tests expect of this pair, ``""`` if it does not."""
    if int(importlib.metadata.version("transformers").partition(".")[0]) >= 5:
        return ""
    return DIFFERENT_IN_TRANSFORMERS_4.get((architecture, implementation), "")


def hugging_face_architectures() -> Iterator[Architecture]:
    """Yield the architectures of transformers."""
    for name, model_class, options, differs in TRANSFORMERS:
        settings = {"inputs": _without_cache, "num_layers": 2, **differs}
        settings["outside"] = frozenset(settings.get("outside", ()))
        build = _hugging_face(model_class, options)
        yield Architecture(name, build, ("eager", "sdpa", "flex_attention"), library="transformers", **settings)


# Attention outside of transformers.


class _Placeholder(type):
    def __getattr__(cls, name: str) -> str:
        return name


class _Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import empty modules in place of torchvision."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        def placeholder(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Placeholder(name, (), {})

        module.__dict__["__getattr__"] = placeholder


@contextmanager
def torchvision_optional() -> Iterator[None]:
    """Let timm be imported without torchvision, whose image transforms its models do not call."""
    if importlib.util.find_spec("torchvision"):
        yield
        return
    # Not installed with the tests: its wheel does not load beside a CPU-only torch of the same version.
    finder = _Placeholders()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def _timm(name: str, *, fused: bool = True, **options: Any) -> Callable[[str], nn.Module]:
    def build(_: str) -> nn.Module:
        with torchvision_optional():
            timm = importlib.import_module("timm")
        model = sharpen(timm.create_model(name, pretrained=False, **options))
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        return model

    return build


def _x_transformers(**options: Any) -> Callable[[str], nn.Module]:
    def build(_: str) -> nn.Module:
        library = importlib.import_module("x_transformers")
        return sharpen(library.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **options))

    return build


def _litgpt(_: str) -> nn.Module:
    library = importlib.import_module("litgpt")
    sizes = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 32, "vocab_size": VOCABULARY, "block_size": 64}
    return sharpen(library.GPT(library.Config(intermediate_size=48, mlp_class_name="LLaMAMLP", **sizes)))


def _image(name: str, size: int) -> Callable[[bool], dict[str, Any]]:
    return lambda padded: {name: torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(1))}


def other_architectures() -> Iterator[Architecture]:
    """Yield torch's own modules, hand-written attention and the models of other libraries."""

    def torch_row(name: str, build: Callable[[], nn.Module], num_layers: int = 1, num_cross: int = 0) -> Architecture:
        return Architecture(
            name, lambda _: sharpen(build()), ("own",), hidden_masked, num_layers, "torch", num_cross=num_cross
        )

    yield torch_row("nn.MultiheadAttention", TorchAttention)
    yield torch_row("nn.MultiheadAttention need_weights", lambda: TorchAttention(need_weights=True))
    yield torch_row("nn.MultiheadAttention add_bias_kv", lambda: TorchAttention(add_bias_kv=True))
    yield torch_row("nn.TransformerEncoder", TorchEncoder, 2)
    yield torch_row("nn.Transformer", TorchSeq2Seq, 6, 2)
    for name, attend, layout in (
        ("sdpa imported by name", imported_by_name, "bhtd"),
        ("matmul", by_matmul, "bhtd"),
        ("matmul k qᵀ", keys_first, "bhtd"),
        ("matmul in place", in_place, "bhtd"),
        ("einsum bthd", by_einsum, "bthd"),
        ("einsum ijbn", sequence_first, "bthd"),
        ("baddbmm (B·H, L, d)", flattened, "bhtd"),
        ("cosine with temperature per head", learned_temperature, "bhtd"),
    ):
        yield Architecture(
            name,
            lambda _, attend=attend, layout=layout: sharpen(HandWritten(attend, layout)),
            ("own",),
            hidden,
            1,
            "torch",
        )
    vit = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    yield Architecture("timm ViT", _timm("vit_tiny_patch16_224", **vit), ("own",), _image("x", 16), 2, "timm")
    yield Architecture("timm ViT unfused", _timm("vit_tiny_patch16_224", fused=False, **vit), ("own",), _image("x", 16), 2, "timm")  # fmt: skip
    swin = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    outside = frozenset({"bias"})
    yield Architecture("timm Swin", _timm("swin_tiny_patch4_window7_224", **swin), ("own",), _image("x", 32), 2, "timm", outside)  # fmt: skip
    yield Architecture("timm Swin unfused", _timm("swin_tiny_patch4_window7_224", fused=False, **swin), ("own",), _image("x", 32), 2, "timm", outside)  # fmt: skip
    yield Architecture("x-transformers", _x_transformers(attn_flash=False), ("own",), hidden, 2, "x_transformers")
    yield Architecture("x-transformers flash", _x_transformers(attn_flash=True), ("own",), hidden, 2, "x_transformers")
    yield Architecture("x-transformers grouped", _x_transformers(attn_flash=False, attn_kv_heads=2), ("own",), hidden, 2, "x_transformers")  # fmt: skip
    yield Architecture("x-transformers grouped flash", _x_transformers(attn_flash=True, attn_kv_heads=2), ("own",), hidden, 2, "x_transformers")  # fmt: skip
    yield Architecture("x-transformers qk_norm", _x_transformers(attn_qk_norm=True, attn_kv_heads=2), ("own",), hidden, 2, "x_transformers")  # fmt: skip
    yield Architecture("litgpt", _litgpt, ("own",), lambda padded: {"idx": token_ids(False)["input_ids"]}, 2, "litgpt")


@dataclass
class Captured:
    """The result of capturing one forward."""

    calls: list[AttentionCall]
    missed: dict[str, str]
    output: Any


def captured(model: nn.Module, **inputs: Any) -> Captured:
    """Run one forward as a probe does, and return every attention call of it."""
    calls: list[AttentionCall] = []
    torch.compiler.set_stance("force_eager")
    try:
        with torch.no_grad(), capture_attention(model, calls.append) as report:
            output = model(**inputs)
    finally:
        torch.compiler.set_stance("default")
    return Captured(calls, report.missed, output)
