"""Cutting: the class, the names, the ties and the settings of what is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cpd
from cpd.errors import PlanMismatch
from laws import random_scores, randomised


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.c.weight = self.b.weight
        self.out, self.also = nn.Linear(8, 3), None
        self.alias = self.b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        return self.out(self.c(x + self.b(x)) + self.alias(x))


X = torch.randn(3, 4)


def test_ties_and_aliases_stay() -> None:
    model = Tied()
    small, plan = cpd.prune(model, X, target="params=0.5", min_keep=0)
    assert small.c.weight is small.b.weight
    assert small.alias is small.b
    assert small.c.weight is not model.c.weight
    assert isinstance(small, Tied)
    assert list(small.state_dict()) == list(model.state_dict())
    assert cpd.costs.params(small) == plan.costs["params"][1]
    assert small.b.in_features == small.b.weight.shape[1] < 8


def test_settings_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[0].weight.requires_grad_(False)
    model.train()
    model[1].eval()
    model[0].bias.grad = torch.ones(8)
    small, _ = cpd.prune(model, X, target="params=0.6")
    assert not small[0].weight.requires_grad
    assert small[0].bias.requires_grad
    assert [m.training for m in small] == [True, False, True]
    assert small[0].bias.grad is None
    assert torch.equal(model[0].bias.grad, torch.ones(8))
    assert small[1].num_features == small[0].out_features == small[2].in_features
    assert small[1].running_mean.shape == small[1].weight.shape


def test_what_stays_is_a_copy() -> None:
    """Also tensors that keep their size share nothing with the model."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    small, _ = cpd.prune(model, X, target="params=0.6")
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in small.parameters()}


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Conv1d(6, 8, 3, groups=2), {"in_channels", "out_channels"}),
        (nn.ConvTranspose1d(6, 8, 3, groups=2), {"in_channels", "out_channels"}),
        (nn.GroupNorm(3, 6), {"num_channels"}),
        (nn.PReLU(6), {"num_parameters"}),
        (nn.InstanceNorm1d(6, affine=True), {"num_features"}),
    ],
)
def test_layers_know_their_sizes(layer: nn.Module, sizes: set[str]) -> None:
    out = layer(torch.randn(2, 6, 9)).shape[1]
    model = randomised(nn.Sequential(nn.Conv1d(4, 6, 1), layer, nn.Conv1d(out, 3, 1)))
    small, _ = cpd.prune(model, torch.randn(2, 4, 9).double(), target="params=0.5", min_keep=0)
    fresh = {name: getattr(small[1], name) for name in sizes}
    assert any(fresh[name] < getattr(layer, name) for name in sizes)
    if isinstance(layer, nn.modules.conv._ConvNd):
        twin = type(layer)(**fresh, kernel_size=3, groups=small[1].groups)
        assert twin.weight.shape == small[1].weight.shape
        assert (small[0].out_channels, small[2].in_channels) == tuple(
            fresh[k] for k in ("in_channels", "out_channels")
        )
    else:
        assert set(fresh.values()) == {small[1].weight.shape[0]}


def test_another_model_is_refused() -> None:
    groups = cpd.comb(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), X)
    plan = cpd.choose(groups, random_scores(groups, 0), "params=0.5")
    other = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3))
    text = r"not for this Sequential: 3 tensors differ; 0\.weight is \(9, 4\) here"
    with pytest.raises(PlanMismatch, match=text):
        cpd.cut(other, plan)
    with pytest.raises(PlanMismatch, match=text):
        cpd.mask(other, plan)
    with pytest.raises(PlanMismatch, match=r"1 tensors differ; 1\.bias is None here"):
        cpd.cut(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3, bias=False)), plan)
