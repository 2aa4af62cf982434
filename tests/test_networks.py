"""The ten networks of the first issue, each combed, cut to half its MACs and proved.

Weights are random with the variance that keeps a signal alive, and norms, layer scales and running
statistics are random too: a zero-initialised scale would hide what goes wrong behind it. The proofs
here compare with networks zeroed by hand, not only with what `cpd.verify` says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cpd

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


@dataclass(frozen=True)
class Network:
    """How to build one, small and in full size, and the families that a plan for it must have.

    `families`: (kind, part of the group's name); `lossy`: those of plans without `exact` only.
    """

    make: Callable[..., nn.Module]
    size: int
    small: dict[str, Any]
    families: tuple[tuple[str, str], ...]
    lossy: tuple[tuple[str, str], ...] = ()


def _timm(name: str) -> Callable[..., nn.Module]:
    return lambda **options: timm.create_model(name, **options)


VIT = (("heads", "attn"), ("head dims", "attn"), ("channels", "mlp"))
NETWORKS = {
    "resnet50": Network(_timm("resnet50"), 64, {}, (("channels", "conv1"), ("channels", "layer1"))),
    "resnext50_32x4d": Network(
        _timm("resnext50_32x4d"),
        64,
        {},
        (("conv groups", "conv"), ("group channels", "conv"), ("channels", "conv1")),
    ),
    "mobilenetv2_100": Network(
        _timm("mobilenetv2_100"), 64, {}, (("channels", "conv_stem"), ("channels", "conv_pw"))
    ),
    "densenet121": Network(
        _timm("densenet121"), 64, {}, (("channels", "conv0"), ("channels", "conv2"))
    ),
    "efficientnet_b0": Network(
        _timm("efficientnet_b0"), 64, {}, (("channels", "conv_stem"), ("channels", "se"))
    ),
    "convnext_tiny": Network(
        _timm("convnext_tiny"), 64, {}, (("channels", "mlp"),), (("channels", "stem"),)
    ),
    "deit_small_patch16_224": Network(
        _timm("deit_small_patch16_224"),
        64,
        {"img_size": 64},
        VIT,
        (("channels", "patch_embed.proj"),),
    ),
    "swin_tiny_patch4_window7_224": Network(
        _timm("swin_tiny_patch4_window7_224"),
        112,
        {"img_size": 112},
        VIT,
        (("channels", "patch_embed"), ("channels", "downsample")),
    ),
    "vit_tiny_patch16_224": Network(
        _timm("vit_tiny_patch16_224"), 224, {}, VIT, (("channels", "patch_embed.proj"),)
    ),
    "vit_b_16": Network(
        lambda **options: torchvision.models.vit_b_16(**options),
        64,
        {"image_size": 64},
        (("heads", "self_attention"), ("head dims", "self_attention"), ("channels", "mlp")),
        (("channels", "conv_proj"),),
    ),
}


def _mini_torchvision() -> nn.Module:
    """The class of `vit_b_16` at a size that is quick to write to disk."""
    return torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=4, hidden_dim=128, mlp_dim=256
    )


MINI = Network(_mini_torchvision, 64, {}, NETWORKS["vit_b_16"].families)
ALL = {**NETWORKS, "mini_vit": MINI}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a value that matters to the output."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    def around_one(tensor: torch.Tensor) -> torch.Tensor:
        return torch.rand(tensor.shape, generator=generator) + 0.5

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rpartition(".")[2]
            if not tensor.is_floating_point():
                continue
            if leaf == "running_var" or (
                tensor.ndim == 1 and "bias" not in leaf and "mean" not in leaf
            ):
                tensor.copy_(around_one(tensor))  # norm weights, layer scales, variances
            elif tensor.ndim < 2 or leaf in (
                "pos_embed",
                "cls_token",
                "class_token",
                "pos_embedding",
            ):
                tensor.copy_(0.2 * noise(tensor))
            elif tensor.requires_grad:
                fan_in = max(tensor[0].numel(), 1)
                tensor.copy_(noise(tensor) * (1.4 / fan_in**0.5))
    return model


@dataclass
class Case:
    """One network, pruned once for all tests of it that run on one worker."""

    name: str
    network: Network
    exact: bool
    model: nn.Module
    before: Snapshot
    inputs: torch.Tensor
    groups: cpd.Groups
    plan: cpd.Plan
    small: nn.Module
    after: Snapshot


@dataclass
class Snapshot:
    """All that pruning must not change."""

    tensors: dict[str, torch.Tensor]
    training: dict[str, bool]
    needs_grad: dict[str, bool]
    hooks: int
    attributes: dict[str, str]
    random_state: torch.Tensor

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        modules = dict(model.named_modules())
        return cls(
            {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
            {name: module.training for name, module in modules.items()},
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules.values()),
            {
                f"{name}.{key}": repr(value)
                for name, module in modules.items()
                for key, value in vars(module).items()
                if isinstance(value, int | float | str | tuple | list)
            },
            torch.random.get_rng_state(),
        )


def prepare(name: str, *, exact: bool) -> Case:
    network = ALL[name]
    torch.manual_seed(0)
    model = randomise(network.make(**network.small)).double()
    model.train()  # as a user in the middle of training would have it
    inputs = torch.randn(1, 3, network.size, network.size, dtype=torch.float64)
    before = Snapshot.of(model)
    groups = cpd.comb(model, inputs, exact=exact)
    scores = cpd.importance.score("random", model, groups)
    plan = cpd.choose(groups, scores, target="macs=0.5")
    small = cpd.cut(model, plan, verify=False)
    return Case(
        name, network, exact, model, before, inputs, groups, plan, small, Snapshot.of(model)
    )


@pytest.fixture(scope="module", params=NETWORKS)
def exact(request: pytest.FixtureRequest) -> Case:
    return prepare(request.param, exact=True)


@pytest.fixture(scope="module", params=NETWORKS)
def lossy(request: pytest.FixtureRequest) -> Case:
    return prepare(request.param, exact=False)


def zeroed(case: Case) -> nn.Module:
    """Return the original with everything that the plan removes at zero."""
    model = copy.deepcopy(case.model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, mask in case.plan.masks().items():
            if name in state:
                state[name].mul_(mask)
    return model


def run(model: nn.Module, inputs: torch.Tensor, *, training: bool = False) -> torch.Tensor:
    model.train(training)
    with torch.no_grad():
        return model(inputs)


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    assert torch.isfinite(wanted).all(), "the reference itself is not finite: it proves nothing"
    return float((got - wanted).abs().max() / wanted.abs().max())


def kept(case: Case) -> str:
    """Return the groups and what is kept with its reason, for the message of a failed assertion."""
    return f"{case.name}, exact={case.exact}\n{case.plan}\n{case.groups}"


def counted_macs(model: nn.Module, inputs: torch.Tensor) -> int:
    """Return the MACs that PyTorch's own counter sees, with attention as two matrix products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def check_structure(case: Case) -> None:
    """What holds for every cut, exact or not."""
    assert type(case.small) is type(case.model)
    assert list(case.small.state_dict()) == list(case.model.state_dict())
    for name, tensor in case.small.state_dict().items():
        assert tuple(tensor.shape) == case.plan.new_shape(name), name
        assert tensor.dtype == case.model.state_dict()[name].dtype, name
    for (path, old), (also, new) in zip(
        case.model.named_modules(), case.small.named_modules(), strict=True
    ):
        assert (path, old.training) == (also, new.training)
        assert isinstance(new, type(old)), path

    before, after = case.plan.costs["params"]
    assert before == sum(p.numel() for p in case.model.parameters())
    assert after == sum(p.numel() for p in case.small.parameters())
    before, after = case.plan.costs["macs"]
    assert before == counted_macs(copy.deepcopy(case.model), case.inputs)
    assert after == counted_macs(copy.deepcopy(case.small), case.inputs)
    assert 0.45 * before < after <= 0.5 * before, kept(case)


def check_untouched(case: Case) -> None:
    before, after = case.before, case.after
    assert list(before.tensors) == list(after.tensors)
    for name, tensor in before.tensors.items():
        assert torch.equal(tensor, after.tensors[name]), name
    assert before.training == after.training
    assert before.needs_grad == after.needs_grad
    assert before.hooks == after.hooks
    assert before.attributes == after.attributes
    assert torch.equal(before.random_state, after.random_state)


def check_families(case: Case, wanted: tuple[tuple[str, str], ...]) -> None:
    for kind, part in wanted:
        found = [w for w in case.plan.widths if w.family == kind and part in w.group]
        assert found, f"no {kind} in a group named like {part!r}:\n{kept(case)}"
        narrower = [w for w in found if w.after < w.before]
        assert narrower, f"{kind} of {part!r} stay as they are:\n{kept(case)}"


# --- exact: cutting equals zeroing ---------------------------------------------------------------


def test_exact_cut_equals_the_zeroed_network(exact: Case) -> None:
    big, small = zeroed(exact), copy.deepcopy(exact.small)
    wanted = run(big, exact.inputs)
    assert difference(run(small, exact.inputs), wanted) <= 1e-9, kept(exact)

    # The proof is worth something: the output depends on the input and on what was removed.
    assert difference(run(big, exact.inputs.flip(-1).roll(7, -2)), wanted) > 1e-3
    assert difference(run(copy.deepcopy(exact.model), exact.inputs), wanted) > 1e-3

    proof = cpd.verify(exact.model, exact.small, exact.plan)
    assert proof, str(proof)
    assert proof.mode == "exact"
    assert proof.max_error <= 1e-9


def test_exact_cut_trains_as_the_zeroed_network(exact: Case) -> None:
    """In training mode too, with batch statistics, as far as nothing is drawn at random."""
    big, small = zeroed(exact), copy.deepcopy(exact.small)
    for model in (big, small):
        for module in model.modules():
            if "drop_prob" in vars(module):
                module.drop_prob = 0.0
    inputs = torch.randn(4, *exact.inputs.shape[1:], dtype=torch.float64)
    got, wanted = run(small, inputs, training=True), run(big, inputs, training=True)
    assert difference(got, wanted) <= 1e-8, kept(exact)


def test_exact_cut_is_what_the_plan_says(exact: Case) -> None:
    check_structure(exact)
    check_untouched(exact)
    check_families(exact, exact.network.families)


# --- not exact: against a reference with statistics over kept channels ---------------------------


def test_cut_is_verified(lossy: Case) -> None:
    proof = cpd.verify(lossy.model, lossy.small, lossy.plan)
    assert proof, f"{proof}\n{kept(lossy)}"
    assert proof.mode == "masked statistics"
    assert proof.max_error <= 1e-9
    torch.manual_seed(1)
    fresh = torch.randn(2, *lossy.inputs.shape[1:], dtype=torch.float64)
    again = cpd.verify(lossy.model, lossy.small, lossy.plan, fresh)
    assert again, f"inputs that the network was not traced with: {again}"


def test_cut_is_what_the_plan_says(lossy: Case) -> None:
    check_structure(lossy)
    check_untouched(lossy)
    check_families(lossy, (*lossy.network.families, *lossy.network.lossy))


def test_cut_trains_one_step(lossy: Case) -> None:
    small = copy.deepcopy(lossy.small).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    inputs = torch.randn(2, *lossy.inputs.shape[1:], dtype=torch.float64)
    labels = torch.tensor([1, 2])
    old = {name: parameter.detach().clone() for name, parameter in small.named_parameters()}
    loss = nn.functional.cross_entropy(small(inputs), labels)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape, name
        assert torch.isfinite(parameter.grad).all(), name
    changed = [name for name, p in small.named_parameters() if not torch.equal(p, old[name])]
    assert len(changed) > 0.9 * len(old), sorted(set(old) - set(changed))
    with torch.no_grad():
        assert torch.isfinite(small(inputs)).all()


def test_cut_takes_any_batch(lossy: Case) -> None:
    small = copy.deepcopy(lossy.small)
    inputs = torch.randn(3, *lossy.inputs.shape[1:], dtype=torch.float64)
    together = run(small, inputs)
    alone = torch.cat([run(small, one[None]) for one in inputs])
    assert together.shape == (3, 1000)
    assert difference(together, alone) <= 1e-9


# --- artefacts and defaults ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenetv2_100", "swin_tiny_patch4_window7_224", "mini_vit"])
def test_saved_and_loaded_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    case = prepare(name, exact=False)
    cpd.save(case.small, case.plan, tmp_path / "out")
    other = case.network.make(**case.network.small).double()
    loaded = cpd.load(tmp_path / "out", other)
    assert type(loaded) is type(case.model)
    state = case.small.state_dict()
    assert list(loaded.state_dict()) == list(state)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert torch.equal(run(loaded, case.inputs), run(copy.deepcopy(case.small), case.inputs))
    assert cpd.Plan.from_json(case.plan.to_json()).to_json() == case.plan.to_json()


@pytest.mark.parametrize("name", ["mobilenetv2_100", "deit_small_patch16_224", "mini_vit"])
@pytest.mark.parametrize("how", ["exact", "lossy"])
def test_prune_in_float32_proves_itself(name: str, how: str) -> None:
    """What a user writes: single precision, `cpd.prune`, with the proof that `cut` asks for."""
    network = ALL[name]
    model = randomise(network.make(**network.small))
    inputs = torch.randn(1, 3, network.size, network.size)
    small, plan = cpd.prune(
        model, inputs, importance="random", target="macs=0.5", exact=how == "exact"
    )
    assert plan.costs["macs"][1] <= 0.5 * plan.costs["macs"][0]
    assert run(small, inputs).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exact", "lossy"])
@pytest.mark.parametrize("name", NETWORKS)
def test_full_size(name: str, how: str) -> None:
    """As their authors publish them, at 224 pixels."""
    model = randomise(NETWORKS[name].make()).double().eval()
    inputs = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    groups = cpd.comb(model, inputs, exact=how == "exact")
    scores = cpd.importance.score("random", model, groups)
    plan = cpd.choose(groups, scores, target="macs=0.5")
    small = cpd.cut(model, plan, verify=False)
    proof = cpd.verify(model, small, plan)
    assert proof, f"{proof}\n{plan}\n{groups}"
    assert plan.costs["macs"] == (counted_macs(model, inputs), counted_macs(small, inputs))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "mobilenetv2_100"])
def test_macs_at_full_size_are_those_counted(name: str) -> None:
    model = NETWORKS[name].make().eval()
    inputs = torch.randn(1, 3, 224, 224)
    assert cpd.costs.macs(model, inputs) == counted_macs(model, inputs)
