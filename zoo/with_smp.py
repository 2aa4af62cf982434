"""segmentation-models-pytorch: every decoder, on a small encoder."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .network import Built, Network

OPTIONS: dict[str, dict[str, Any]] = {
    "Unet": {"decoder_attention_type": "scse"},
    "UnetPlusPlus": {},
    "FPN": {},
    "PAN": {},
    "PSPNet": {},
    "Linknet": {},
    "MAnet": {},
    "DeepLabV3": {},
    "DeepLabV3Plus": {},
    "UPerNet": {},
    "Segformer": {"encoder_name": "mit_b0"},
    "DPT": {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": False},
}
SIZES = {"DPT": 224}


def build(kind: str, options: dict[str, Any], size: int) -> Built:
    """Return a network without weights and two images."""
    import segmentation_models_pytorch

    made = getattr(segmentation_models_pytorch, kind)
    model = made(**{"encoder_name": "resnet18", "encoder_weights": None, "classes": 5, **options})
    return model, torch.randn(2, 3, size, size)


NETWORKS = tuple(
    Network(
        f"smp:{kind}",
        partial(build, kind, options, SIZES.get(kind, 128)),
        note=options.get("encoder_name", "resnet18"),
    )
    for kind, options in OPTIONS.items()
)
