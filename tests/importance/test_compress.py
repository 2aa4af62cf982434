"""Importances in the interval loop: whose loss they see, and repair at every event."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd.compress.config import CompressConfig
from cpd.compress.events import Events
from cpd.distill import State
from cpd.errors import InputError, UnknownName
from importance.networks import combed, images, network
from two_processes import Split
from two_processes import network as convolutions

STAGE = {"batch_size": 16, "optimizer": {"name": "SGD", "lr": 0.02, "momentum": 0.9}}


def losses(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = model(x)
    task = F.cross_entropy(out, torch.arange(len(x)) % 4, reduction="sum")
    return {"task": task, "kd": out.square().sum(), "dist": out.abs().sum()}


def seen(spec: Any, scored: str, parts: list[torch.Tensor]) -> tuple[dict[str, Any], nn.Module]:
    """What the loop collects of one step in parts, and the network with its gradients."""
    model = network("tokens")
    config = CompressConfig.of(target="macs=0.5", data=None, scored=scored)
    importance = cpd.importance.resolve(spec)
    events = Events(model, combed("tokens"), importance, config, lambda *_: None)
    state = State("prune", 1, model)
    events.on_start(state)
    for number, x in enumerate(parts, start=1):
        state.synced = number == len(parts)
        terms = losses(model, x)
        events.before_backward(state, terms)
        torch.stack(list(terms.values())).sum().backward()
        events.after_backward(state)
    found = importance.scores()
    events.on_end(state)
    return found, model


@pytest.mark.parametrize("scored", ["all", "task", "distillation"])
@pytest.mark.parametrize("spec", ["hessian", "fisher", "hutchinson", "variance"])
def test_scores_are_of_the_loss_asked_for(spec: str, scored: str) -> None:
    """And the gradients that the network trains on are those of all."""
    names = {"all": ("task", "kd", "dist"), "task": ("task",), "distillation": ("kd", "dist")}

    def part(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        terms = losses(model, x)
        return torch.stack([terms[name] for name in names[scored]]).sum()

    found, model = seen(spec, scored, [images()])
    wanted = cpd.importance.collect(spec, network("tokens"), combed("tokens"), [images()], part)
    for name, scores in wanted.items():
        torch.testing.assert_close(found[name], scores, rtol=1e-9, atol=1e-12)
    plain = network("tokens")
    torch.stack(list(losses(plain, images()).values())).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("spec", ["hessian", "fisher"])
def test_parts_of_a_batch_are_scored_together(spec: str) -> None:
    """A batch without a remainder of classes, so that its halves have the targets of the whole."""
    whole, model = seen(spec, "task", [images(8)])
    found, same = seen(spec, "task", list(images(8).split(4)))
    for name, scores in whole.items():
        torch.testing.assert_close(found[name], scores, rtol=1e-9, atol=1e-12)
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_repair_at_an_event_keeps_the_network_near_itself() -> None:
    model, x = network("residual"), images(32)
    config = CompressConfig.of(target="params=0.6", data=None, importance="magnitude", events=1)

    def after(batches: list[Any]) -> float:
        student = copy.deepcopy(model)
        importance = cpd.importance.resolve("magnitude")
        events = Events(
            student, combed("residual"), importance, config, lambda *_: None, batches
        )  # fmt: skip
        state = State("prune", 50, student, step=50)
        events.on_start(state)
        events.importance.observe()
        events.after_step(state)
        with torch.no_grad():
            return float((student(x) - model(x)).square().mean())

    assert after([images(32, seed=k) for k in range(20, 24)]) < 0.5 * after([])


def test_the_whole_way_with_curvature_a_part_of_the_loss_and_repair() -> None:
    result = cpd.compress(
        convolutions(),
        data=Split(),
        target="macs=0.5",
        importance={"hutchinson": {"kind": "diagonal", "normalise": "mean"}},
        scored="distillation",
        repair=2,
        interval=3,
        events=2,
        prune={**STAGE, "accumulate": 2},
        recover={**STAGE, "epochs": 1},
        onnx=False,
        seed=1,
    )
    before, after = result.plan.costs["macs"]
    assert after <= 0.5 * before
    assert result.report


def test_bad_options_are_met() -> None:
    given: dict[str, Any] = {"target": "macs=0.5", "data": None}
    with pytest.raises(UnknownName, match="losses to score by 'tasks'; did you mean 'task'"):
        CompressConfig.of(**given, scored="tasks")
    with pytest.raises(InputError, match='scored="distillation" needs a teacher'):
        CompressConfig.of(**given, scored="distillation", teacher=None)
    with pytest.raises(InputError, match=r"repair must be a whole number .* or 'auto', got -1"):
        CompressConfig.of(**given, repair=-1)
