"""Tiny, random models of every attention architecture the project claims to measure.

Each entry builds a model from its own library's classes with small sizes and weights large enough that attention is
far from uniform (at the usual 0.02 initialisation any wrong rebuild would pass). The tests and
the page `docs/architectures.md` are made from this one list.
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

VOCABULARY, LENGTH, BATCH = 67, 12, 2


@dataclass(frozen=True)
class Architecture:
    """One architecture: how to build it, what to feed it, what capture must find.

    Attributes:
        name: What the tests and the page call it.
        build: From the name of an attention implementation to the model.
        implementations: The implementations it supports here; ``("own",)`` where it has just the one it was written with.
        inputs: From ``padded`` to the keyword arguments of its forward.
        num_layers: How many attention calls one forward makes.
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
        """Why it cannot be built here, ``""`` if it can."""
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


OTHERWISE_IN_TRANSFORMERS_4 = {
    ("gpt2 upcast", "sdpa"): "its sdpa leaves out the scale of each layer that its eager attention has",
    ("gemma2", "sdpa"): "its sdpa leaves out the soft-cap",
    ("deepseek_v3", "eager"): "its experts do not run in float64, so there is no reference",
    ("deepseek_v3", "sdpa"): "its experts do not run in float64, so there is no reference",
    ("t5", "eager"): "its layers cannot be told apart from sums of several products, and are named as not seen",
    ("t5", "sdpa"): "it has no sdpa",
    ("clip_text", "flex_attention"): "its mask has one row for all queries: its layers are named as not seen",
}
"""What the last transformers 4 does otherwise than the tests expect, by architecture and implementation."""


def otherwise_in_this_transformers(architecture: str, implementation: str) -> str:
    """Why the installed transformers cannot be held to what the tests expect of the pair, ``""`` where it can."""
    if int(importlib.metadata.version("transformers").partition(".")[0]) >= 5:
        return ""
    return OTHERWISE_IN_TRANSFORMERS_4.get((architecture, implementation), "")


def hugging_face_architectures() -> Iterator[Architecture]:
    for name, model_class, options, differs in TRANSFORMERS:
        settings = {"inputs": _without_cache, "num_layers": 2, **differs}
        settings["outside"] = frozenset(settings.get("outside", ()))
        build = _hugging_face(model_class, options)
        yield Architecture(name, build, ("eager", "sdpa", "flex_attention"), library="transformers", **settings)


# Attention outside of transformers: torch's own modules, hand-written layers, other libraries.


def _hidden(padded: bool) -> dict[str, Any]:
    return {"x": torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(1))}


