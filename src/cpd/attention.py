"""Multi-head attention whose inner width is its own: what `nn.MultiheadAttention` becomes when it
is cut.

PyTorch's layer wants `embed_dim = num_heads x head_dim` on both sides of its projections. A cut
layer has fewer heads or narrower ones inside than the embedding outside. `CutMultiheadAttention` is
a subclass with the same parameters, arguments and results; the widths are read from the weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class CutMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with an inner width of `num_heads x head_dim`, whatever the
    embedding's is.
    """

    scale: float

    @staticmethod
    def adopt(module: nn.MultiheadAttention) -> None:
        """Turn a layer whose tensors were cut into one that runs on them; others are left alone."""
        packed = module.in_proj_weight is not None
        inner = (module.in_proj_weight if packed else module.q_proj_weight).shape[0] // (
            3 if packed else 1
        )
        outer = module.out_proj.weight.shape[0]
        read = (module.in_proj_weight if packed else module.q_proj_weight).shape[1]
        same = inner == module.embed_dim == outer == read
        if same and module.num_heads * module.head_dim == inner:
            return
        if not isinstance(module, CutMultiheadAttention):
            module.scale = module.head_dim**-0.5  # the whole layer's, however narrow heads get
        module.embed_dim = outer
        module.kdim = (module.in_proj_weight if packed else module.k_proj_weight).shape[1]
        module.vdim = (module.in_proj_weight if packed else module.v_proj_weight).shape[1]
        module.head_dim = inner // module.num_heads
        module._qkv_same_embed_dim = False  # the fused path knows one width only
        module.__class__ = CutMultiheadAttention

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002 - a hint to the fused path; attn_mask says it all
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `nn.MultiheadAttention.forward`: (batch, length, embed) with batch_first, else
        (length, batch, embed).
        """
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._heads(query, key, value)
        mask = self._mask(q, attn_mask, key_padding_mask, batched)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, dropout) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out[0], None if weights is None else weights[0]
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> list[torch.Tensor]:
        weights: Any = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        if not self._own_projections():
            weights = self.in_proj_weight.chunk(3)
        biases: Any = (
            [None] * 3
            if getattr(self, "in_proj_bias", None) is None
            else self.in_proj_bias.chunk(3)
        )
        q, k, v = (
            F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]

    def _own_projections(self) -> bool:
        """Say whether query, key and value have weights of their own (kdim or vdim was given)."""
        return self._parameters.get("in_proj_weight") is None

    def _mask(
        self,
        q: torch.Tensor,
        attn_mask: torch.Tensor | None,
        padding: torch.Tensor | None,
        batched: bool,
    ) -> torch.Tensor | None:
        """Return one additive mask (batch, heads, length, length), broadcastable."""
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)
        total = None
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:])
            total = F.pad(_additive(attn_mask, q), (0, extra))
        if padding is not None:
            padding = (padding if batched else padding[None])[:, None, None, :]
            part = F.pad(_additive(padding, q), (0, extra))
            total = part if total is None else total + part
        return total


def without_nesting(encoder: nn.TransformerEncoder) -> None:
    """Let an encoder that holds a cut attention hand on padded sequences as they are.

    Without gradients it would make them nested tensors, which only the whole layer's fused path
    takes.
    """
    if any(isinstance(part, CutMultiheadAttention) for part in encoder.modules()):
        encoder.use_nested_tensor = encoder.enable_nested_tensor = False


def _additive(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
