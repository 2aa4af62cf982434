"""SegFormer of transformers, in the sizes of the paper, with random weights.

E. Xie, W. Wang, Z. Yu, A. Anandkumar, J. M. Alvarez, P. Luo, "SegFormer: Simple and Efficient
Design for Semantic Segmentation with Transformers", NeurIPS 2021, arXiv 2105.15203, table 6.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from cpd import _torchvision

__all__ = ["segformer"]

# size → (widths of the stages, blocks of the stages, width of the decoder)
_SIZES = {
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "b1": ((64, 128, 320, 512), (2, 2, 2, 2), 256),
    "b2": ((64, 128, 320, 512), (3, 4, 6, 3), 768),
    "b3": ((64, 128, 320, 512), (3, 4, 18, 3), 768),
    "b4": ((64, 128, 320, 512), (3, 8, 27, 3), 768),
    "b5": ((64, 128, 320, 512), (3, 6, 40, 3), 768),
}


def segformer(size: str = "b0", num_classes: int = 150, **changes: Any) -> nn.Module:
    """Return ``SegformerForSemanticSegmentation``. Needs transformers.

    size: "b0" to "b5". changes: further fields of its configuration. Logits come at a quarter of
    the resolution, in an output with ``logits``.
    """
    _torchvision.ensure()
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    widths, depths, decoder = _SIZES[size]
    given: dict[str, Any] = {
        "hidden_sizes": list(widths),
        "depths": list(depths),
        "decoder_hidden_size": decoder,
        "num_labels": num_classes,
    }
    made: nn.Module = SegformerForSemanticSegmentation(SegformerConfig(**(given | changes)))
    return made
