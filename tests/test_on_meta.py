"""Runs on the meta device: shapes as real runs have them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import nn

from cpd.on_meta import OnMeta


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv2_050", "vit_tiny_patch16_224", "convnext_atto", "swin_s3_tiny_224"],
)
def test_what_is_known_is_what_is_computed(name: str) -> None:
    """The second run, which knows all operators, puts out what the first does, and PyTorch without
    the mode; shapes are also those of a real run.
    """
    model = timm.create_model(name).eval()
    meta = timm.create_model(name).eval().to("meta")
    x = torch.randn(2, 3, 224, 224)
    mode = OnMeta()
    real, plain = _seen(model, x, nullcontext()), _seen(meta, x.to("meta"), nullcontext())
    assert [shape for shape, _, _ in real] == [shape for shape, _, _ in plain]
    for _ in range(2):
        assert _seen(meta, x.to("meta"), mode) == plain


def _seen(model: nn.Module, x: torch.Tensor, mode: AbstractContextManager[Any]) -> list[Any]:
    """Return the form of what each layer puts out."""
    seen: list[Any] = []

    def note(_: nn.Module, __: object, out: torch.Tensor) -> None:
        seen.append((out.shape, out.stride(), out.dtype))

    layers = [module for module in model.modules() if not list(module.children())]
    handles = [module.register_forward_hook(note) for module in layers]
    with torch.no_grad(), mode:
        model(x)
    for handle in handles:
        handle.remove()
    return seen


class _Elsewhere(nn.Module):
    """Asks for the processor, and holds what it computed once there."""

    def __init__(self) -> None:
        super().__init__()
        self.held = torch.arange(4.0)
        self.linear = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.zeros(4, device="cpu") + torch.tensor([1.0, 2.0, 3.0, 4.0]) * self.held
        self.held.add_(1)
        return self.linear(x).to("cpu").split([2, 4], 1)[1].t()


def test_code_may_ask_for_other_devices() -> None:
    """All of it is computed on the meta device, and nothing that it holds is changed."""
    module = _Elsewhere()
    held = module.held.clone()
    module.linear.to("meta")
    with torch.no_grad():
        for mode in (OnMeta(),) * 2:
            with mode:
                out = module(torch.zeros(3, 4, device="meta"))
            assert out.is_meta
            assert out.shape == (4, 3)
            assert out.stride() == (1, 6)
    assert torch.equal(module.held, held)


def test_an_error_stays_one() -> None:
    """What cannot be computed is not known the next time either."""
    mode = OnMeta()
    for _ in range(2):
        with mode, pytest.raises(RuntimeError):
            torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_values_that_differ_are_not_taken_for_one_another() -> None:
    """`True`, 1 and 1.0 are equal in Python."""
    mode = OnMeta()
    x = torch.empty(2, dtype=torch.int64, device="meta")
    with mode:
        kinds = [(x + value).dtype for value in (1, 1.0, True, 1)]
    assert kinds == [torch.int64, torch.float32, torch.int64, torch.int64]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_what_is_sampled_has_the_form_of_a_real_run(memory: torch.memory_format) -> None:
    """Not computed the way that PyTorch computes it on the meta device; wrong grids still raise."""
    x = torch.randn(2, 3, 5, 6).to(memory_format=memory)
    grid = torch.rand(2, 4, 7, 2)
    real = nn.functional.grid_sample(x, grid, align_corners=False)
    with OnMeta():
        made = nn.functional.grid_sample(x.to("meta"), grid.to("meta"), align_corners=False)
        assert (made.shape, made.stride(), made.dtype) == (real.shape, real.stride(), real.dtype)
        for wrong in (grid[:1], grid[..., :1]):
            with pytest.raises((RuntimeError, AssertionError)):
                nn.functional.grid_sample(x.to("meta"), wrong.to("meta"), align_corners=False)


def test_products_have_the_form_of_a_real_run() -> None:
    """A bias of one row or of all, and what does not fit."""
    left, right = torch.randn(4, 3), torch.randn(5, 3).t()
    for bias in (torch.randn(5), torch.randn(4, 5), torch.randn(1)):
        real = torch.addmm(bias, left, right)
        with OnMeta():
            made = torch.addmm(bias.to("meta"), left.to("meta"), right.to("meta"))
        assert (made.shape, made.stride(), made.dtype) == (real.shape, real.stride(), real.dtype)
    for width, other in ((5, right[:2]), (4, right)):
        with OnMeta(), pytest.raises(RuntimeError):
            torch.addmm(torch.zeros(width, device="meta"), left.to("meta"), other.to("meta"))


class _Strided(nn.Module):
    """Reads numbers from a tensor that it holds, and would write into it."""

    def __init__(self) -> None:
        super().__init__()
        self.strides = torch.tensor([8.0, 16.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.strides.mul_(2)
        numbers = [float(stride) for stride in self.strides.unbind()]
        return x.new_full((int(numbers[0]), 2), self.strides[1])


def test_a_constant_has_a_value_and_keeps_it() -> None:
    model = _Strided()
    with torch.no_grad(), OnMeta():
        out = model(torch.empty(2, device="meta"))
    assert out.is_meta
    assert out.shape == (8, 2)
    assert model.strides.tolist() == [8.0, 16.0]
