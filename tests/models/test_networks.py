"""Networks: sizes as published, resolutions, names of checkpoints, comb, cut, verify."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cpd
from cpd import costs, models
from cpd.cli.models import Source
from cpd.errors import ArtefactError, InputError
from cpd.models import SHELF, names, official
from cpd.tasks import Segmentation
from laws import randomised

MILLION, BILLION = 1e6, 1e9
SMALL: dict[str, Any] = {
    "image_size": 64,
    "channels": 32,
    "auxiliary": 16,
    "taken": (0, 1, 2, 3),
    "options": {"embed_dim": 48, "depth": 4, "num_heads": 3},
}


def small_upernet(**changes: Any) -> nn.Module:
    options = {**SMALL, **changes}
    width = options.pop("auxiliary")
    config = models.upernet.__globals__["CONFIGS"]["deit_t"]
    made = models.upernet.__globals__["replace"](config, auxiliary=width, **options)
    return models.UPerNet(made, 11)


def beside(model: nn.Module, size: int) -> int:
    """What the published count has beside MACs: two for each element of a norm, one of a ReLU."""
    counts = []

    def count(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        counts.append(out.numel() * (2 if isinstance(module, nn.BatchNorm2d) else 1))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.ReLU | nn.ReLU6):
            module.register_forward_hook(count)
    model.to("meta")(torch.empty(1, 3, size, size, device="meta"))
    return sum(counts)


@pytest.mark.parametrize(
    ("size", "params", "macs"),
    [("t", 1.7, 0.6), ("s", 4.0, 1.1), ("b", 8.6, 1.8), ("l", 14.0, 6.5)],
)
def test_seaformer_as_published(size: str, params: float, macs: float) -> None:
    """The paper's table, which has one decimal, was counted as MMSegmentation counts."""
    model = SHELF[f"seaformer_{size}"]().eval()
    counted = costs.macs(model, torch.zeros(1, 3, 512, 512))
    found = costs.params(model) / MILLION, (counted + beside(model, 512)) / BILLION
    assert [round(number, 1) for number in found] == [params, macs]
    if size == "l":
        assert found == pytest.approx((14.0, 6.5), rel=0.01)


@pytest.mark.parametrize(("size", "params", "macs"), [("deit_s", 58, 1217), ("deit_b", 144, 2007)])
def test_upernet_as_published(size: str, params: float, macs: float) -> None:
    """At 512 x 2048; attributed to VMamba, arXiv 2401.10166, not checked against the paper."""
    model = SHELF[f"upernet_{size}"]().eval()
    assert costs.params(model) / MILLION == pytest.approx(params, rel=0.01)
    counted = costs.macs(model, torch.zeros(1, 3, 512, 2048))
    assert counted / BILLION == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize("size", ["deit_t", "vit_b"])
def test_other_backbones(size: str) -> None:
    widths = {"deit_t": 192, "vit_b": 768}
    with torch.device("meta"):
        model = SHELF[f"upernet_{size}"](num_classes=7)
    assert isinstance(model, models.UPerNet)
    assert model.backbone.width == widths[size]
    assert isinstance(model.backbone.body.norm, nn.Identity)
    with torch.device("meta"):
        normed = SHELF[f"upernet_{size}"](num_classes=7, final_norm=True)
    assert isinstance(normed.backbone.body.norm, nn.LayerNorm)
    assert [tuple(c.weight.shape[:1]) for c in model.neck.convs] == [(widths[size],)] * 4


def without_neck(**changes: Any) -> nn.Module:
    return small_upernet(scales=None, **changes)


def test_without_a_neck() -> None:
    """As the DeiT of 42.96 and 45.24 mIoU: four maps of one resolution."""
    images = torch.randn(2, 3, 96, 64)
    found = without_neck().eval()(images)
    assert found["out"].shape == (2, 11, 6, 4)
    assert found["aux"].shape == (2, 11, 6, 4)
    with torch.device("meta"):
        model = SHELF["upernet_deit_s"](scales=None)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    there = {official: shapes[own] for own, official in names(model).items()}
    known = {k: v for k, v in parts_of_upernet().items() if not k.startswith("neck.")}
    assert {key: there.get(key) for key in known} == known
    assert not any(name.startswith("neck.") for name in there)
    groups, plan = proved(without_neck(), torch.randn(2, 3, 64, 48), "macs=0.4")
    assert {family.kind for group in groups for family in group.families} >= {"heads", "channels"}
    assert plan.costs["macs"][1] <= 0.4 * plan.costs["macs"][0]


