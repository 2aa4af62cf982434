"""Torch-Pruning on the same networks, set up as its own examples do.

The classifier is ignored, timm's attention runs unfused with its `qkv` in `num_heads`, and the
sizes that its modules hold are put right afterwards. A ratio is searched that leaves the MACs
wanted. "isomorphic" is its option of that name, with global ranking and at most 90 % of a layer.
Its Hessian keeps only the last sample's gradient (`accumulate_grad` of 1.6.1); that is left as it
is.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .. import networks as counted
from .networks import CLASSES, INPUTS
from .training import Samples

TRIES, NEAR = 9, 0.005
IMPORTANCES = {
    "magnitude": "GroupMagnitudeImportance",
    "taylor": "GroupTaylorImportance",
    "hessian": "GroupHessianImportance",
}


def gradients(importance: str, model: nn.Module, samples: Samples) -> dict[str, torch.Tensor]:
    """What the importance reads from `.grad`, by the names of parameters."""
    import torch_pruning as tp

    model = copy.deepcopy(model).eval()
    if importance == "magnitude":
        return {}
    if importance == "taylor":
        for images, labels in samples.batches(8):
            F.cross_entropy(model(images), labels).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    scorer = tp.importance.GroupHessianImportance()
    ((images, labels),) = samples.batches(1)
    for loss in F.cross_entropy(model(images), labels, reduction="none"):
        model.zero_grad()
        loss.backward(retain_graph=True)
        scorer.accumulate_grad(model)
    held = {p: scorer._accu_grad[p] / scorer._counter[p] for p in scorer._accu_grad}
    return {name: held[p] for name, p in model.named_parameters() if p in held}


def pruned(
    importance: str,
    ranking: str,
    model: nn.Module,
    found: dict[str, torch.Tensor],
    target: float,
) -> nn.Module:
    """Return the network whose MACs are nearest to the target, of at most `TRIES` ratios."""
    whole = counted.macs(model, INPUTS)
    low, high, ratio = 0.0, 1.0, 1 - target**0.5
    best, off = None, float("inf")
    for _ in range(TRIES):
        try:
            small = _once(importance, ranking, model, found, ratio)
            share = counted.macs(small, INPUTS) / whole
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
            high = ratio  # a layer has vanished
        else:
            if abs(share - target) < off:
                best, off = small, abs(share - target)
            if off <= NEAR * target:
                break
            low, high = (ratio, high) if share > target else (low, ratio)
        ratio = (low + high) / 2
    if best is None:
        raise RuntimeError("no ratio leaves a network that runs")
    return best


def _once(
    importance: str,
    ranking: str,
    model: nn.Module,
    found: dict[str, torch.Tensor],
    ratio: float,
) -> nn.Module:
    import torch_pruning as tp

    small = copy.deepcopy(model).eval()
    for name, parameter in small.named_parameters():
        parameter.grad = found[name].clone() if name in found else None
    heads = {m.qkv: m.num_heads for m in small.modules() if hasattr(m, "qkv")}
    last = [m for m in small.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES]
    options: dict[str, Any] = {}
    if ranking == "isomorphic":
        options = {"global_pruning": True, "isomorphic": True, "max_pruning_ratio": 0.9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.MetaPruner(
            small,
            INPUTS,
            importance=getattr(tp.importance, IMPORTANCES[importance])(),
            pruning_ratio=ratio,
            num_heads=heads,
            ignored_layers=last,
            in_channel_groups={},
            out_channel_groups={},
            **options,
        )
        pruner.step()
    for module in small.modules():
        if hasattr(module, "num_heads") and hasattr(module, "qkv"):
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
    small.zero_grad(set_to_none=True)
    return small
