"""Tiny random models of many libraries, to compare what a monitor says of each with what really ran in it.

Most are built from their library's own configuration classes: of every setting that a class knows, those that set a
size are made small, and the inputs are what its ``forward`` takes. What needs more is written out.
"""

# ruff: noqa: E501 - the tables read best with one model a line
from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pages.third_party_models import VOCABULARY, sharpen

BATCH, LENGTH, IMAGE = 2, 12, 32


@dataclass(frozen=True)
class Case:
    """One model of the comparison.

    Attributes:
        name: Its name on the page.
        library: The package it comes from.
        build: Returns the model, with any weights, and its arguments: a tuple, or a mapping by name.
        named: Part of the reason with which attention in it has to be named that is no product of queries and keys.
        heads: How many heads layers have whose modules do not say it, by the ends of their names.
    """

    name: str
    library: str
    build: Callable[[], tuple[nn.Module, Any]]
    named: str = ""
    heads: Mapping[str, int] = field(default_factory=dict)

    def made(self) -> tuple[nn.Module, Any]:
        """Return the model with weights of a useful size, and its arguments."""
        torch.manual_seed(0)
        model, arguments = self.build()
        return sharpen(model), arguments


def forward(model: nn.Module, arguments: Any) -> Any:
    """Call a model with the arguments of its case."""
    torch.manual_seed(0)  # some models mask or drop at random in evaluation mode
    return model(**arguments) if isinstance(arguments, Mapping) else model(*arguments)


SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "entity_vocab_size", "src_vocab_size", "tgt_vocab_size", "n_words", "num_hash_buckets"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "d_embed", "embedding_size", "entity_emb_size", "projection_dim", "word_embed_proj_dim", "encoder_hidden_dim", "attention_hidden_size", "rnn_hidden_size", "output_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "dim_feedforward", "d_inner", "n_inner", "hidden_dim", "mlp_dim", "feed_forward_proj_dim", "ff_dim", "dff", "intermediate_size_mlp", "dim_ff", "inner_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth", "num_blocks", "num_hidden_groups_", "num_entity_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "dim_head", "attention_head_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_source_positions", "max_target_positions", "n_ctx", "seq_length", "max_sequence_length"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    "image_size": IMAGE, "patch_size": 8, "sliding_window": 4, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
"""A small value of every setting that sets a size, by the names that libraries give it."""


def small_settings(config_class: type) -> dict[str, Any]:
    """Return the settings that a configuration class knows, made small; also those of the parts it is made of."""
    known = {name for cls in config_class.__mro__ for name in getattr(cls, "__annotations__", {})}
    known |= set(inspect.signature(config_class.__init__).parameters)
    settings = {name: value for name, value in SMALL.items() if name in known}
    inner = getattr(config_class, "sub_configs", {})
    whole = config_class() if inner else None
    for name in inner:
        if (part := getattr(whole, name, None)) is not None:
            settings[name] = {**small_settings(type(part)), "model_type": part.model_type}
    return settings


def noise(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))


ARGUMENTS: dict[str, Callable[[], Any]] = {
    "input_ids": tokens,
    "decoder_input_ids": lambda: tokens(LENGTH - 2).flip(0),
    "pixel_values": lambda: noise(BATCH, 3, IMAGE, IMAGE),
    "input_values": lambda: noise(BATCH, 200),
    "bbox": lambda: torch.arange(4).expand(BATCH, LENGTH, 4) * 3,
    "use_cache": lambda: False,
}
"""Values of the arguments that a model of transformers takes."""


