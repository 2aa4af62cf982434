"""transformers: images. Small random configurations; see `with_language` for text and sound."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .network import Built, Network

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": 64, "patch_size": 8,
}  # fmt: skip
WINDOWS = {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2, 2, 2],
           "num_heads": [2, 2, 4, 4], "window_size": 4}  # fmt: skip
STAGES = {"hidden_sizes": [16, 32, 64, 128], "depths": [2, 2, 2, 2]}
NO_DROP = {"drop_path_rate": 0.0}
NECK = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}


def build(model: str, config: str, options: dict[str, Any], size: int) -> Built:
    """Return a model of a small configuration and two images."""
    import transformers

    made = getattr(transformers, config)(**_nested(options))
    return getattr(transformers, model)(made), {"pixel_values": torch.randn(2, 3, size, size)}


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with configurations in the place of (class, options)."""
    import transformers

    return {
        key: getattr(transformers, value[0])(**value[1]) if _is_config(value) else value
        for key, value in options.items()
    }


def _is_config(value: Any) -> bool:
    return isinstance(value, tuple) and str(value[0]).endswith("Config")


def clip() -> Built:
    """Return both towers, on two texts and two images."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 16,
        "eos_token_id": 99, "bos_token_id": 98, "pad_token_id": 97,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=32)
    inputs = {
        "input_ids": torch.randint(0, 90, (2, 12)),
        "pixel_values": torch.randn(2, 3, 64, 64),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
    }
    return CLIPModel(config), inputs


def _entry(name: str, model: str, config: str, options: dict[str, Any], size: int = 64) -> Network:
    return Network(f"transformers:{name}", partial(build, model, config, options, size), note=model)


SWIN = ("SwinConfig", {**WINDOWS, **NO_DROP, **NECK})
RESNET = ("ResNetConfig", {
    "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
})  # fmt: skip
DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False,
    "backbone_config": ("ResNetConfig", {**RESNET[1], "out_features": ["stage4"]}),
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "num_queries": 10, "num_labels": 5, "backbone": None,
}  # fmt: skip
RT_DETR = {
    "backbone_config": ("RTDetrResNetConfig", {
        "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1],
        "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
    }),
    "encoder_in_channels": [32, 64, 128], "encoder_hidden_dim": 64, "d_model": 64,
    "encoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 128, "decoder_layers": 2, "num_queries": 20, "num_labels": 5,
    "decoder_in_channels": [64, 64, 64], "num_denoising": 0, "anchor_image_size": [128, 128],
}  # fmt: skip
MASK2FORMER = {
    "backbone_config": SWIN, "feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64,
    "encoder_feedforward_dim": 128, "dim_feedforward": 128, "encoder_layers": 2,
    "decoder_layers": 3, "num_attention_heads": 4, "num_queries": 10, "num_labels": 5,
}  # fmt: skip
DPT = {
    **SMALL, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False,
    "neck_hidden_sizes": [16, 32, 64, 64], "fusion_hidden_size": 32, "num_labels": 5,
}  # fmt: skip
MOBILE = {
    "image_size": 64, "hidden_sizes": [32, 40, 48], "num_attention_heads": 4,
    "neck_hidden_sizes": [8, 16, 24, 32, 48, 56, 96],
}  # fmt: skip
PVT = {
    "image_size": 64, "hidden_sizes": [16, 32, 64, 128], "depths": [2, 2, 2, 2],
    "num_attention_heads": [1, 2, 4, 8], "mlp_ratios": [4, 4, 4, 4],
}  # fmt: skip
SEGFORMER = {
    **STAGES, "num_attention_heads": [1, 2, 4, 8], "decoder_hidden_size": 64, "num_labels": 5,
}  # fmt: skip
UPERNET = {
    "backbone_config": SWIN, "hidden_size": 64, "pool_scales": [1, 2], "num_labels": 5,
    "auxiliary_in_channels": 128, "auxiliary_channels": 32,
}  # fmt: skip

NETWORKS = (
    _entry("vit", "ViTForImageClassification", "ViTConfig", SMALL),
    _entry("deit", "DeiTForImageClassificationWithTeacher", "DeiTConfig", SMALL),
    _entry("beit", "BeitForImageClassification", "BeitConfig",
           {**SMALL, "use_relative_position_bias": True}),
    _entry("swin", "SwinForImageClassification", "SwinConfig", {**WINDOWS, "image_size": 128}, 128),
    _entry("swinv2", "Swinv2ForImageClassification", "Swinv2Config", WINDOWS),
    _entry("dinov2", "Dinov2ForImageClassification", "Dinov2Config", SMALL),
    _entry("convnextv2", "ConvNextV2ForImageClassification", "ConvNextV2Config",
           {**STAGES, "image_size": 64}),
    _entry("mobilevit", "MobileViTForImageClassification", "MobileViTConfig", MOBILE),
    _entry("pvt_v2", "PvtV2ForImageClassification", "PvtV2Config", PVT),
    _entry("segformer", "SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER),
    _entry("upernet_swin", "UperNetForSemanticSegmentation", "UperNetConfig", UPERNET),
    _entry("dpt", "DPTForSemanticSegmentation", "DPTConfig", DPT),
    _entry("detr", "DetrForObjectDetection", "DetrConfig", DETR, 128),
    _entry("rt_detr", "RTDetrForObjectDetection", "RTDetrConfig", RT_DETR, 128),
    _entry("mask2former_swin", "Mask2FormerForUniversalSegmentation", "Mask2FormerConfig",
           MASK2FORMER, 128),
    _entry("yolos", "YolosForObjectDetection", "YolosConfig",
           {**SMALL, "image_size": [64, 64], "num_detection_tokens": 10, "num_labels": 5}),
    Network("transformers:clip", clip, note="CLIPModel, texts and images"),
)  # fmt: skip