def test_resolutions() -> None:
    images = torch.randn(2, 3, 96, 64)
    sea = SHELF["seaformer_t"](num_classes=5).eval()
    assert sea(images).shape == (2, 5, 12, 8)
    fine = SHELF["seaformer_t"](num_classes=5, stride=1).eval()
    assert fine(images).shape == (2, 5, 24, 16)
    found = small_upernet().eval()(images)
    assert found["out"].shape == (2, 11, 24, 16)
    assert found["aux"].shape == (2, 11, 3, 2)


@pytest.mark.parametrize("sides", [(64, 43), (43, 64), (32, 43), (16, 16), (9, 70)])
def test_images_that_patches_do_not_fill(sides: tuple[int, int]) -> None:
    """As whole validation images are: padded, and the logits lie on the image."""
    model = small_upernet().eval()
    high, wide = sides
    images = torch.randn(1, 3, high, wide)
    filled = [-(-side // 16) * 16 for side in sides]
    padded = torch.zeros(1, 3, *filled)
    padded[..., :high, :wide] = images
    found, whole = model(images), model(padded)
    for name in ("out", "aux"):
        expected = whole[name]
        if filled != list(sides):
            expected = F.interpolate(whole[name], size=filled, mode="bilinear")
        torch.testing.assert_close(found[name], expected[..., :high, :wide])
    labels = torch.randint(0, 11, (1, 2 * high, 2 * wide))
    assert Segmentation().loss(found, labels).isfinite()
    windows = Segmentation(window=24, stride=10).infer(model, images)
    assert Segmentation().loss(windows, labels).isfinite()


def test_without_the_auxiliary_head() -> None:
    model = models.upernet("deit_t", 5, auxiliary=False, image_size=32)
    out = model.eval()(torch.randn(1, 3, 32, 32))
    assert isinstance(out, torch.Tensor)
    assert out.shape == (1, 5, 8, 8)
    whole = models.upernet("deit_t", 5, image_size=32).eval()
    whole.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(whole(images)["out"], model(images))  # type: ignore[index]


def test_blocks_left_out_while_training() -> None:
    from cpd.models._layers import DropPath

    layer, x = DropPath(0.25), torch.ones(4000, 2, 1)
    assert layer.eval()(x) is x
    out = layer.train()(x)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(out[:, 0], out[:, 1])
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


# checkpoints -------------------------------------------------------------------------------------


def attention_of_seaformer() -> dict[str, tuple[int, ...]]:
    """Names and shapes in the authors' checkpoint of the L model: second stage of attention."""
    here = "backbone.trans2.transformer_blocks.1"
    return {
        f"{here}.attn.to_q.c.weight": (160, 256, 1, 1),
        f"{here}.attn.to_v.c.weight": (320, 256, 1, 1),
        f"{here}.attn.to_k.bn.running_var": (160,),
        f"{here}.attn.proj.1.c.weight": (256, 320, 1, 1),
        f"{here}.attn.proj_encode_row.1.c.weight": (320, 320, 1, 1),
        f"{here}.attn.proj_encode_column.1.bn.bias": (320,),
        f"{here}.attn.pos_emb_rowq.pos_embed": (1, 160, 16),
        f"{here}.attn.pos_emb_columnk.pos_embed": (1, 160, 16),
        f"{here}.attn.dwconv.c.weight": (640, 1, 3, 3),
        f"{here}.attn.pwconv.c.weight": (256, 640, 1, 1),
        f"{here}.mlp.fc1.c.weight": (1024, 256, 1, 1),
        f"{here}.mlp.dwconv.bias": (1024,),
        f"{here}.mlp.fc2.bn.weight": (256,),
        "backbone.smb1.stem_block.0.c.weight": (32, 3, 3, 3),
        "backbone.smb1.layer1.conv.0.c.weight": (96, 32, 1, 1),
        "backbone.smb2.layer2.conv.2.c.weight": (512, 1, 5, 5),
        "backbone.smb5.layer1.conv.4.bn.weight": (320,),
        "decode_head.fuse3.local_embedding.conv.weight": (192, 160, 1, 1),
        "decode_head.fuse3.global_act.bn.weight": (192,),
        "decode_head.linear_fuse.conv.weight": (192, 1, 1, 1),
        "decode_head.conv_seg.weight": (150, 192, 1, 1),
    }


def parts_of_upernet() -> dict[str, tuple[int, ...]]:
    """Names and shapes in MMSegmentation's checkpoint of the DeiT-S model."""
    return {
        "backbone.cls_token": (1, 1, 384),
        "backbone.pos_embed": (1, 1025, 384),
        "backbone.patch_embed.projection.weight": (384, 3, 16, 16),
        "backbone.layers.11.ln1.weight": (384,),
        "backbone.layers.0.attn.attn.in_proj_weight": (1152, 384),
        "backbone.layers.0.attn.attn.in_proj_bias": (1152,),
        "backbone.layers.0.attn.attn.out_proj.weight": (384, 384),
        "backbone.layers.3.ffn.layers.0.0.weight": (1536, 384),
        "backbone.layers.3.ffn.layers.1.bias": (384,),
        "neck.lateral_convs.3.conv.weight": (384, 384, 1, 1),
        "neck.convs.0.conv.bias": (384,),
        "decode_head.psp_modules.3.1.conv.weight": (512, 384, 1, 1),
        "decode_head.psp_modules.3.1.bn.running_mean": (512,),
        "decode_head.bottleneck.conv.weight": (512, 2432, 3, 3),
        "decode_head.lateral_convs.2.conv.weight": (512, 384, 1, 1),
        "decode_head.fpn_convs.0.bn.weight": (512,),
        "decode_head.fpn_bottleneck.conv.weight": (512, 2048, 3, 3),
        "decode_head.conv_seg.bias": (150,),
        "auxiliary_head.convs.0.conv.weight": (256, 384, 3, 3),
        "auxiliary_head.conv_seg.weight": (150, 256, 1, 1),
    }


def parts_of_small_seaformer() -> dict[str, tuple[int, ...]]:
    """The same of the T model: two stages of attention, four heads of 16 and of 24."""
    first, second = (f"backbone.trans{n}.transformer_blocks.1" for n in (1, 2))
    return {
        "backbone.smb1.stem_block.0.c.weight": (16, 3, 3, 3),
        "backbone.smb1.layer1.conv.0.c.weight": (16, 1, 3, 3),  # nothing is widened
        "backbone.smb1.layer1.conv.2.c.weight": (16, 16, 1, 1),
        "backbone.smb1.layer2.conv.0.c.weight": (64, 16, 1, 1),
        "backbone.smb5.layer1.conv.4.c.weight": (160, 768, 1, 1),
        f"{first}.attn.to_q.c.weight": (64, 128, 1, 1),
        f"{first}.attn.to_v.c.weight": (128, 128, 1, 1),
        f"{first}.attn.dwconv.c.weight": (256, 1, 3, 3),
        f"{first}.attn.pos_emb_rowk.pos_embed": (1, 64, 16),
        f"{first}.mlp.fc1.c.weight": (256, 128, 1, 1),
        f"{second}.attn.to_k.c.weight": (96, 160, 1, 1),
        f"{second}.attn.proj.1.c.weight": (160, 192, 1, 1),
        f"{second}.attn.proj_encode_column.1.c.weight": (192, 192, 1, 1),
        f"{second}.attn.pwconv.c.weight": (160, 384, 1, 1),
        f"{second}.mlp.fc2.c.weight": (160, 640, 1, 1),
        "decode_head.fuse1.local_embedding.conv.weight": (64, 32, 1, 1),
        "decode_head.fuse1.global_act.conv.weight": (64, 128, 1, 1),
        "decode_head.fuse2.local_embedding.conv.weight": (96, 64, 1, 1),
        "decode_head.linear_fuse.bn.weight": (96,),
        "decode_head.conv_seg.weight": (150, 96, 1, 1),
    }


def parts_of_upernet_on_vit() -> dict[str, tuple[int, ...]]:
    """The same of the model on ViT-B, of which no last norm is used (47.71 mIoU)."""
    return {
        "backbone.cls_token": (1, 1, 768),
        "backbone.pos_embed": (1, 1025, 768),
        "backbone.patch_embed.projection.bias": (768,),
        "backbone.layers.11.attn.attn.in_proj_weight": (2304, 768),
        "backbone.layers.11.ffn.layers.0.0.weight": (3072, 768),
        "backbone.layers.0.ln2.bias": (768,),
        "neck.lateral_convs.0.conv.weight": (768, 768, 1, 1),
        "neck.convs.3.conv.weight": (768, 768, 3, 3),
        "decode_head.psp_modules.0.1.conv.weight": (512, 768, 1, 1),
        "decode_head.bottleneck.conv.weight": (512, 2816, 3, 3),
        "decode_head.fpn_convs.2.conv.weight": (512, 512, 3, 3),
        "decode_head.fpn_bottleneck.bn.running_var": (512,),
        "auxiliary_head.convs.0.bn.weight": (256,),
        "auxiliary_head.conv_seg.bias": (150,),
    }


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("seaformer_l", attention_of_seaformer()),
        ("seaformer_t", parts_of_small_seaformer()),
        ("upernet_deit_s", parts_of_upernet()),
        ("upernet_vit_b", parts_of_upernet_on_vit()),
    ],
)
def test_names_and_shapes_of_checkpoints(name: str, known: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        model = SHELF[name]()
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    there = {official: shapes[own] for own, official in names(model).items()}
    assert len(there) == len(shapes)  # no two tensors have one name
    assert {key: there.get(key) for key in known} == known


@pytest.mark.parametrize("name", ["seaformer_t", "seaformer_l", "upernet_deit_t", "upernet_vit_b"])
def test_nothing_keeps_a_name_of_ours(name: str) -> None:
    with torch.device("meta"):
        model = SHELF[name]()
    first = {"seaformer": ("backbone.smb", "backbone.trans", "decode_head.")}
    first["upernet"] = ("backbone.", "neck.", "decode_head.", "auxiliary_head.")
    for official_name in names(model).values():
        assert official_name.startswith(first[name.partition("_")[0]])
        assert not {"widen", "narrow", "body", "pyramid", "join", "hidden"} & {
            *official_name.split(".")
        }


def test_an_official_checkpoint_is_loaded() -> None:
    source = SHELF["seaformer_t"](num_classes=5)
    saved = {names(source)[name]: tensor for name, tensor in source.state_dict().items()}
    saved["backbone.extra"] = torch.zeros(1)
    target = SHELF["seaformer_t"](num_classes=5)
    target.load_state_dict(official(target, saved))
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(target.eval()(images), source.eval()(images))
    with pytest.raises(ArtefactError, match=r"'decode_head.conv_seg.weight' .* is \(5, 96, 1, 1\)"):
        official(SHELF["seaformer_t"](num_classes=6), saved)
    del saved["backbone.smb1.stem_block.0.c.weight"]
    with pytest.raises(ArtefactError, match=r"no 'backbone\.smb1\.stem_block\.0\.c\.weight', want"):
        official(target, saved)
    with pytest.raises(InputError, match="no map of names for Linear"):
        names(nn.Linear(1, 1))


# comb, cut, verify -------------------------------------------------------------------------------


def proved(model: nn.Module, images: torch.Tensor, target: str) -> tuple[cpd.Groups, cpd.Plan]:
    model = randomised(model).float()
    groups = cpd.comb(model, images)
    scores = cpd.importance.score("random", model, groups)
    plan = cpd.choose(groups, scores, target=target)
    small = cpd.cut(model, plan, verify=False)
    proof = cpd.verify(model, small, plan, images)
    assert proof, str(proof)
    assert costs.macs(small, images) == plan.costs["macs"][1]
    assert costs.params(small) == plan.costs["params"][1]
    assert type(small) is type(model)
    return groups, plan


def stuck(groups: cpd.Groups) -> set[str]:
    """Weights whose rows or columns cannot all go; kernels and tables of positions aside."""
    return {
        frozen.tensor
        for frozen in groups.frozen
        if frozen.axis < 2 and frozen.tensor.endswith("weight")
    }


def test_seaformer_can_be_cut_everywhere() -> None:
    groups, _ = proved(
        SHELF["seaformer_t"](num_classes=4, depths=(1, 1), stride=1),
        torch.randn(2, 3, 32, 32),
        "macs=0.4",
    )
    kinds = {family.kind for group in groups for family in group.families}
    assert kinds == {"channels", "head dims", "heads"}
    assert not stuck(groups) - {"stem.conv.weight", "head.classifier.weight"}


@pytest.mark.parametrize("wide", [64, pytest.param(43, marks=pytest.mark.slow)])
def test_upernet_can_be_cut_everywhere(wide: int) -> None:
    groups, plan = proved(small_upernet(), torch.randn(2, 3, 64, wide), "macs=0.4")
    kinds = {family.kind for group in groups for family in group.families}
    assert kinds == {"channels", "head dims", "heads"}
    narrowed = {width.group for width in plan.widths if width.after < width.before}
    ends = {"head.classifier.weight", "auxiliary.classifier.weight"}
    assert not stuck(groups) - ends - {"backbone.body.patch_embed.proj.weight"}
    for part in ("backbone.body.patch_embed", "neck.convs", "head.pyramid", "auxiliary.conv"):
        assert any(name.startswith(part) for name in narrowed), part


def test_they_are_names_of_the_shell() -> None:
    source = Source("cpd:seaformer_t", {"num_classes": 3})
    model = source()
    assert isinstance(model, models.SeaFormer)
    assert source.inputs(model, "3,64,64").shape == (2, 3, 64, 64)
    assert sorted(SHELF) == list(SHELF)


def test_segformer_is_wired() -> None:
    tiny = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}
    model = SHELF["segformer_b0"](num_classes=5, **tiny).eval()
    out = model(torch.randn(1, 3, 64, 64))
    assert out.logits.shape == (1, 5, 16, 16)
    whole = SHELF["segformer_b0"]()
    assert costs.params(whole) / MILLION == pytest.approx(3.8, rel=0.02)  # as in the paper