def inputs_of(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the forward of a model of transformers takes: its main input, that of its decoder, and ``given``."""
    parameters = inspect.signature(model.forward).parameters
    wanted = [model.main_input_name, "decoder_input_ids", "use_cache"]
    names = {name for name in wanted if name in parameters and name not in given}
    required = {
        name
        for name, each in parameters.items()
        if each.default is each.empty and each.kind == each.POSITIONAL_OR_KEYWORD
    }
    if (
        "pixel_values" in parameters
        and "input_ids" in parameters
        and "vision_config" in getattr(model.config, "sub_configs", {})
    ):
        names.add("pixel_values")
    return {**{name: ARGUMENTS[name]() for name in sorted(names | required - set(given))}, **given}


def transformers_model(kind: str, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return the base model of a kind that transformers knows, tiny, and its inputs."""
    mapping = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    models = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_MAPPING
    config_class = mapping[kind]
    own, given = TRANSFORMERS.get(kind, ({}, {}))
    config = config_class(**merged(merged(small_settings(config_class), own), settings))
    model_class = models[config_class]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    model = model_class._from_config(config, attn_implementation="eager")
    return model, inputs_of(model, {name: make() for name, make in given.items()})


def merged(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes, also in those of parts; a change of None takes a setting away."""
    result = dict(settings)
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        elif value is None:
            result.pop(name, None)
        else:
            result[name] = value
    return result


MLA = {"head_dim": None, "num_key_value_heads": 4, "n_group": 2}
STAGES = {"depths": [1, 1], "embed_dim": 16, "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
FEATURES = {"input_features": lambda: noise(BATCH, 8, 2 * LENGTH)}
VIDEO = {"pixel_values": lambda: noise(BATCH, 2, 3, IMAGE, IMAGE)}
SERIES = {"past_values": lambda: noise(BATCH, 24, 3)}
TRANSFORMERS: dict[str, tuple[dict[str, Any], dict[str, Callable[[], Any]]]] = {
    # kind: what differs from the small settings, and from the usual inputs
    **{kind: (MLA, {}) for kind in ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "mistral4", "youtu", "longcat_flash", "minicpm3", "mistral_large4_text")},
    **{kind: (STAGES, {}) for kind in ("swin", "swinv2", "donut-swin", "maskformer-swin", "swin2sr", "dinat")},
    **{kind: ({}, VIDEO) for kind in ("timesformer", "vivit", "videomae", "vjepa2")},
    "audio-spectrogram-transformer": ({"max_length": 32, "num_mel_bins": 16}, {"input_values": lambda: noise(BATCH, 32, 16)}),
    "autoformer": ({"prediction_length": 4, "context_length": 12}, {}),
    "bros": ({}, {"bbox": lambda: noise(BATCH, LENGTH, 8)}),
    "codegen": ({"rotary_dim": 4, "n_embd": 32}, {}),
    "gptj": ({"rotary_dim": 4}, {}),
    "cvt": ({"embed_dim": [16, 32], "num_heads": [2, 4], "depth": [1, 1], "patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True], "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1]}, {}),
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]], "window_size": 4}, {}),
    "hiera": ({"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [4, 4], "masked_unit_attention": [True, False]}, {}),
    "informer": ({"prediction_length": 4, "context_length": 12}, {}),
    "levit": ({"hidden_sizes": [16, 32], "num_attention_heads": [2, 4], "depths": [1, 1], "key_dim": [8, 8], "mlp_ratio": [2, 2], "attention_ratio": [2, 2], "down_ops": None, "image_size": 64, "patch_size": 16}, {}),
    "patchtst": ({"context_length": 24, "num_input_channels": 3, "patch_length": 4, "patch_stride": 4}, SERIES),
    "pvt": ({"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [2, 4], "sequence_reduction_ratios": [2, 1], "num_encoder_blocks": 2, "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2], "image_size": 32}, {}),
    "pvt_v2": ({"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [2, 4], "sr_ratios": [2, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}, {}),
    "reformer": ({"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 4, "is_decoder": False}, {}),
    "segformer": ({"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [2, 4], "sr_ratios": [2, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}, {}),
    "glpn": ({"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [2, 4], "sr_ratios": [2, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}, {}),
    "speech_to_text": ({"input_feat_per_channel": 8, "conv_channels": 16}, {"input_features": lambda: noise(BATCH, 4 * LENGTH, 8)}),
    "time_series_transformer": ({"prediction_length": 4, "context_length": 12}, {}),
    "wav2vec2-bert": ({"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3}, {"input_features": lambda: noise(BATCH, LENGTH, 16)}),
    "whisper": ({"max_source_positions": LENGTH}, FEATURES),
    "voxtral_encoder": ({"max_source_positions": LENGTH}, FEATURES),
    "qwen2_audio_encoder": ({"max_source_positions": LENGTH}, FEATURES),
    "udop": ({}, {"bbox": lambda: noise(BATCH, LENGTH, 4).sigmoid()}),
    "vilt": ({}, {"pixel_values": ARGUMENTS["pixel_values"]}),
    "yolos": ({"image_size": [32, 32], "num_detection_tokens": 4}, {}),
    "blip_2_qformer": ({}, {"query_embeds": lambda: noise(BATCH, 4, 32)}),
    "esmc": ({"num_key_value_heads": None}, {}),
    "zaya": ({"num_experts_per_tok": 1}, {}),
    "falcon_mamba": ({"conv_kernel": 4}, {}),
    "mamba": ({"conv_kernel": 4}, {}),
    "mamba2": ({"conv_kernel": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}, {}),
    "perceiver": ({"num_latents": 6, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2, "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 32, "v_channels": 32}, {"inputs": lambda: noise(BATCH, LENGTH, 32)}),
    "vit_mae": ({}, {"noise": lambda: noise(BATCH, 16)}),
}  # fmt: skip


KINDS = (
    "afmoe", "aimv2", "aimv2_vision_model", "albert", "altclip", "apertus", "arcee", "aria_text",
    "audio-spectrogram-transformer", "audioflamingo3", "axk1", "axk2", "bailing_hybrid", "bart", "beam", "beit",
    "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "bit", "bitnet", "blenderbot",
    "blenderbot-small", "blip", "bloom", "camembert", "canine", "chinese_clip", "chinese_clip_vision_model", "clip",
    "clip_text_model", "clip_vision_model", "clipseg", "codegen", "cohere", "cohere2", "cohere2_moe", "convbert",
    "cpmant", "ctrl", "cwm", "data2vec-audio", "data2vec-text", "data2vec-vision", "deberta", "deberta-v2",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "deit", "diffllama", "dinov2",
    "dinov2_with_registers", "dinov3_vit", "distilbert", "doge", "donut-swin", "dots1", "dpr", "dpt", "electra",
    "embedding_gemma2_text", "ernie", "ernie4_5", "ernie4_5_moe", "esm", "esmc", "eurobert", "evolla", "exaone4",
    "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "fastspeech2_conformer", "flaubert", "flava", "flex_olmo",
    "flint", "fnet", "focalnet", "fsmt", "fuyu", "gemma", "gemma2", "gemma3_text", "gemma4_text",
    "gemma4_unified_text", "git", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glmasr", "glpn",
    "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite",
    "granite_docling_text", "granite_speech", "granite_speech_plus", "granite_swa", "granitemoe", "granitemoe_swa",
    "granitemoeshared", "groupvit", "gte", "helium", "hgnet_v2", "higgs_audio_v2", "hrm_text", "hubert",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "ibert", "idefics3_vision", "ijepa",
    "imagegpt", "inkling2_text", "inkling_text", "internlm3", "internvl_vision", "iquestcoder", "jais2", "jamba",
    "jetmoe", "jina_embeddings_v3", "kimi_linear", "kolibri1", "laguna", "layoutlm", "led", "lfm2", "lfm3", "llama",
    "llama4_text", "longformer", "longt5", "luke", "m2m_100", "mamba", "mamba2", "marian", "markuplm",
    "maskformer-swin", "mbart", "megatron-bert", "mellum", "metaclip_2", "mimo_v2_flash", "minicpm3", "minimax",
    "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mistral4", "mistral_large4_text",
    "mixtral", "mlcd", "mlcd_vision_model", "mobilebert", "mobilenet_v1", "mobilenet_v2", "modernbert",
    "modernbert-decoder", "molmo2_text", "moshi", "moss_transcribe_diarize", "mpnet", "mpt", "mra", "mt5",
    "muse_glimmer_text", "muse_spark_text", "musicflamingo", "mvp", "nanochat", "nemotron", "nllb-moe", "nomic_bert",
    "nystromformer", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "openai_privacy_filter", "opt",
    "owlv2", "owlvit", "patchtst", "pegasus", "pegasus_x", "perceiver", "persimmon", "phi", "phi3", "phi4_multimodal",
    "phimoe", "pixio", "pixtral", "plbart", "poolformer", "prophetnet", "pvt", "pvt_v2", "qianfan_ocr_vision",
    "qwen2", "qwen2_audio", "qwen2_audio_encoder", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_moe", "qwen3_next", "qwen3_vl_moe_text", "qwen3_vl_text", "qwen4_exp_text", "radio", "recurrent_gemma",
    "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "rwkv",
    "sam3_vision_model", "sam3_vit_model", "sam_hq_vision_model", "sam_vision_model", "sapiens2", "seamless_m4t",
    "seed_oss", "segformer", "sew", "sew-d", "siglip", "siglip_vision_model", "smollm3", "smolvlm_vision",
    "solar_open", "speech_to_text", "splinter", "squeezebert", "stablelm", "starcoder2", "swiftformer", "swin",
    "swinv2", "switch_transformers", "t5", "t5gemma", "t5gemma2", "tapas", "timesformer", "tipsv2",
    "tipsv2_text_model", "tipsv2_vision_model", "udop", "ultrabert", "umt5", "unispeech", "unispeech-sat",
    "vaultgemma", "vilt", "vision-text-dual-encoder", "visual_bert", "vit", "vit_mae", "vit_msn", "vitdet", "voxtral",
    "voxtral_encoder", "wav2vec2", "wav2vec2-bert", "wav2vec2-conformer", "wavlm", "whisper", "xglm", "xlm",
    "xlm-roberta", "xlnet", "xlstm", "yolos", "yoso", "zaya",
)  # fmt: skip
"""The kinds of transformers whose base model runs with these settings, of all that it knows."""


HEADS = {"inkling2_text": {"_input": 1}}
"""Heads of layers that have others than their model's configuration says."""


def transformers_cases() -> Iterator[Case]:
    """Yield the models of transformers."""
    for kind in KINDS:
        yield Case(kind, "transformers", partial(transformers_model, kind), heads=HEADS.get(kind, {}))


def find(name: str) -> Case:
    """Return the case of this name."""
    from benchmarks.pages.broad_libraries import library_cases, other_cases

    cases = {case.name: case for case in (*library_cases(), *other_cases())}
    return cases.get(name) or Case(name, "transformers", lambda: transformers_model(name))
