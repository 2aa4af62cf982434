"""One round of Torch-Pruning, set up for these networks as its own examples do.

The classifier is ignored; timm's attention runs unfused, its `qkv` is listed in `num_heads`, and
the sizes that its modules hold are put right afterwards; torchvision's transformer gets
`round_to=num_heads`. One ratio for all layers (`MetaPruner`'s default), searched so that about half
of the MACs stay.
"""

from __future__ import annotations

import copy
import os
import warnings
from time import perf_counter
from typing import Any

os.environ["TIMM_FUSED_ATTN"] = "0"  # before timm is imported

import torch
import torch_pruning as tp
from torch import nn

from .networks import difference, macs, make

warnings.simplefilter("ignore")
NEAR, TRIES, FIRST = 0.02, 6, 0.3


class Tool:
    """A network, ready to be pruned as often as asked."""

    def __init__(self, name: str) -> None:
        self.model, self.inputs = make(name)
        self.ratio = FIRST

    def warm_up(self) -> dict[str, Any]:
        """Search the ratio, and check what one round leaves."""
        result: dict[str, Any] = {"first": self.round(), "runs": True, "equal": None}
        try:
            self.ratio, result["macs"] = self._searched()
        except Exception as error:  # noqa: BLE001 - whatever the pruned network raises is the finding
            text = " ".join(str(error).split())
            result |= {"runs": False, "failure": f"{type(error).__name__}: {text}"[:200]}
            return result | {"ratio": self.ratio, "how": "does not run"}
        return result | {"ratio": self.ratio} | self._compared()

    def round(self) -> dict[str, float]:
        """Return seconds of the graph alone, of the pruner (it builds its own) and of its step."""
        model = copy.deepcopy(self.model)
        start = perf_counter()
        tp.DependencyGraph().build_dependency(model, self.inputs)
        built = perf_counter() - start
        model = copy.deepcopy(self.model)
        start = perf_counter()
        pruner = self._pruner(model)
        constructed = perf_counter() - start
        pruner.step()
        total = perf_counter() - start
        return {"build": built, "construct": constructed, "step": total - constructed}

    def _pruner(self, model: nn.Module) -> Any:
        heads, classifier, round_to = {}, [], None
        classes = _last_linear(model).out_features
        for module in model.modules():
            if hasattr(module, "num_heads") and hasattr(module, "qkv"):
                heads[module.qkv] = module.num_heads
            elif isinstance(module, nn.MultiheadAttention):
                round_to = module.num_heads
            elif isinstance(module, nn.Linear) and module.out_features == classes:
                classifier.append(module)
        return tp.pruner.MetaPruner(
            model,
            self.inputs,
            importance=tp.importance.RandomImportance(),
            pruning_ratio=self.ratio,
            num_heads=heads,
            round_to=round_to,
            ignored_layers=classifier,
        )

    def _pruned(self) -> tuple[nn.Module, dict[str, list[int]]]:
        """Return a pruned copy, and which outputs of the original's modules are gone."""
        torch.manual_seed(0)
        model = copy.deepcopy(self.model)
        names = {module: name for name, module in model.named_modules()}
        left: dict[str, list[int]] = {}
        gone: dict[str, list[int]] = {}
        pruner = self._pruner(model)
        for group in pruner.step(interactive=True):
            for dependency, indices in group:
                module = dependency.target.module
                if module in names and dependency.handler.__name__ == "prune_out_channels":
                    name = names[module]
                    now = left.setdefault(name, list(range(pruner.DG.get_out_channels(module))))
                    away = {now[k] for k in indices}
                    gone.setdefault(name, []).extend(sorted(away))
                    left[name] = [k for k in now if k not in away]
            group.prune()
        for module in model.modules():
            if hasattr(module, "num_heads") and hasattr(module, "qkv"):
                module.num_heads = pruner.num_heads[module.qkv]
                module.head_dim = module.qkv.out_features // (3 * module.num_heads)
                module.attn_dim = module.num_heads * module.head_dim
        if hasattr(model, "hidden_dim") and hasattr(model, "conv_proj"):
            model.hidden_dim = model.conv_proj.out_channels
        return model.eval(), gone

    def _searched(self) -> tuple[float, float]:
        """Return the ratio that leaves about half of the MACs, and the share that it leaves."""
        before, low, high = macs(self.model, self.inputs), 0.0, 0.8
        best = (self.ratio, float("inf"))
        for _ in range(TRIES):
            share = macs(self._pruned()[0], self.inputs) / before
            if abs(share - 0.5) < abs(best[1] - 0.5):
                best = (self.ratio, share)
            if abs(share - 0.5) <= NEAR:
                break
            low, high = (self.ratio, high) if share > 0.5 else (low, self.ratio)
            self.ratio = (low + high) / 2
        return best

    def _compared(self) -> dict[str, Any]:
        """Compare with the original in which the same outputs are zero, in float64."""
        if any(isinstance(m, nn.LayerNorm | nn.GroupNorm) for m in self.model.modules()):
            return {"how": "not checked (norms across channels)"}
        small, gone = self._pruned()
        big = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, indices in gone.items():
                module = big.get_submodule(name)
                for parameter in module.parameters(recurse=False):
                    parameter[indices] = 0
            inputs = self.inputs.double()
            error = difference(small.double()(inputs), big.double()(inputs))
        return {"equal": error <= 1e-9, "difference": error, "how": "zeroed network, float64"}


def _last_linear(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


torch.set_num_threads(1)
