"""Costs: counted by hand, predicted, counted again."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cpd
from cpd.errors import InputError
from cpd.trace import named_tensors, trace
from laws import random_plans, random_scores


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 24), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, 8))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bni,io->bno", x @ x.transpose(1, 2) @ x, self.w)


CASES = [
    (nn.Linear(5, 7), (3, 5), 35),
    (nn.Linear(5, 7), (3, 4, 5), 4 * 35),
    (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 6), 36 * 3 * 8 * 9),
    (nn.Conv2d(3, 8, 3, stride=2), (2, 3, 7, 7), 9 * 3 * 8 * 9),
    (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 5), 9 * 3 * 8 * 9),
    (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5), 9 * 6 * 9),
    (nn.ConvTranspose2d(6, 4, 2, 2), (2, 6, 5, 5), 25 * 6 * 4 * 4),
    (nn.ConvTranspose2d(6, 4, 2, 2, groups=2), (2, 6, 5, 5), 25 * 6 * 2 * 4),
    (nn.Conv1d(3, 4, 2), (2, 3, 6), 5 * 3 * 4 * 2),
    (Attention(), (2, 5, 6), 5 * 6 * 24 + 2 * (2 * 5 * 5 * 4) + 5 * 8 * 6),
    (Product(), (2, 3, 5), 3 * 3 * 5 + 3 * 3 * 5 + 3 * 5 * 7),
    (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)), (2, 3, 6, 6), 0),
]


@pytest.mark.parametrize(("model", "shape", "macs"), CASES)
def test_macs_by_hand(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    model = model.eval()
    assert cpd.costs.macs(model, torch.randn(shape)) == macs
    one = (1, *shape[1:])
    assert cpd.costs.macs(model, torch.randn(one)) == macs  # of one sample, whatever the batch


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert cpd.costs.params(model) == 40
    model[1].weight = model[0].weight
    assert cpd.costs.params(model) == 24


@pytest.mark.parametrize(("model", "shape", "macs"), CASES)
def test_predicted_is_counted(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    x = torch.randn(shape)
    whole = nn.Sequential(model.eval(), nn.Flatten(), nn.LazyLinear(5), nn.Linear(5, 2))
    whole(x)
    groups = cpd.comb(whole, x)
    everything = groups.everything()
    assert groups.cost("macs", everything) == cpd.costs.macs(whole, x)
    assert groups.cost("params", everything) == cpd.costs.params(whole)
    for plan in random_plans(groups, 3):
        small = cpd.cut(whole, plan)
        assert plan.costs["macs"] == (cpd.costs.macs(whole, x), cpd.costs.macs(small, x))
        assert plan.costs["params"] == (cpd.costs.params(whole), cpd.costs.params(small))


def test_wrong_inputs() -> None:
    with pytest.raises(InputError, match="Linear does not run on these example inputs"):
        cpd.costs.macs(nn.Linear(4, 2), torch.randn(2, 5))


# --- memory --------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive, seen by weak references to them; the peak of it."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in held:
            self.see(tensor)

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.lose, key)

    def lose(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out


def measured_peak(model: nn.Module, x: torch.Tensor) -> int:
    """Run a network's graph, let go of each tensor after its last use, and watch what is alive."""
    found = trace(model, x)
    held = dict(named_tensors(model))
    names = [node.name for node in found.graph.nodes if node.op == "placeholder"]
    values = [held[found.tensors[n]].detach() if n in found.tensors else x for n in names]
    live = Live([x, *(tensor.detach() for tensor in held.values())])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # kernels of attention keep sums for each thread
    try:
        with torch.no_grad(), live:
            fx.Interpreter(nn.Module(), graph=found.graph).run(*values, enable_io_processing=False)
    finally:
        torch.set_num_threads(threads)
    return live.peak


class Fork(nn.Module):
    """A wide tensor that waits for its last reader while others come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 64), nn.Linear(64, 4)
        self.back, self.head = nn.Linear(4, 64), nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.wide(x)
        return self.head(y + self.back(self.narrow(y).relu()))


def test_memory_by_hand() -> None:
    """The peak is at the sum: the input, what waits, what is added to it, and the sum itself."""
    model, x = Fork(), torch.randn(10, 8)
    weights = 4 * cpd.costs.params(model)
    assert cpd.costs.memory(model, x) == weights + 4 * 10 * (8 + 64 + 64 + 64)
    inplace = nn.Sequential(nn.Linear(8, 64), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2))
    weights = 4 * cpd.costs.params(inplace)
    assert cpd.costs.memory(inplace, x) == weights + 4 * 10 * (8 + 64 + 2)
    assert cpd.costs.memory(inplace.half(), x.half()) == weights // 2 + 2 * 10 * (8 + 64 + 2)


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name == "fork":
        return Fork(), torch.randn(10, 8)
    if name == "attention":
        return nn.Sequential(Attention(), nn.Linear(6, 3)), torch.randn(8, 64, 6)
    if name == "vit":
        vit: nn.Module = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=48, num_heads=3
        )
        return vit.eval(), torch.randn(4, 3, 32, 32)
    return torchvision.models.get_model(name).eval(), torch.randn(2, 3, 64, 64)


# Kernels note a little that nothing reads: attention a sum for each row, norms a mean and a scale.
SLACK = {"attention": 1.1, "vit": 1.05}


def agree(model: nn.Module, x: torch.Tensor, counted: int, slack: float) -> None:
    """Compare what is held beside the weights: these are the same in both, and many."""
    weights = sum(tensor.nbytes for _, tensor in named_tensors(model))
    assert counted - weights <= measured_peak(model, x) - weights <= slack * (counted - weights)


@pytest.mark.parametrize("name", ["fork", "attention", "vit", "resnet18", "mobilenet_v2"])
def test_memory_is_the_measured_peak(name: str) -> None:
    model, x = network(name)
    agree(model, x, cpd.costs.memory(model, x), SLACK.get(name, 1.001))


@pytest.mark.parametrize("name", ["fork", "attention", "vit", "resnet18"])
def test_predicted_memory_is_counted_and_measured(name: str) -> None:
    model, x = network(name)
    groups = cpd.comb(model, x)
    before = cpd.costs.memory(model, x)
    for seed, share in enumerate((0.9, 0.7)):
        plan = cpd.choose(groups, random_scores(groups, seed), {"memory": share}, min_keep=0)
        small = cpd.cut(model, plan, verify=False)
        assert plan.costs["memory"] == (before, cpd.costs.memory(small, x))
        assert plan.costs["memory"][1] <= share * before
        agree(small, x, plan.costs["memory"][1], SLACK.get(name, 1.001))
