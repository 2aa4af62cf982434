"""Costs: counted by hand, predicted, counted again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd.errors import InputError
from laws import random_plans


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
