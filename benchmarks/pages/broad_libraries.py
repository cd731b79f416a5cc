"""Tiny random models of libraries other than transformers, for the broad comparison of `agreement.py`.

``python -m benchmarks.pages.matrix`` says which libraries are installed; tests/third_party_models.txt and
``make matrix`` name their versions.
"""

# ruff: noqa: E501 - the tables read best with one model a line
from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.pages.broad_models import Case, noise, tokens
from benchmarks.pages.decoder_models import x_transformers_cases
from benchmarks.pages.third_party_models import VOCABULARY, torchvision_optional

Build = Callable[[], tuple[nn.Module, tuple[Any, ...]]]

# timm: the name of a model, the size of its image, and what differs from its settings.
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 4}
TIMM: list[tuple[str, int, dict[str, Any]]] = [
    ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "patch_size": 8, **VIT}),
    ("vit_relpos_small_patch16_224", 32, {"img_size": 32, "patch_size": 8, **VIT}),
    ("vit_srelpos_small_patch16_224", 32, {"img_size": 32, "patch_size": 8, **VIT}),
    ("vit_base_patch16_siglip_224", 32, {"img_size": 32, "patch_size": 8, **VIT}),
    ("vit_base_patch16_clip_224", 32, {"img_size": 32, "patch_size": 8, **VIT}),
    ("samvit_base_patch16", 64, {"img_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": (1,), **VIT}),
    ("beit_base_patch16_224", 32, {"img_size": 32, "patch_size": 8, **VIT}),
    ("eva02_tiny_patch14_224", 32, {"img_size": 32, "patch_size": 8, **VIT}),
    ("cait_xxs24_224", 32, {"img_size": 32, "patch_size": 8, **VIT}),
    ("deit3_small_patch16_224", 32, {"img_size": 32, "patch_size": 8, **VIT}),
    ("xcit_nano_12_p16_224", 32, {"img_size": 32, **VIT}),
    ("convit_tiny", 32, {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 4, "local_up_to_layer": 2}),
    ("pvt_v2_b0", 64, {}),
    ("twins_pcpvt_small", 64, {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 4, 4)}),
    ("twins_svt_small", 64, {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (2, 2, 4, 4), "wss": (2, 2, 2, 2)}),
    ("swinv2_tiny_window8_256", 32, {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}),
    ("swinv2_cr_tiny_224", 32, {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}),
    ("swin_s3_tiny_224", 32, {"img_size": 32, "window_size": (4, 4), "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}),
    ("coat_lite_tiny", 64, {"img_size": 64}),
    ("crossvit_tiny_240", 240, {}),
    ("levit_128s", 64, {"img_size": 64}),
    ("mobilevit_xxs", 64, {}),
    ("edgenext_xx_small", 64, {}),
    ("davit_tiny", 64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (2, 4, 4, 4)}),
    ("maxvit_rmlp_pico_rw_256", 64, {"img_size": 64}),
    ("coatnet_pico_rw_224", 64, {"img_size": 64}),
    ("mvitv2_tiny", 64, {"img_size": 64}),
    ("nest_tiny", 64, {"img_size": 64}),
    ("tnt_s_patch16_224", 32, {"img_size": 32, "embed_dim": 32, "inner_dim": 16, "depth": 2, "num_heads_inner": 2, "num_heads_outer": 4}),
    ("visformer_tiny", 64, {"img_size": 64}),
    ("pit_ti_224", 64, {"img_size": 64}),
    ("volo_d1_224", 64, {"img_size": 64}),
    ("gcvit_xxtiny", 224, {}),
    ("efficientformer_l1", 224, {}),
    ("efficientformerv2_s0", 64, {"img_size": 64}),
    ("efficientvit_m0", 224, {}),
    ("hiera_tiny_224", 64, {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}),
    ("caformer_s18", 64, {}),
    ("tiny_vit_5m_224", 224, {}),
    ("halonet26t", 256, {}),
    ("botnet26t_256", 64, {"img_size": 64}),
    ("naflexvit_base_patch16_gap", 32, {"patch_size": 8, **VIT}),
    ("fastvit_sa12", 64, {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32)}),
    ("repvit_m0_9", 64, {}),
    ("aimv2_large_patch14_224", 32, {"img_size": 32, "patch_size": 8, **VIT}),
    ("tnt_s_legacy_patch16_224", 64, {"img_size": 64, "embed_dim": 32, "inner_dim": 16, "depth": 2, "num_heads_inner": 2, "num_heads_outer": 4}),
    ("eca_halonext26ts", 256, {}),
    ("sehalonet33ts", 256, {}),
    ("eca_botnext26ts_256", 64, {"img_size": 64}),
    ("vitamin_small_224", 64, {"img_size": 64}),
    ("nextvit_small", 64, {}),
    ("shvit_s1", 128, {}),
    ("mobilenetv4_hybrid_medium", 64, {}),
    ("mobilenetv5_base", 64, {}),
    ("csatv2", 64, {}),
    ("resnet50_clip", 64, {}),
    ("vit_small_r26_s32_224", 64, {"img_size": 64, **VIT}),
    ("coatnext_nano_rw_224", 64, {"img_size": 64}),
    ("crossvit_9_dagger_240", 240, {}),
    ("levit_conv_128s", 64, {"img_size": 64}),
    *((name, 32, {"img_size": 32, "patch_size": 8, **VIT}) for name in (
        "vit_medium_patch16_gap_240", "vit_dpwee_patch16_reg1_gap_256", "beitv2_base_patch16_224", "eva_giant_patch14_224",
        "vit_base_patch16_rope_224", "vit_small_patch16_rope_mixed_224", "vit_pe_core_tiny_patch16_384",
        "vit_small_patch16_dinov3", "vit_srelpos_medium_patch16_224", "vit_relpos_base_patch16_cls_224",
        "vit_small_patch16_18x2_224", "vit_so150m_patch16_reg4_map_256", "flexivit_small",
    )),
]  # fmt: skip