def _hidden_masked(padded: bool) -> dict[str, Any]:
    inputs = _hidden(padded)
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
        return self.attn(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)[0]


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder`, which takes a fused path of its own in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


class TorchSeq2Seq(nn.Module):
    """`nn.Transformer`: sequences first, a causal decoder, cross attention between sequences of equal length."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(32, 4, 2, 2, 48)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
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
    """Causal self-attention with the logits and their use written out by ``attend(q, k, v, blocked)``."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], layout: str = "bhtd") -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.attend, self.layout = attend, layout

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
        if self.layout == "bhtd":
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        blocked = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        y = self.attend(q, k, v, blocked)
        return self.out((y.transpose(1, 2) if self.layout == "bhtd" else y).flatten(2))


def _by_matmul(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return nn.functional.softmax(logits.masked_fill(blocked, float("-inf")), dim=-1) @ v


def _keys_first(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = (k @ q.mT / 8**0.5).masked_fill(blocked.mT, float("-inf"))
    return (v.mT @ logits.softmax(-2)).mT


def _in_place(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = torch.matmul(q, k.mT)
    logits /= 8**0.5
    logits.masked_fill_(blocked[None, None], -1e9)
    return torch.matmul(logits.softmax(-1), v)


def _by_einsum(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = torch.einsum("bthd,bshd->bhts", q, k).div(8**0.5)
    weights = torch.where(blocked, torch.finfo(logits.dtype).min, logits).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def _sequence_first(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = torch.einsum("bind,bjnd->ijbn", q, k) * 8**-0.5
    weights = torch.softmax(logits - 1e30 * blocked[:, :, None, None], dim=1)
    return torch.einsum("ijbn,bjnd->bind", weights, v)


def _flattened(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    q, k, v = (y.reshape(-1, LENGTH, 8) for y in (q, k, v))
    bias = torch.zeros(LENGTH, LENGTH).masked_fill(blocked, float("-inf"))
    logits = torch.baddbmm(bias.expand(len(q), -1, -1), q * 8**-0.5, k.transpose(1, 2))
    return torch.bmm(torch.softmax(logits, -1), v).view(BATCH, 4, LENGTH, 8)


def _learned_temperature(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
    temperature = torch.tensor([4.0, 6.0, 8.0, 10.0])[:, None, None]
    return (q @ k.transpose(-2, -1) * temperature).masked_fill(blocked, float("-inf")).softmax(-1) @ v


def _imported_by_name(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, is_causal=True)


class _Placeholder(type):
    def __getattr__(cls, name: str) -> str:
        return name


class _Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of torchvision, whose wheel does not load beside a CPU-only torch of the same version."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        def invent(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Placeholder(name, (), {})

        module.__dict__["__getattr__"] = invent


@contextmanager
def _torchvision_optional() -> Iterator[None]:
    """timm's models need torchvision only to import: its image transforms are never called here."""
    if importlib.util.find_spec("torchvision"):
        yield
        return
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
        with _torchvision_optional():
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
    def torch_row(name: str, build: Callable[[], nn.Module], num_layers: int = 1, num_cross: int = 0) -> Architecture:
        return Architecture(
            name, lambda _: sharpen(build()), ("own",), _hidden_masked, num_layers, "torch", num_cross=num_cross
        )

    yield torch_row("nn.MultiheadAttention", TorchAttention)
    yield torch_row("nn.MultiheadAttention need_weights", lambda: TorchAttention(need_weights=True))
    yield torch_row("nn.MultiheadAttention add_bias_kv", lambda: TorchAttention(add_bias_kv=True))
    yield torch_row("nn.TransformerEncoder", TorchEncoder, 2)
    yield torch_row("nn.Transformer", TorchSeq2Seq, 6, 2)
    for name, attend, layout in (
        ("sdpa imported by name", _imported_by_name, "bhtd"),
        ("matmul", _by_matmul, "bhtd"),
        ("matmul k qᵀ", _keys_first, "bhtd"),
        ("matmul in place", _in_place, "bhtd"),
        ("einsum bthd", _by_einsum, "bthd"),
        ("einsum ijbn", _sequence_first, "bthd"),
        ("baddbmm (B·H, L, d)", _flattened, "bhtd"),
        ("cosine with temperature per head", _learned_temperature, "bhtd"),
    ):
        yield Architecture(
            name,
            lambda _, attend=attend, layout=layout: sharpen(HandWritten(attend, layout)),
            ("own",),
            _hidden,
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
    yield Architecture("x-transformers", _x_transformers(attn_flash=False), ("own",), _hidden, 2, "x_transformers")
    yield Architecture("x-transformers flash", _x_transformers(attn_flash=True), ("own",), _hidden, 2, "x_transformers")
    yield Architecture("x-transformers grouped", _x_transformers(attn_flash=False, attn_kv_heads=2), ("own",), _hidden, 2, "x_transformers")  # fmt: skip
    yield Architecture("x-transformers grouped flash", _x_transformers(attn_flash=True, attn_kv_heads=2), ("own",), _hidden, 2, "x_transformers")  # fmt: skip
    yield Architecture("x-transformers qk_norm", _x_transformers(attn_qk_norm=True, attn_kv_heads=2), ("own",), _hidden, 2, "x_transformers")  # fmt: skip
    yield Architecture("litgpt", _litgpt, ("own",), lambda padded: {"idx": token_ids(False)["input_ids"]}, 2, "litgpt")


@dataclass
class Captured:
    """Everything one capture of one forward gave."""

    calls: list[Any]
    missed: dict[str, str]
    output: Any


def captured(model: nn.Module, **inputs: Any) -> Captured:
    """Run one quiet forward the way a probe does, and keep every attention call of it."""
    from attnmonitor.capture import capture_attention

    calls: list[Any] = []
    torch.compiler.set_stance("force_eager")
    try:
        with torch.no_grad(), capture_attention(model, calls.append) as report:
            output = model(**inputs)
    finally:
        torch.compiler.set_stance("default")
    return Captured(calls, report.missed, output)
