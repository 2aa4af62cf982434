"""Depth: residual branches that go whole, proved like everything else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cpd
from cpd.drop import CLONE
from cpd.plan import Plan
from cpd.planning import alive_of
from laws import TIGHT, difference, random_scores, run, zeroed


class Block(nn.Module):
    """x + f(x), written in one of several ways."""

    def __init__(self, width: int = 8, hidden: int = 12, how: str = "plain") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.how = how
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: PLR0911 - one for each way
        y = self.down(F.relu(self.up(self.norm(x)))) * self.scale
        match self.how:
            case "plain":
                return x + y
            case "other side":
                return y + x
            case "into the branch":
                y += x
                return y
            case "into the input":
                x += y
                return x
            case "twice":
                return x + y + F.relu(self.up(self.norm(x))).mean()
            case "not zero":
                return x + torch.sigmoid(y)
            case "of another":
                return x.flip(0) + y
            case "scaled":
                return torch.add(x, y, alpha=2)
        raise AssertionError(self.how)


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x).relu()))


X = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))


def without(groups: cpd.Groups, *names: str, **options: Any) -> Plan:
    """Choose a plan that takes these branches first: what is in them scores least."""
    scores = random_scores(groups, 0)
    classes = {b.name: set(b.inside.tolist()) for b in groups.branches}
    for group in groups:
        for name in names:
            inside = torch.tensor([c in classes[name] for c in group.classes.tolist()])
            scores[group.name][inside] *= 1e-6
    target = options.pop("target", "params=0.7")
    return cpd.choose(groups, scores, target, **{"min_keep": 0, **options})


def proved(model: nn.Module, plan: Plan, x: Any) -> nn.Module:
    """Cut; hold the result to the laws that every plan obeys."""
    state = copy.deepcopy(model.state_dict())
    small = cpd.cut(model, plan, verify=False)
    proof = cpd.verify(model, small, plan, x)
    assert proof, proof
    assert proof.max_error <= TIGHT
    assert cpd.costs.params(small) == plan.costs["params"][1]
    assert cpd.costs.macs(small, x) == plan.costs["macs"][1]
    groups = plan.groups
    assert groups is not None
    assert cpd.costs.memory(small, x) == groups.cost("memory", alive_of(groups, plan))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    other = cpd.cut(model, again, verify=False)
    assert difference(run(other, x), run(small, x)) == 0
    assert difference(run(copy.deepcopy(small), x), run(small, x)) == 0
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert set(small.state_dict()) == set(state) - plan.gone
    return small


@pytest.mark.parametrize("how", ["plain", "other side", "into the branch", "into the input"])
def test_a_branch_goes_whole(how: str) -> None:
    model = Net(Block(), Block(how=how), Block()).eval()
    groups = cpd.comb(model, X, depth=True, exact=True)
    assert [b.name for b in groups.branches] == [f"blocks.{k}:1" for k in range(3)]
    assert not groups.kept_branches
    plan = without(groups, "blocks.1:1")
    assert list(plan.branches) == ["blocks.1:1"]
    assert plan.gone == {n for n in model.state_dict() if n.startswith("blocks.1.")}
    small = proved(model, plan, X)
    assert isinstance(small.blocks[1].up, nn.Identity)
    assert small.blocks[1].scale is None
    twin = zeroed(model, plan)
    for mode in (False, True):
        x = torch.randn(3, 2, 5)
        assert difference(run(small.train(mode), x), run(twin.train(mode), x)) <= TIGHT
    assert "2 residual branches" not in str(groups)
    assert "3 residual branches may go whole: blocks.0:1" in str(groups)


def test_what_is_left_is_copied_only_where_it_must_be() -> None:
    for how, copies in (("plain", True), ("into the branch", True), ("into the input", False)):
        model = Net(Block(how=how), Block()).eval()
        plan = without(cpd.comb(model, X, depth=True), "blocks.0:1", target="params=0.55")
        calls = [call["op"] for call in plan.forwards["blocks.0"].graphs["eval"]]
        assert (CLONE in calls) == copies
        assert "child" not in calls


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("twice", "used elsewhere"),
        ("not zero", "not zero where its tensors are: sigmoid in blocks.0"),
    ],
)
def test_a_branch_that_cannot_go_is_listed(how: str, why: str) -> None:
    groups = cpd.comb(Net(Block(how=how), Block()).eval(), X, depth=True)
    assert [b.name for b in groups.branches] == ["blocks.1:1"]
    assert [w.name for w in groups.kept_branches] == ["blocks.0:1"]
    assert why in groups.kept_branches[0].reason
    assert why in str(groups)


@pytest.mark.parametrize("how", ["of another", "scaled"])
def test_what_is_no_residual_branch(how: str) -> None:
    groups = cpd.comb(Net(Block(how=how), Block()).eval(), X, depth=True)
    assert [b.name for b in groups.branches] == ["blocks.1:1"]


def test_a_branch_that_writes_into_its_input_stays() -> None:
    class Writes(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.dropout(x, 0.5, training=False)  # the same storage
            return x + self.down(F.relu(self.up(y.relu_())))

    groups = cpd.comb(Net(Writes(), Block()).eval(), X, depth=True)
    assert [b.name for b in groups.branches] == ["blocks.1:1"]


def test_what_the_user_keeps_stays() -> None:
    model = Net(Block(), Block(), Block()).eval()
    groups = cpd.comb(model, X, depth=True, ignore=["blocks.0.up"])
    assert "ignored by the user" in groups.kept_branches[0].reason
    groups = cpd.comb(model, X, depth=True)
    free = without(groups, "blocks.0:1", "blocks.1:1")
    assert set(free.branches) == {"blocks.0:1", "blocks.1:1"} or len(free.branches) == 1
    ways: list[dict[str, Any]] = [
        {"limits": {"blocks.1:1": 0}},
        {"limits": lambda each: 0 if each.name == "blocks.1:1" else None},
        {"keep": {"blocks.1:1": "all"}},
        {"keep": {"blocks.1.up": [0]}},
    ]
    for options in ways:
        plan = without(groups, "blocks.1:1", **options)
        assert "blocks.1:1" not in plan.branches
        proved(model, plan, X)
    strict = cpd.comb(model, X, depth=True, keep_class="strict")
    assert not strict.branches
    assert all("the class is to be kept" in each.reason for each in strict.kept_branches)


def test_a_share_of_the_branches_that_are_alike_stays() -> None:
    model = Net(*(Block() for _ in range(4))).eval()
    groups = cpd.comb(model, X, depth=True)
    names = [b.name for b in groups.branches]
    plan = without(groups, *names, target="params=0.12", min_keep=0.5, unreachable="closest")
    assert len(plan.branches) == 2
    proved(model, plan, X)


def test_plans_one_after_the_other_are_one_plan() -> None:
    model = Net(Block(), Block(), Block()).eval()
    first = without(cpd.comb(model, X, depth=True), "blocks.1:1", target="params=0.8")
    middle = cpd.cut(model, first)
    second = without(cpd.comb(middle, X, depth=True), "blocks.0:1", target="params=0.8")
    both = first.then(second)
    assert both.gone == first.gone | second.gone
    small = cpd.cut(middle, second)
    at_once = cpd.cut(model, both, verify=False)
    assert difference(run(small, X), run(at_once, X)) <= TIGHT
    assert set(small.state_dict()) == set(at_once.state_dict())


def test_the_choice_goes_on_from_a_plan() -> None:
    model = Net(*(Block() for _ in range(4))).eval()
    groups = cpd.comb(model, X, depth=True)
    first = without(groups, "blocks.1:1", target="params=0.75")
    assert list(first.branches) == ["blocks.1:1"]
    later = cpd.choose(groups, random_scores(groups, 1), "params=0.4", start=first)
    assert "blocks.1:1" in later.branches
    proved(model, later, X)


def test_artefacts(tmp_path: Path) -> None:
    model = Net(Block(), Block(), Block()).eval()
    plan = without(cpd.comb(model, X, depth=True), "blocks.2:1")
    small = cpd.cut(model, plan)
    cpd.save(small, plan, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "plan.json").read_text())["format"] == 3
    again = cpd.load(tmp_path / "small", Net(Block(), Block(), Block()))
    assert difference(run(again.eval(), X), run(small, X)) == 0
    narrow = cpd.choose(cpd.comb(model, X), random_scores(cpd.comb(model, X), 0), "params=0.7")
    assert json.loads(narrow.to_json())["format"] == 2  # read by older versions


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["branches"].update(more=["nothing.weight"]),
        lambda data: data["branches"].update(more=["blocks.1.up.weight"]),
        lambda data: data["branches"].update(more=["head.weight"]),
        lambda data: data.update(branches=3),
    ],
)
def test_forged_branches(change: Any) -> None:
    model = Net(Block(), Block(), Block()).eval()
    plan = without(cpd.comb(model, X, depth=True), "blocks.1:1")
    data = json.loads(plan.to_json())
    change(data)
    with pytest.raises(cpd.CPDError):
        cpd.cut(model, Plan.from_json(json.dumps(data)))


def test_repair_leaves_what_goes_alone() -> None:
    model = Net(Block(), Block(), Block()).eval()
    plan = without(cpd.comb(model, X, depth=True), "blocks.1:1")
    mended = cpd.repair(model, plan, [X])
    small = cpd.cut(mended, plan)
    wanted = run(model, X)
    assert difference(run(small, X), wanted) < difference(run(cpd.cut(model, plan), X), wanted)


def trained(kind: str, cut_every: int) -> tuple[cpd.Pruner, nn.Module, Any]:
    """A run that prunes as it trains: the pruner, what comes out, the optimizer."""
    torch.manual_seed(0)
    model = Net(*(Block() for _ in range(4))).train()
    optimizer: Any = (
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=0.001)
    )
    pruner = cpd.Pruner(
        model, X, importance="taylor", target="params=0.4", interval=2, events=3,
        cut_every=cut_every, depth=True, exact=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    while not pruner.finished:
        x = torch.randn(4, 6, 5, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        pruner.step(optimizer)
    return pruner, pruner.finish(), optimizer


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_branches_go_while_it_trains(kind: str) -> None:
    """Masked and cut runs end with the same branches and the same network."""
    masked, one, _ = trained(kind, 0)
    cut, two, optimizer = trained(kind, 1)
    assert masked.plan is not None
    assert cut.plan is not None
    assert masked.plan.branches
    assert masked.plan.branches == cut.plan.branches
    for small, plan in ((one, masked.plan), (two, cut.plan)):
        assert cpd.costs.params(small) == plan.costs["params"][1]
    assert difference(run(two.eval(), X), run(one.eval(), X)) < 1e-4
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in cut.model.parameters()}


NETWORKS: dict[str, Any] = {
    "resnet26": lambda: timm.create_model("resnet26", num_classes=10),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_050", num_classes=10),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=10),
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=4, num_classes=10, embed_dim=48, num_heads=3
    ),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_real_networks_lose_depth(name: str, exact: bool) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), torch.randn(2, 3, 64, 64)
    groups = cpd.comb(model, x, depth=True, exact=exact)
    assert len(groups.branches) >= 4
    plan = cpd.choose(groups, random_scores(groups, 3), "macs=0.5", min_keep=0)
    assert plan.branches
    small = proved(model, plan, x)
    small.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_the_shell_takes_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cpd.cli import main

    flags = ["timm:resnet26", "--input_shape", "3,64,64", "--depth", "true"]
    assert main(["comb", *flags]) == 0
    assert "4 residual branches may go whole: layer1.1:1" in capsys.readouterr().out
    more = ["--target", "macs=0.4", "--min_keep", "0", "--output", str(tmp_path / "small")]
    assert main(["prune", *flags, *more]) == 0
    assert "1 -> 0 branches" in capsys.readouterr().out
    plan = Plan.from_json((tmp_path / "small" / "plan.json").read_text())
    assert plan.branches
    small = cpd.load(tmp_path / "small", timm.create_model("resnet26"))
    assert not set(small.state_dict()) & plan.gone
