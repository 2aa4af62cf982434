"""Smaller configurations: found where one describes a cut network, proved by building it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from torch import nn

import cpd
from cpd import models
from laws import random_scores

transformers = pytest.importorskip("transformers")

VIT = {"img_size": 32, "patch_size": 8, "num_classes": 10, "depth": 3}
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def vit() -> tuple[nn.Module, Any, dict[str, Any]]:
    made = timm.create_model("vit_tiny_patch16_224", **VIT)
    return made, torch.randn(2, 3, 32, 32, dtype=torch.float64), VIT


def bert() -> tuple[nn.Module, Any, dict[str, Any]]:
    config = transformers.BertConfig(**SIZES, intermediate_size=96, vocab_size=50)
    made = transformers.BertForSequenceClassification(config)
    return made, {"input_ids": torch.randint(0, 50, (2, 7))}, {}


def llama() -> tuple[nn.Module, Any, dict[str, Any]]:
    config = transformers.LlamaConfig(
        **SIZES, head_dim=12, num_key_value_heads=4, intermediate_size=96, vocab_size=50,
        use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (2, 7))}, {}


@pytest.mark.parametrize(
    ("make", "limits", "names"),
    [
        (vit, {"*attn*": 0, "patch_embed*": 0}, {"mlp_ratio"}),
        (bert, {"*attention*": 0, "*pooler*": 0}, {"intermediate_size"}),
        (llama, {"*q_proj": 0}, {"hidden_size", "intermediate_size"}),
    ],
)
@pytest.mark.parametrize("strategy", ["uniform", "knapsack"])
def test_a_configuration_builds_what_the_cut_computes(
    make: Any, limits: dict[str, float], names: set[str], strategy: str
) -> None:
    model, inputs, args = make()
    model = model.double().eval()
    groups = cpd.comb(model, inputs)
    options: dict[str, Any] = {"strategy": strategy, "limits": limits, "uniform": True}
    plan = cpd.choose(groups, random_scores(groups, 0), "params=0.75", **options)
    small = cpd.cut(model, plan)
    found = models.smaller(model, small, plan, args)
    assert found is not None
    assert found.values
    assert set(found.values) <= names
    again = found.build().double().eval()
    assert type(again) is type(small)
    again.load_state_dict(small.state_dict())
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    with torch.no_grad():
        outs = [net(*args, **kwargs) for net in (again, small)]
    got, wanted = (x if isinstance(x, torch.Tensor) else x.logits for x in outs)
    assert torch.allclose(got, wanted, 1e-9, 1e-9)


def test_no_configuration_where_layers_differ_or_nothing_is_known() -> None:
    model, inputs, args = vit()
    model = model.double().eval()
    groups = cpd.comb(model, inputs)
    plan = cpd.choose(groups, random_scores(groups, 0), "params=0.7", ranking="global")
    assert models.smaller(model, cpd.cut(model, plan), plan, args) is None
    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    groups = cpd.comb(plain, torch.randn(2, 4))
    plan = cpd.choose(groups, random_scores(groups, 0), "params=0.7", uniform=True)
    assert models.smaller(plain, cpd.cut(plain, plan), plan) is None


def test_a_configuration_prints_itself() -> None:
    found = models.Config("timm", "a", {"mlp_ratio": 2.0}, {"depth": 3})
    assert str(found) == "timm.create_model('a', depth=3, mlp_ratio=2.0)"
    assert found.to_dict()["values"] == {"depth": 3, "mlp_ratio": 2.0}
    assert str(models.Config("transformers", "BConfig", {"b": 1})) == "BConfig(b=1)"


SGD = {"batch_size": 64, "optimizer": {"name": "SGD", "lr": 0.01}}
RUN: dict[str, Any] = {
    "data": {"digits": {"size": 32}},
    "target": "macs=0.8",
    "uniform": True,
    "interval": 1,
    "events": 1,
    "prune": SGD,
    "recover": {**SGD, "steps": 1},
    "onnx": False,
}
GREY = {**VIT, "in_chans": 1, "embed_dim": 24}


def test_a_run_does_not_fail_for_want_of_a_configuration() -> None:
    args = {"model_name": "vit_tiny_patch16_224", **GREY}
    result = cpd.compress(timm.create_model, model_args=args, **RUN)
    assert result.described is None
    assert any("could not be tried" in note for note in result.report.notes)


def test_a_run_notes_the_configuration_that_builds_its_result(tmp_path: Any) -> None:
    result = cpd.compress(
        lambda **args: timm.create_model("vit_tiny_patch16_224", **args),
        model_args=GREY,
        limits={"*attn*": 0, "patch_embed*": 0},
        output=tmp_path,
        **RUN,
    )
    assert result.described is not None
    assert set(result.described.values) == {"mlp_ratio"}
    again = result.described.build()
    again.load_state_dict(result.model.state_dict())
    assert f"the same as {result.described}" in result.report.notes
    noted = json.loads((tmp_path / "manifest.json").read_text())["extra"]["config"]
    assert noted == result.described.to_dict()
