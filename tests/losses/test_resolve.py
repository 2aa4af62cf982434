"""losses.resolve: what a person may write, and what it then computes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from cpd import losses
from cpd.errors import InputError, UnknownName


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 5), torch.randn(4, 5)


def test_the_shelf_is_sorted_and_public() -> None:
    assert list(losses.SHELF) == sorted(losses.SHELF)
    assert {entry.__name__ for entry in losses.SHELF.values()} <= set(losses.__all__)


@pytest.mark.parametrize("name", ["dist", "hard", "kd"])
def test_a_name(name: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    terms = losses.resolve(name)(*pair)
    assert list(terms) == [name]
    torch.testing.assert_close(terms[name], losses.SHELF[name](*pair))


def test_options_and_weights(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    spec = {"kd": {"weight": 3.0, "temperature": 4.0}, "dist": None}
    terms = losses.resolve(spec)(*pair)
    assert list(terms) == ["kd", "dist"]
    torch.testing.assert_close(terms["kd"], 3 * losses.kd(*pair, temperature=4.0))
    torch.testing.assert_close(terms["dist"], losses.dist(*pair))


def test_one_loss_twice(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    spec = {"soft": {"loss": "kd", "temperature": 4.0}, "kd": {}}
    resolved = losses.resolve(spec)
    terms = resolved(*pair)
    torch.testing.assert_close(terms["soft"], losses.kd(*pair, temperature=4.0))
    torch.testing.assert_close(terms["kd"], losses.kd(*pair))
    assert str(resolved).startswith("1 * soft: kd(student, teacher, temperature=4.0) + 1 * kd(")


def test_labels_reach_the_losses_that_want_them(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    labels = torch.tensor([0, 1, 2, 3])
    terms = losses.resolve({"dkd": {}, "kd": {}})(*pair, losses.Seen(labels))
    torch.testing.assert_close(terms["dkd"], losses.dkd(*pair, labels=labels))


def test_standardised_by_option(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    spec = {"kd": {"standardise": True, "temperature": 2.0, "weight": 9.0}}
    expected = 9 * losses.standardised(losses.kd)(*pair, temperature=2.0)
    torch.testing.assert_close(losses.resolve(spec)(*pair)["kd"], expected)


@pytest.mark.parametrize("name", ["cirkd", "mgd", "af_dcd"])
def test_features_are_not_standardised(name: str) -> None:
    with pytest.raises(InputError, match=f"loss '{name}' looks at features: standardise is for"):
        losses.resolve({name: {"at": "neck", "standardise": True}})


def test_weights_over_a_stage() -> None:
    spec = {"kd": {"weight": 2.0, "warmup": 3, "decay": 0.25}}
    (term,) = losses.resolve(spec).terms
    weights = [term.factor(step, 14) for step in range(14)]
    assert weights[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])  # a quarter each
    assert weights[8] == pytest.approx(2 * (0.25 + 0.75 / 2))  # half way of the ten steps left
    assert weights[13] == pytest.approx(0.5)
    assert weights[3:] == sorted(weights[3:], reverse=True)
    (plain,) = losses.resolve({"kd": {"weight": 2.0}}).terms
    assert {plain.factor(step, 14) for step in range(14)} == {2.0}


def test_a_weight_that_changes_is_used(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    resolved = losses.resolve({"kd": {"warmup": 1}})
    value = resolved(*pair, losses.Seen(step=0, total=2))["kd"]
    torch.testing.assert_close(value, losses.kd(*pair) / 2)


def test_features_need_two_networks(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    resolved = losses.resolve({"cwd": {"at": ["neck", "head"]}, "inner": {"at": "neck"}})
    assert resolved.points == ("neck", "head")
    assert str(resolved).startswith("50 * cwd(student, teacher) at neck, head")
    with pytest.raises(InputError, match="'cwd' looks at modules of the networks"):
        resolved(*pair)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("cwd", "3 * cwd(student, teacher)"),
        ({"cwd": {"at": "neck"}}, "50 * cwd(student, teacher) at neck"),
        ({"cwd": {"weight": 5}}, "5 * cwd(student, teacher)"),
        ({"deep": {"loss": "inner", "at": "neck"}}, "20 * deep: inner(student, teacher) at neck"),
        ({"at": {"at": "neck"}}, "10000 * at(student, teacher) at neck"),
        ({"skd": {"at": "neck"}}, "10 * skd(student, teacher) at neck"),
        ({"ifvd": {"at": "neck"}}, "20 * ifvd(student, teacher) at neck"),
        ({"kd": {"standardise": True}}, "9 * kd(student, teacher, temperature=2.0)"),
        ({"dkd": {"standardise": True}}, "1 * dkd(student, teacher)"),
        (
            {"kd": {"standardise": True, "temperature": 3.0}},
            "9 * kd(student, teacher, temperature=3.0)",
        ),
        ({"mgd": {"at": "neck"}}, "1 * mgd(student, teacher) at neck"),
    ],
)
def test_a_weight_that_is_left_out_is_the_official_one(spec: object, text: str) -> None:
    """The tables 3.4 and 3.5 of the formulas that the project goes by."""
    assert str(losses.resolve(spec)) == text


@pytest.mark.parametrize(
    ("loss", "official"),
    [
        ("kd", {"temperature": 1.0}),
        ("dkd", {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}),
        ("dist", {"temperature": 1.0, "inter": 1.0, "intra": 1.0}),
        ("nkd", {"gamma": 1.5, "temperature": 1.0}),
        ("cwd", {"temperature": 4.0}),
        ("skd", {"pool": 2}),
        ("cirkd", {"batch": 1.0, "pixel": 0.1, "region": 0.1, "temperature": 0.1, "soften": 1.0}),
        ("cirkd", {"pixels": 20000, "regions": 2000, "update": 16}),
        ("cirkd", {"sampled_pixels": 4096, "sampled_regions": 1024}),
        ("mgd", {"alpha": 2e-5, "mask": 0.75}),
        ("af_dcd", {"feature": 2e-6, "contrastive": 0.04, "temperature": 0.07, "mask": 0.75}),
        ("af_dcd", {"groups": 16, "patch": 4}),
    ],
)
def test_an_option_that_is_left_out_is_the_official_one(
    loss: str, official: dict[str, float]
) -> None:
    parameters = inspect.signature(losses.SHELF[loss]).parameters
    assert {name: parameters[name].default for name in official} == official


def test_the_spec_is_not_changed() -> None:
    spec: dict[str, dict[str, float]] = {"kd": {"weight": 3.0, "temperature": 4.0}}
    losses.resolve(spec)
    assert spec == {"kd": {"weight": 3.0, "temperature": 4.0}}


def test_it_prints_itself() -> None:
    spec = {"kd": {"weight": 3.0, "temperature": 4.0}, "dist": {}}
    text = "3 * kd(student, teacher, temperature=4.0) + 1 * dist(student, teacher)"
    assert str(losses.resolve(spec)) == text
    assert str(losses.resolve(None)) == "no losses"


@pytest.mark.parametrize("spec", [None, {}])
def test_no_losses(spec: object, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert losses.resolve(spec)(*pair) == {}


def test_a_callable(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    def gap(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (student - teacher).square().mean()

    terms = losses.resolve(gap)(*pair)
    assert list(terms) == ["gap"]
    torch.testing.assert_close(terms["gap"], gap(*pair))


def test_a_callable_with_several_terms_on_any_outputs() -> None:
    def two(student: dict[str, torch.Tensor], teacher: Any) -> dict[str, torch.Tensor]:
        return {"a": student["x"].sum(), "b": torch.tensor(2.0)}

    terms = losses.resolve(two)({"x": torch.ones(3)}, None)
    assert {name: term.item() for name, term in terms.items()} == {"a": 3.0, "b": 2.0}


def test_what_was_resolved_stays() -> None:
    resolved = losses.resolve("kd")
    assert losses.resolve(resolved) is resolved


@pytest.mark.parametrize("value", [torch.zeros(2), 3.0, None])
def test_a_loss_must_return_a_scalar(value: object) -> None:
    with pytest.raises(InputError, match=r"must return a scalar tensor, got (\(2,\)|float|None)"):
        losses.resolve(lambda student, teacher: value)(1, 2)


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        (
            "dits",
            UnknownName,
            "unknown loss 'dits'; did you mean 'dist'.* Valid names: .*dist, dkd",
        ),
        (
            {"kd": {"tau": 1.0}},
            UnknownName,
            "of loss 'kd' 'tau'.* names: at, axis, .*temperature, warmup, weight",
        ),
        ({"kd": {"student": 1.0}}, UnknownName, "option of loss 'kd' 'student'"),
        ({"kd": {"temperature": 0}}, InputError, "temperature must be a finite number > 0"),
        ({"kd": {"weight": -1}}, InputError, "weight of loss 'kd' must be a finite number >= 0"),
        ({"kd": 3.0}, InputError, "options of loss 'kd' must be a mapping"),
        (["kd"], InputError, "a loss is given by a name, a mapping"),
        ({"kd": {"warmup": -1}}, InputError, "warmup of loss 'kd' must be a number of steps >= 0"),
        ({"kd": {"decay": 2}}, InputError, r"decay of loss 'kd' is the share left, in \[0, 1\]"),
        ({"kd": {"at": 3}}, InputError, "'at' of loss 'kd' must be a module path or several"),
        ({"kd": {"at": []}}, InputError, "'at' of loss 'kd' must be a module path or several"),
        ({"kd": {"at": "a", "axis": 0.5}}, InputError, "axis of loss 'kd' must be a whole number"),
        ({"kd": {"standardise": 1}}, InputError, "standardise of loss 'kd' must be true or false"),
        ({"dkd": {"at": "neck"}}, InputError, "'dkd' compares classes: it sees the logits"),
        ({"kd": {"at": "a", "standardise": True}}, InputError, "standardise is for logits"),
        ({"deep": {"loss": "cvd"}}, UnknownName, "unknown loss 'cvd'; did you mean 'cwd'"),
        ({"deep": {"at": "neck"}}, UnknownName, "unknown loss 'deep'"),
        ({"dkd": {"labels": 1}}, UnknownName, "option of loss 'dkd' 'labels'"),
        ({"mgd": {"channels": 1}}, UnknownName, "option of loss 'mgd' 'channels'"),
        ({"mgd": {"mask": 2}}, InputError, "mask must be a number in"),
    ],
)
def test_faults_are_met_at_once(spec: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        losses.resolve(spec)
