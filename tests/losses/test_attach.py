"""Losses on named modules: what they see, which channels are compared, what fails at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import cpd
from cpd import losses
from cpd.errors import InputError, UnknownName
from cpd.losses import Seen, attach, kept_at

INPUTS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(4, (2, 8, 8), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(x + self.body(x))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.hidden = nn.Linear(16, 32)
        self.out = nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.out(self.hidden(self.norm(x)).relu())
        return self.head(x.mean(1))


def identity(outputs: torch.Tensor) -> torch.Tensor:
    return outputs


def attached(spec, student, teacher, inputs=INPUTS, **more):
    return attach(
        losses.resolve(spec), student, teacher, inputs=lambda: inputs, logits=identity, **more
    )


def step(made, inputs=INPUTS, labels=LABELS):
    """Terms of one step, and what was seen."""
    with made.watching() as (own, other):
        student, teacher = made.student(inputs), made.teacher(inputs)
    return made(student, teacher, Seen(labels, own, other)), own, other


@pytest.fixture
def pair():
    return Net().eval(), Net().eval()


@pytest.fixture
def cut():
    """A network, what is left of it, and which channels."""
    teacher = Net().eval()
    small, plan = cpd.prune(teacher, INPUTS, target="macs=0.5")
    return teacher, small, plan


def test_logits_and_features_and_their_mean(pair) -> None:
    spec = {
        "kd": {"weight": 2.0},
        "cwd": {"at": ["stem", "body.1"], "weight": 3.0},
        "ifvd": {"at": "body", "weight": 1.0},
    }
    terms, own, other = step(attached(spec, *pair))
    assert list(terms) == ["kd", "cwd", "ifvd"]
    x = INPUTS
    logits = pair[0](x), pair[1](x)
    torch.testing.assert_close(terms["kd"], 2 * losses.kd(*logits))
    each = [losses.cwd(own[path], other[path]) for path in ("stem", "body.1")]
    torch.testing.assert_close(terms["cwd"], 3 * (each[0] + each[1]) / 2)
    torch.testing.assert_close(own["stem"], pair[0].stem(x))
    expected = losses.ifvd(own["body"], other["body"], labels=LABELS)
    torch.testing.assert_close(terms["ifvd"], expected)


def test_no_hook_is_left(pair) -> None:
    made = attached({"inner": {"at": "stem"}, "mgd": {"at": "body"}}, *pair)
    step(made)
    for network in pair:
        assert not any(m._forward_hooks for m in network.modules())


def test_networks_and_random_state_stay(pair) -> None:
    pair[0].train()
    before = copy.deepcopy(pair[0].state_dict()), torch.get_rng_state()
    attached({"mgd": {"at": "stem"}}, *pair)
    assert pair[0].training
    assert not pair[1].training
    after = pair[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before[0].items())
    assert torch.equal(torch.get_rng_state(), before[1])


def test_which_channels_are_kept(cut) -> None:
    _, _, plan = cut
    masks = plan.masks()
    kept = kept_at(plan.groups, plan, ["stem", "stem.0", "body", "head"])
    rows = masks["stem.0.weight"].flatten(1).any(1)
    assert 0 < int(rows.sum()) < 16
    assert set(kept) == {"stem", "stem.0", "body"}  # the head keeps its width
    for axis, mask in kept.values():
        assert axis == 1
        assert torch.equal(mask, rows)


def test_values_are_compared_on_kept_channels(cut) -> None:
    teacher, small, plan = cut
    kept = kept_at(plan.groups, plan, ["stem"])
    terms, own, other = step(attached({"inner": {"at": "stem"}}, small, teacher, kept=kept))
    mask = kept["stem"][1]
    assert own["stem"].shape[1] < other["stem"].shape[1]
    # the first layer reads the image: what is left of it computes exactly what it did
    torch.testing.assert_close(own["stem"], other["stem"][:, mask])
    assert terms["inner"].item() == pytest.approx(0, abs=1e-10)


def test_a_masked_student_is_compared_on_kept_channels_too(cut) -> None:
    teacher, _, plan = cut
    kept = kept_at(plan.groups, plan, ["stem"])
    masked = copy.deepcopy(teacher)
    cpd.mask(masked, plan)
    made = attached({"inner": {"at": "stem"}}, masked, teacher)
    everything = step(made)[0]["inner"].item()
    made.keep(kept)
    assert everything > 0.01
    assert step(made)[0]["inner"].item() == pytest.approx(0, abs=1e-10)


def test_stateful_losses_see_the_teachers_coordinates(cut) -> None:
    teacher, small, plan = cut
    kept = kept_at(plan.groups, plan, ["body"])
    made = attached({"mgd": {"at": "body", "mask": 0.0}}, small, teacher, kept=kept)
    (module,) = made.modules.values()
    seen = []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    _, own, _ = step(made)
    mask = kept["body"][1]
    torch.testing.assert_close(seen[0][:, mask], own["body"])
    assert not seen[0][:, ~mask].any()
    masked = copy.deepcopy(teacher)
    cpd.mask(masked, plan)
    made.student = masked
    step(made)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)


def test_relations_take_the_whole_teacher(cut) -> None:
    teacher, small, plan = cut
    kept = kept_at(plan.groups, plan, ["body"])
    terms, own, other = step(
        attached({"skd": {"at": "body", "weight": 1.0}}, small, teacher, kept=kept)
    )
    torch.testing.assert_close(terms["skd"], losses.skd(own["body"], other["body"]))


def test_tokens_have_their_channels_last() -> None:
    teacher, x = Tokens().eval(), torch.randn(2, 5, 6)
    small, plan = cpd.prune(teacher, x, target="macs=0.6")
    kept = kept_at(plan.groups, plan, ["embed", "hidden"])
    assert {path: axis for path, (axis, _) in kept.items()} == {"embed": 2, "hidden": 2}
    spec = {"inner": {"at": "embed", "axis": -1}}
    terms, own, _ = step(attached(spec, small, teacher, x, kept=kept), x)
    assert own["embed"].shape[2] == int(kept["embed"][1].sum())
    assert terms["inner"].item() == pytest.approx(0, abs=1e-10)
    with pytest.raises(InputError, match="'embed' are on axis 2; give loss 'inner' the option"):
        attached({"inner": {"at": "embed"}}, small, teacher, x, kept=kept)


def test_what_learns_is_made_alike_for_one_seed(pair) -> None:
    spec = {"mgd": {"at": ["stem", "body"]}, "cirkd": {"at": "body", "pixels": 9, "regions": 9}}
    one, two, three = (attached(spec, *pair, seed=seed) for seed in (4, 4, 5))
    tensors = [list(made.modules.state_dict().values()) for made in (one, two, three)]
    assert all(torch.equal(a, b) for a, b in zip(tensors[0], tensors[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tensors[0], tensors[2], strict=True))
    assert len(one.modules) == 3
    terms, _, _ = step(one)
    assert list(terms) == ["mgd", "cirkd.batch", "cirkd.pixel", "cirkd.region"]
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in one.modules.parameters())
    two.modules.load_state_dict(one.modules.state_dict())  # queues are part of the state
    assert next(b for n, b in two.modules.named_buffers() if n.endswith("count")).any()


def test_stateful_losses_take_logits_too(pair) -> None:
    terms, _, _ = step(attached({"cirkd": {"pixels": 9, "regions": 9}}, *pair))
    assert set(terms) == {"cirkd.batch", "cirkd.pixel", "cirkd.region"}


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ({"inner": {"at": "boddy"}}, UnknownName, "module of Net 'boddy'; did you mean 'body'"),
        (
            {"inner": {"at": "stem", "axis": 9}},
            InputError,
            "axis 9 of loss 'inner': 'stem' has 4 axes",
        ),
    ],
)
def test_points_are_checked_before_the_first_step(pair, spec, error, text: str) -> None:
    with pytest.raises(error, match=text):
        attached(spec, *pair)


def test_networks_of_other_widths() -> None:
    student, teacher = Net(8).eval(), Net(16).eval()
    with pytest.raises(InputError, match=r"\(2, 8, 8, 8\), the teacher \(2, 16, 8, 8\)\. Which"):
        attached({"inner": {"at": "stem"}}, student, teacher)
    terms, _, _ = step(attached({"at": {"at": "stem"}}, student, teacher))
    assert terms["at"].item() > 0


def test_modules_without_one_output() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two, self.layer = nn.GRU(3, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(self.two(x)[0]))

    inputs = torch.randn(2, 5, 3)
    with pytest.raises(InputError, match="'layer', which runs more than once"):
        attached({"inner": {"at": "layer"}}, Twice(), Twice(), inputs)
    with pytest.raises(InputError, match="'two', which gives tuple, not a tensor"):
        attached({"inner": {"at": "two"}}, Twice(), Twice(), inputs)


def test_points_that_combing_cannot_tell(cut) -> None:
    _, _, plan = cut
    with pytest.raises(InputError, match="combing saw no operation in the module 'nowhere'"):
        kept_at(plan.groups, plan, ["nowhere"])
