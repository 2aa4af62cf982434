"""MONAI: networks for volumes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .network import Built, Network

SIZE = 32
OPTIONS: dict[str, dict[str, Any]] = {
    "UNet": {
        "channels": (8, 16, 32, 64), "strides": (2, 2, 2), "num_res_units": 2, "spatial_dims": 3,
    },
    "DynUNet": {
        "kernel_size": [3, 3, 3, 3], "strides": [1, 2, 2, 2], "upsample_kernel_size": [2, 2, 2],
        "filters": [8, 16, 32, 64], "res_block": True, "spatial_dims": 3,
    },
    "SegResNet": {"init_filters": 8},
    "UNETR": {
        "img_size": (SIZE,) * 3, "feature_size": 8, "hidden_size": 48, "mlp_dim": 96,
        "num_heads": 4,
    },
    "SwinUNETR": {"feature_size": 12, "window_size": 4, "use_v2": True},
}  # fmt: skip
SIZES = {"SwinUNETR": 64}


def build(kind: str, options: dict[str, Any], size: int) -> Built:
    """Return a network and two volumes of one channel."""
    from monai.networks import nets

    model = getattr(nets, kind)(in_channels=1, out_channels=2, **options)
    return model, torch.randn(2, 1, size, size, size)


NETWORKS = tuple(
    Network(f"monai:{kind}", partial(build, kind, options, SIZES.get(kind, SIZE)))
    for kind, options in OPTIONS.items()
)