WITHOUT_TIMM = (
    *("mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "convnext_atto", "resnet10t", "regnetx_002", "mobilenetv3_small_050"),
    *("ghostnet_050", "poolformer_s12", "convformer_s18", "sequencer2d_s", "efficientnet_b0", "lcnet_035", "efficientvit_b0"),
    *("mambaout_femto", "inception_next_atto", "ecaresnet26t", "seresnet18", "focalnet_tiny_srf", "gernet_s", "mobilevitv2_050"),
    *("convmixer_1024_20_ks9_p14", "lambda_resnet26t", "starnet_s1", "skresnet18", "resnest14d"),
    *("swiftformer_xs", "repvit_m1", "mambaout_kobe", "mobileone_s0", "fasternet_t0", "gcresnet33ts", "cs3darknet_m", "rdnet_tiny"),
)  # fmt: skip
"""Models of timm without softmax attention between positions; some have modules that are called attention."""


def timm_case(name: str, size: int, settings: dict[str, Any]) -> Case:
    """Return the case of a model of timm."""

    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        with torchvision_optional():
            timm = importlib.import_module("timm")
        return timm.create_model(name, pretrained=False, num_classes=5, **settings), (noise(2, 3, size, size),)

    return Case(name, "timm", build)


PLAIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 48,
}
PICTURE, VIDEO = (lambda: noise(2, 3, 32, 32)), (lambda: noise(2, 3, 4, 32, 32))
VIT_PYTORCH: list[tuple[str, str, dict[str, Any], Callable[[], Any]]] = [
    ("vit", "ViT", PLAIN, PICTURE),
    ("simple_vit", "SimpleViT", PLAIN, PICTURE),
    ("simple_vit_with_qk_norm", "SimpleViT", PLAIN, PICTURE),
    ("simple_vit_with_register_tokens", "SimpleViT", PLAIN, PICTURE),
    ("simple_vit_with_value_residual", "SimpleViT", PLAIN, PICTURE),
    ("vit_for_small_dataset", "ViT", PLAIN, PICTURE),
    ("vit_with_patch_merger", "ViT", {**PLAIN, "patch_merge_layer": 1, "patch_merge_num_tokens": 4}, PICTURE),
    ("deepvit", "DeepViT", PLAIN, PICTURE),
    ("parallel_vit", "ViT", PLAIN, PICTURE),
    ("normalized_vit", "nViT", {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "dim_head": 8, "mlp_dim": 48}, PICTURE),
    ("learnable_memory_vit", "ViT", PLAIN, PICTURE),
    ("rvt", "RvT", PLAIN, PICTURE),
    ("cait", "CaiT", {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 1, "cls_depth": 1, "heads": 4, "mlp_dim": 48}, PICTURE),
    ("xcit", "XCiT", {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 1, "cls_depth": 1, "heads": 4, "mlp_dim": 48}, PICTURE),
    ("cross_vit", "CrossViT", {"image_size": 32, "num_classes": 5, "depth": 1, "sm_dim": 32, "sm_patch_size": 8, "sm_enc_depth": 1, "sm_enc_heads": 4, "sm_enc_mlp_dim": 32, "sm_enc_dim_head": 8, "lg_dim": 32, "lg_patch_size": 16, "lg_enc_depth": 1, "lg_enc_heads": 4, "lg_enc_mlp_dim": 32, "lg_enc_dim_head": 8, "cross_attn_depth": 1, "cross_attn_heads": 4, "cross_attn_dim_head": 8}, PICTURE),
    ("cct", "CCT", {"img_size": 32, "embedding_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 5, "n_conv_layers": 1}, PICTURE),
    ("cvt", "CvT", {"num_classes": 5, "s1_emb_dim": 16, "s1_depth": 1, "s2_emb_dim": 32, "s2_heads": 2, "s2_depth": 1, "s3_emb_dim": 32, "s3_heads": 4, "s3_depth": 1}, lambda: noise(2, 3, 64, 64)),
    ("nest", "NesT", {"image_size": 32, "patch_size": 4, "num_classes": 5, "dim": 16, "heads": 2, "num_hierarchies": 2, "block_repeats": 1}, PICTURE),
    ("pit", "PiT", {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": (1, 1), "heads": 4, "mlp_dim": 48}, PICTURE),
    ("scalable_vit", "ScalableViT", {"num_classes": 5, "dim": 16, "heads": (2, 4), "depth": (1, 1), "ssa_dim_key": 8, "reduction_factor": (2, 1), "window_size": (4, None)}, lambda: noise(2, 3, 64, 64)),
    ("max_vit", "MaxViT", {"num_classes": 5, "dim": 16, "dim_head": 8, "depth": (1,), "window_size": 4}, PICTURE),
    ("mobile_vit", "MobileViT", {"image_size": (64, 64), "dims": [16, 16, 16], "channels": [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 16], "num_classes": 5}, lambda: noise(2, 3, 64, 64)),
    ("twins_svt", "TwinsSVT", {"num_classes": 5, "s1_emb_dim": 16, "s1_depth": 1, "s1_local_patch_size": 4, "s1_global_k": 4, "s2_emb_dim": 16, "s2_depth": 1, "s2_local_patch_size": 4, "s2_global_k": 4, "s3_emb_dim": 16, "s3_depth": 1, "s3_local_patch_size": 2, "s3_global_k": 2, "s4_emb_dim": 16, "s4_depth": 1, "s4_local_patch_size": 1, "s4_global_k": 1}, lambda: noise(2, 3, 128, 128)),
    ("t2t", "T2TViT", {"image_size": 32, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48, "t2t_layers": ((7, 4), (3, 2))}, PICTURE),
    ("levit", "LeViT", {"image_size": 64, "num_classes": 5, "dim": (16, 32), "depth": (1, 1), "heads": (2, 4), "mlp_mult": 2, "stages": 2, "dim_key": 8, "dim_value": 8}, lambda: noise(2, 3, 64, 64)),
    ("simple_uvit", "SimpleUViT", PLAIN, PICTURE),
    ("simple_vit_with_fft", "SimpleViT", {**PLAIN, "freq_patch_size": 8}, PICTURE),
    ("simple_vit_with_hyper_connections", "SimpleViT", {**PLAIN, "num_residual_streams": 2}, PICTURE),
    ("simple_vit_orthog_residual_update", "SimpleViT", PLAIN, PICTURE),
    ("simple_vit_with_relative_proj_pos_bias", "SimpleViT", PLAIN, PICTURE),
    ("simple_vit_with_specialized_cls", "SimpleViT", PLAIN, PICTURE),
    ("jumbo_vit", "JumboViT", {**PLAIN, "num_jumbo_cls": 1, "jumbo_cls_k": 2, "jumbo_ff_mult": 2}, PICTURE),
    ("vit_5", "ViT", PLAIN, PICTURE),
    ("look_vit", "LookViT", {"dim": 32, "image_size": 48, "num_classes": 5, "depth": 2, "patch_size": 16, "highres_patch_size": 8, "heads": 4, "dim_head": 8, "cross_attn_heads": 4, "cross_attn_dim_head": 8}, lambda: noise(2, 3, 48, 48)),
    ("vit_with_decorr", "ViT", PLAIN, PICTURE),
    ("vit_with_keel_post_ln", "ViT", PLAIN, PICTURE),
    ("max_vit_with_registers", "MaxViT", {"num_classes": 5, "dim": 16, "dim_head": 8, "depth": (1,), "window_size": 4, "num_register_tokens": 2}, PICTURE),
    ("na_vit", "NaViT", {**PLAIN, "token_dropout_prob": 0.0}, lambda: [[noise(3, 32, 32), noise(3, 16, 32)], [noise(3, 32, 16)]]),
    ("mp3", "ViT", PLAIN, PICTURE),
    ("ats_vit", "ViT", {**PLAIN, "max_tokens_per_depth": (8, 4)}, PICTURE),
    ("simple_vit_1d", "SimpleViT", {"seq_len": 32, "patch_size": 4, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48}, lambda: noise(2, 3, 32)),
    ("simple_vit_3d", "SimpleViT", {**PLAIN, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2, "patch_size": ...}, VIDEO),
    ("vivit", "ViViT", {"image_size": 32, "frames": 4, "image_patch_size": 8, "frame_patch_size": 2, "num_classes": 5, "dim": 32, "spatial_depth": 1, "temporal_depth": 1, "heads": 4, "mlp_dim": 48}, VIDEO),
    ("vit_3d", "ViT", {**PLAIN, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2, "patch_size": ...}, VIDEO),
]  # fmt: skip


def _vit_pytorch() -> Iterator[Case]:
    """Yield models of vit_pytorch: many arrangements of attention, each written by hand."""
    for module, name, settings, batch in VIT_PYTORCH:

        def build(module: str = module, name: str = name, settings: Any = settings, batch: Any = batch) -> Any:
            with torchvision_optional():
                library = importlib.import_module(f"vit_pytorch.{module}")
            own = {key: value for key, value in settings.items() if value is not ...}
            return getattr(library, name)(**own), (batch(),)

        yield Case(f"{module}", "vit_pytorch", build)


def _diffusers() -> Iterator[Case]:
    small: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8}
    context, time = (lambda: noise(2, 6, 32)), (lambda: torch.tensor([3, 7]))
    blocks = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
    conditioned = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32, "attention_head_dim": 4}  # fmt: skip
    table: list[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = [
        ("UNet2DConditionModel", {**blocks, **conditioned}, lambda: {"sample": noise(2, 4, 8, 8), "timestep": time(), "encoder_hidden_states": context()}),
        ("UNet2DModel", {**blocks, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8}, lambda: {"sample": noise(2, 3, 8, 8), "timestep": time()}),
        ("AutoencoderKL", {"block_out_channels": (16, 32), "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4}, lambda: {"sample": noise(2, 3, 16, 16)}),
        ("DiTTransformer2DModel", {**small, "in_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2, "norm_num_groups": 8}, lambda: {"hidden_states": noise(2, 4, 8, 8), "timestep": time(), "class_labels": torch.tensor([1, 2])}),
        ("PixArtTransformer2DModel", {**small, "in_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 32, "caption_channels": 32, "norm_num_groups": 8, "use_additional_conditions": False}, lambda: {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": context(), "timestep": time(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}),
        ("SD3Transformer2DModel", {**small, "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32, "out_channels": 4}, lambda: {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": context(), "pooled_projections": noise(2, 32), "timestep": time()}),
        ("FluxTransformer2DModel", {**small, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (2, 2, 4)}, lambda: {"hidden_states": noise(2, 16, 4), "encoder_hidden_states": context(), "pooled_projections": noise(2, 32), "timestep": torch.tensor([0.3, 0.7]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)}),
        ("AuraFlowTransformer2DModel", {**small, "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 32, "caption_projection_dim": 32, "out_channels": 4, "pos_embed_max_size": 16}, lambda: {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": context(), "timestep": torch.tensor([0.3, 0.7])}),
        ("SanaTransformer2DModel", {**small, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_cross_attention_heads": 4, "cross_attention_head_dim": 8, "cross_attention_dim": 32, "caption_channels": 32, "sample_size": 8}, lambda: {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": context(), "timestep": time()}),
        ("CogVideoXTransformer3DModel", {**small, "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": 32, "time_embed_dim": 8, "sample_width": 8, "sample_height": 8, "sample_frames": 5, "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 6}, lambda: {"hidden_states": noise(2, 2, 4, 8, 8), "encoder_hidden_states": context(), "timestep": time()}),
        ("LatteTransformer3DModel", {**small, "in_channels": 4, "num_layers": 1, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 32, "caption_channels": 32, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 3, "attention_bias": True}, lambda: {"hidden_states": noise(2, 4, 3, 8, 8), "encoder_hidden_states": context(), "timestep": time()}),
        ("WanTransformer3DModel", {**small, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 32}, lambda: {"hidden_states": noise(2, 4, 2, 4, 4), "encoder_hidden_states": context(), "timestep": time()}),
        ("TransformerTemporalModel", {**small, "in_channels": 32, "norm_num_groups": 8}, lambda: {"hidden_states": noise(4, 32, 4, 4), "num_frames": 2}),
        ("Transformer2DModel", {**small, "in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": 32}, lambda: {"hidden_states": noise(2, 32, 4, 4), "encoder_hidden_states": context()}),
        ("PriorTransformer", {**small, "num_layers": 2, "embedding_dim": 32, "num_embeddings": 6}, lambda: {"hidden_states": noise(2, 32), "timestep": time(), "proj_embedding": noise(2, 32), "encoder_hidden_states": context()}),
        ("UVit2DModel", {"hidden_size": 32, "cond_embed_dim": 32, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40, "encoder_hidden_size": 32, "vocab_size": 40, "codebook_size": 32, "in_channels": 32, "block_out_channels": 32, "num_res_blocks": 1, "num_hidden_layers": 2, "num_attention_heads": 4, "block_num_heads": 4, "sample_size": 8, "intermediate_size": 48}, lambda: {"input_ids": torch.randint(0, 32, (2, 8, 8)), "encoder_hidden_states": context(), "pooled_text_emb": noise(2, 32), "micro_conds": torch.ones(2, 5)}),
    ]  # fmt: skip
    for name, settings, inputs in table:

        def build(name: str = name, settings: Any = settings, inputs: Any = inputs) -> Any:
            library = importlib.import_module("diffusers")
            return getattr(library, name)(**settings), inputs()

        yield Case(name, "diffusers", build)


def _torch_modules() -> Iterator[Case]:
    rows: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
        "nn.LSTM": (lambda: nn.LSTM(32, 32, 2, batch_first=True), lambda: (noise(2, 12, 32),)),
        "nn.GRU": (lambda: nn.GRU(32, 32, 2, batch_first=True), lambda: (noise(2, 12, 32),)),
        "nn.TransformerDecoder": (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, batch_first=True), 2), lambda: (noise(2, 6, 32), noise(2, 12, 32))),
        "nn.TransformerEncoder, sequence first": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48), 2), lambda: (noise(12, 3, 32),)),
    }  # fmt: skip
    for name, (make, batch) in rows.items():
        yield Case(name, "torch", lambda make=make, batch=batch: (make(), batch()))


def _esm() -> tuple[nn.Module, tuple[Any, ...]]:
    esm = importlib.import_module("esm")
    model = esm.ESM2(num_layers=2, embed_dim=32, attention_heads=4, alphabet="ESM-1b")
    return model, (torch.randint(4, 24, (2, 12), generator=torch.Generator().manual_seed(1)),)


def _esm_msa() -> tuple[nn.Module, tuple[Any, ...]]:
    import argparse

    esm = importlib.import_module("esm")
    settings = argparse.Namespace(layers=2, embed_dim=32, logit_bias=True, ffn_embed_dim=48, attention_heads=4, max_tokens=2**14, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, max_tokens_per_msa=2**14, max_positions=64, embed_positions_msa=True, embed_positions_msa_dim=32)  # fmt: skip
    model = esm.MSATransformer(settings, esm.Alphabet.from_architecture("msa_transformer"))
    return model, (torch.randint(4, 24, (2, 3, 12), generator=torch.Generator().manual_seed(1)),)


def _open_clip(**settings: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    with torchvision_optional():
        model_of = importlib.import_module("open_clip.model")
    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32, **settings}
    words = {"context_length": 12, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": 2}
    return model_of.CLIP(32, model_of.CLIPVisionCfg(**vision), model_of.CLIPTextCfg(**words)), (
        noise(2, 3, 32, 32),
        tokens(),
    )


def _segment_anything() -> tuple[nn.Module, tuple[Any, ...]]:
    with torchvision_optional():
        library = importlib.import_module("segment_anything.modeling")
    encoder = library.ImageEncoderViT(
        64, 8, 3, 32, 2, 4, out_chans=32, use_rel_pos=True, window_size=3, global_attn_indexes=(1,)
    )
    return encoder, (noise(2, 3, 64, 64),)


def _segment_anything_decoder() -> tuple[nn.Module, tuple[Any, ...]]:
    with torchvision_optional():
        library = importlib.import_module("segment_anything.modeling")
    decoder = library.TwoWayTransformer(depth=2, embedding_dim=32, num_heads=4, mlp_dim=48)
    return decoder, (noise(2, 32, 4, 4), noise(2, 32, 4, 4), noise(2, 5, 32))


def _qwen_vision(implementation: str) -> tuple[nn.Module, Any]:
    library = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    settings = importlib.import_module("transformers.models.qwen2_5_vl.configuration_qwen2_5_vl")
    config = settings.Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        patch_size=4,
        window_size=16,
        out_hidden_size=32,
        fullatt_block_indexes=[1],
    )
    tower = library.Qwen2_5_VisionTransformerPretrainedModel
    return tower._from_config(config, attn_implementation=implementation), {
        "hidden_states": noise(96, 96),
        "grid_thw": torch.tensor([[1, 8, 12]]),
    }


def _linear_attention() -> tuple[nn.Module, tuple[Any, ...]]:
    library = importlib.import_module("linear_attention_transformer")
    return library.LinearAttentionTransformerLM(num_tokens=VOCABULARY, dim=32, heads=4, depth=2, max_seq_len=16), (
        torch.randint(3, 60, (2, 16)),
    )


def _performer() -> tuple[nn.Module, tuple[Any, ...]]:
    library = importlib.import_module("performer_pytorch")
    return library.Performer(dim=32, depth=2, heads=4, dim_head=8), (noise(2, 12, 32),)


def _local_attention() -> tuple[nn.Module, tuple[Any, ...]]:
    library = importlib.import_module("local_attention")
    return library.LocalTransformer(
        num_tokens=VOCABULARY, dim=32, depth=2, max_seq_len=16, heads=4, dim_head=8, local_attn_window_size=4
    ), (tokens(16),)


def _graph(name: str, **settings: Any) -> Build:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        library = importlib.import_module("torch_geometric.nn")
        edges = torch.randint(0, 12, (2, 40), generator=torch.Generator().manual_seed(1))
        own = dict(settings)
        if name == "GPSConv":
            own["conv"] = library.SAGEConv(32, 32)
        return getattr(library, name)(**own), (noise(12, 32), edges)

    return build


def library_cases() -> Iterator[Case]:
    """Yield the models that have softmax attention."""
    yield from (timm_case(*row) for row in TIMM)
    yield from _vit_pytorch()
    yield from x_transformers_cases()
    yield from _diffusers()
    yield from _torch_modules()
    yield Case("ESM-2", "esm", _esm)
    yield Case("MSA Transformer", "esm", _esm_msa)
    yield Case("open_clip CLIP", "open_clip", _open_clip)
    yield Case(
        "open_clip attentional pool",
        "open_clip",
        lambda: _open_clip(attentional_pool=True, attn_pooler_queries=8, attn_pooler_heads=4),
    )
    yield Case("SAM image encoder", "segment_anything", _segment_anything)
    yield Case("SAM two-way decoder", "segment_anything", _segment_anything_decoder)
    for implementation in ("eager", "sdpa"):
        yield Case(f"Qwen2.5-VL vision, {implementation}", "transformers", partial(_qwen_vision, implementation))
    yield Case("local attention", "local_attention", _local_attention)
    yield Case(
        "TransformerConv",
        "torch_geometric",
        _graph("TransformerConv", in_channels=32, out_channels=8, heads=4),
        named="edges of a graph",
    )
    yield Case(
        "GATConv",
        "torch_geometric",
        _graph("GATConv", in_channels=32, out_channels=8, heads=4),
        named="edges of a graph",
    )
    yield Case("GPSConv", "torch_geometric", _graph("GPSConv", channels=32, heads=4))


def other_cases() -> Iterator[Case]:
    """Yield models without softmax attention."""
    for name in WITHOUT_TIMM:
        yield timm_case(name, 224 if name.startswith(("mixer", "resmlp", "gmlp", "sequencer")) else 64, {})
    yield Case("linear attention transformer", "linear_attention_transformer", _linear_attention)
    yield Case("Performer", "performer_pytorch", _performer)
    for name in ("GCNConv", "SAGEConv", "GINEConv", "ChebConv"):
        extra = {"K": 2} if name == "ChebConv" else {}
        if name != "GINEConv":
            yield Case(name, "torch_geometric", _graph(name, in_channels=32, out_channels=32, **extra))
