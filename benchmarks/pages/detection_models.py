"""Tiny random models of transformers that find objects or segments in images, for the comparison of `agreement.py`.

Their encoders add positions to queries and keys but not to values, their decoders attend from learned queries to an
image, and half of one image is padding.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.pages.broad_models import BATCH, Case, noise

SIZE = 64
DETR: dict[str, Any] = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("use_timm_backbone", "use_pretrained_backbone"), False),
    "backbone": None,
    "num_queries": 7,
}


def _images() -> dict[str, Any]:
    mask = torch.ones(BATCH, SIZE, SIZE, dtype=torch.long)
    mask[1, :, SIZE // 2 :] = 0
    return {"pixel_values": noise(BATCH, 3, SIZE, SIZE), "pixel_mask": mask}


def _resnet() -> Any:
    library = importlib.import_module("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
    return library.ResNetConfig(**sizes, out_features=["stage4"])


def _swin() -> Any:
    library = importlib.import_module("transformers")
    sizes = {"image_size": SIZE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 4]}
    return library.SwinConfig(**sizes, window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"])


def _detr(name: str, **settings: Any) -> tuple[nn.Module, Any]:
    library = importlib.import_module("transformers")
    config = getattr(library, f"{name}Config")(backbone_config=_resnet(), **DETR, **settings)
    return getattr(library, f"{name}Model")(config), _images()


def _real_time(name: str) -> tuple[nn.Module, Any]:
    library = importlib.import_module("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    backbone = library.RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
    encoder = {"encoder_hidden_dim": 32, "encoder_in_channels": [16] * 3, "encoder_ffn_dim": 48, "d_model": 32}
    decoder = {"decoder_in_channels": [32] * 3, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_n_points": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 7, "num_denoising": 0}
    config = getattr(library, f"{name}Config")(backbone_config=backbone, **encoder, **decoder, **heads)
    return getattr(library, f"{name}Model")(config), {"pixel_values": noise(BATCH, 3, SIZE, SIZE)}


def _maskformer() -> tuple[nn.Module, Any]:
    library = importlib.import_module("transformers")
    decoder = library.DetrConfig(backbone_config=_resnet(), d_model=32, **DETR).to_dict()
    config = library.MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=_swin(), decoder_config=decoder
    )
    return library.MaskFormerModel(config), _images()


def _mask2former() -> tuple[nn.Module, Any]:
    library = importlib.import_module("transformers")
    widths = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    widths |= dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 48)
    config = library.Mask2FormerConfig(
        **widths, encoder_layers=1, decoder_layers=2, num_attention_heads=4, num_queries=7, backbone_config=_swin()
    )
    return library.Mask2FormerModel(config), _images()


def detection_cases() -> Iterator[Case]:
    """Yield the models."""
    for kind, name in {"detr": "Detr", "table-transformer": "TableTransformer"}.items():
        yield Case(kind, "transformers", partial(_detr, name, d_model=32))
    yield Case("conditional_detr", "transformers", partial(_detr, "ConditionalDetr", d_model=32))
    points = {"encoder_n_points": 2, "decoder_n_points": 2, "num_feature_levels": 1}
    yield Case("deformable_detr", "transformers", partial(_detr, "DeformableDetr", d_model=32, **points))
    yield Case("dab-detr", "transformers", partial(_detr, "DabDetr", hidden_size=32))
    for kind, name in {"rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2"}.items():
        yield Case(kind, "transformers", partial(_real_time, name))
    yield Case("maskformer", "transformers", _maskformer)
    yield Case("mask2former", "transformers", _mask2former)
