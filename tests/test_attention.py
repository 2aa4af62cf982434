"""PyTorch's attention with its masks, cut: as the zeroed original, fused or not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import cpd
from cpd.attention import CutMultiheadAttention
from laws import difference, flat, random_scores, randomised, zeroed

LENGTH, BATCH, WIDE = 5, 2, 8


def padding(length: int = LENGTH) -> torch.Tensor:
    """The second sample ends two places earlier."""
    mask = torch.zeros(BATCH, length, dtype=torch.bool)
    mask[1, length - 2 :] = True
    return mask


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)


def causal(length: int = LENGTH) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def tokens(length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, 6, dtype=torch.float64, generator=made)


class Net(nn.Module):
    """An embedding, `inner`, and a head; `call` says how inner is called."""

    def __init__(self, inner: nn.Module, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(6, WIDE), inner, nn.Linear(WIDE, 3)
        self.call = call

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return self.b(self.call(self, x, *more))


def attention(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(WIDE, 4, batch_first=True, **options)


def encoder(heads: int = 4, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDE, heads, 16, batch_first=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says where it will not use its fused path
        return nn.TransformerEncoder(layer, 2)


def decoder(**options: Any) -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDE, 4, 16, batch_first=True, **options)
    return nn.TransformerDecoder(layer, 2)


def attend(m: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    y = m.a(x)
    return m.inner(y, y, y, **options)[0]


@dataclass(frozen=True)
class Case:
    """How a module is called with masks; `padded`: the places of the output that mean nothing.

    `heads`: whether heads may go, with `exact=False` and with it.
    """

    inner: Callable[[], nn.Module]
    call: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    padded: torch.Tensor | None = None
    heads: tuple[bool, bool] = (True, True)


def padded(m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return attend(m, x, key_padding_mask=mask)


def padded_quietly(m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return attend(m, x, key_padding_mask=mask, need_weights=False)


def masked(m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return attend(m, x, attn_mask=mask)


def weighted(m: Any, x: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    x = m.a(x)
    out, weights = m.inner(x, x, x, key_padding_mask=pad)
    return out + (weights @ x)[..., :1]


def both(m: Any, x: torch.Tensor, mask: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    return attend(m, x, attn_mask=mask, key_padding_mask=pad, need_weights=False)


def encode(m: Any, x: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    return m.inner(m.a(x), src_key_padding_mask=pad)


def encode_causal(m: Any, x: torch.Tensor, mask: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    return m.inner(m.a(x), mask=mask, src_key_padding_mask=pad, is_causal=False)


def decode(
    m: Any, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor, pad: torch.Tensor
) -> torch.Tensor:
    options = {"tgt_mask": mask, "tgt_is_causal": False, "memory_key_padding_mask": pad}
    return m.inner(m.a(x), m.a(memory), **options)


def decode_padded(
    m: Any, x: torch.Tensor, memory: torch.Tensor, pad: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    return m.inner(m.a(x), m.a(memory), tgt_key_padding_mask=pad, memory_key_padding_mask=other)


NEVER = (False, False)  # the mask has a place for each head
MEAN = (True, False)  # the weights that are read are a mean over the heads
PER_HEAD = causal().expand(BATCH * 4, -1, -1).contiguous()
CASES = {
    "padding": Case(attention, padded, (tokens(), padding())),
    "padding, float": Case(attention, padded, (tokens(), additive(padding()))),
    "padding, weights": Case(attention, weighted, (tokens(), padding()), heads=MEAN),
    "padding, no weights": Case(attention, padded_quietly, (tokens(), padding())),
    "padding, key bias": Case(
        lambda: attention(add_bias_kv=True, add_zero_attn=True),
        padded_quietly,
        (tokens(), padding()),
    ),
    "a mask for each head": Case(attention, masked, (tokens(), PER_HEAD), heads=NEVER),
    "a float mask for each head": Case(
        attention, masked, (tokens(), additive(PER_HEAD)), heads=NEVER
    ),
    "mask and padding": Case(attention, both, (tokens(), causal(), padding())),
    "encoder": Case(encoder, encode, (tokens(), padding()), padding()),
    "encoder, float": Case(encoder, encode, (tokens(), additive(padding())), padding()),
    "encoder, gelu": Case(
        lambda: encoder(2, activation="gelu"), encode, (tokens(), padding()), padding()
    ),
    "encoder, norm first": Case(
        lambda: encoder(norm_first=True), encode, (tokens(), padding()), padding()
    ),
    "encoder, causal": Case(encoder, encode_causal, (tokens(), causal(), padding()), padding()),
    "decoder": Case(decoder, decode, (tokens(), tokens(7, 1), causal(), padding(7))),
    "decoder, padded": Case(
        lambda: decoder(norm_first=True),
        decode_padded,
        (tokens(), tokens(7, 1), padding(), padding(7)),
    ),
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_masks(name: str, exact: bool) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = randomised(Net(case.inner(), case.call))
    groups = cpd.comb(model, case.inputs, exact=exact)
    kinds = {family.kind for group in groups for family in group.families}
    assert "head dims" in kinds
    assert ("heads" in kinds) == case.heads[exact]
    plan = cpd.choose(
        groups, random_scores(groups, 1), "params=0.6", min_keep=0, unreachable="closest"
    )
    small = cpd.cut(model, plan)  # it proves the cut, with PyTorch's fused paths on and off
    assert any(isinstance(part, CutMultiheadAttention) for part in small.modules())
    out = flat(small(*case.inputs))
    with torch.no_grad():
        quick = flat(small(*case.inputs))
    assert difference(quick, out) <= 1e-12
    if exact:
        there = slice(None) if case.padded is None else ~case.padded
        wanted = flat(zeroed(model, plan)(*case.inputs))
        assert difference([out[0][there]], [wanted[0][there]]) <= 1e-9


def test_the_proof_runs_what_users_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that still makes nested tensors fails its proof, and so no user meets it."""
    case = CASES["encoder"]
    model = randomised(Net(case.inner(), case.call))
    groups = cpd.comb(model, case.inputs, exact=True)
    plan = cpd.choose(groups, random_scores(groups, 1), "params=0.6", unreachable="closest")
    small: Any = cpd.cut(model, plan)
    proof = cpd.verify(model, small, plan, case.inputs)
    assert proof.checks["with fused attention"] <= 1e-12
    monkeypatch.setattr("cpd.surgery.without_nesting", lambda _: None)
    small.inner.use_nested_tensor = True
    proof = cpd.verify(model, small, plan, case.inputs)
    assert not proof
    assert "with fused attention: RuntimeError" in str(proof)


def test_what_is_not_cut_stays_fused() -> None:
    """Only the layers between the attentions are narrower: padded places are zero as before."""
    case = CASES["encoder"]
    model = randomised(Net(case.inner(), case.call))
    groups = cpd.comb(model, case.inputs, exact=True)
    scores = {
        name: torch.full_like(x, 9.0) if "attn" in name else x
        for name, x in random_scores(groups, 1).items()
    }
    plan = cpd.choose(groups, scores, "params=0.9", ranking="global", unreachable="closest")
    small: Any = cpd.cut(model, plan)
    assert not any(isinstance(part, CutMultiheadAttention) for part in small.modules())
    assert small.inner.use_nested_tensor
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are in prototype stage
        wanted, got = flat(zeroed(model, plan)(*case.inputs)), flat(small(*case.inputs))
        assert difference(got, wanted) <= 1e-12
        bias = small.b.bias.expand(2, -1)
        assert difference([got[0][case.padded]], [bias]) <= 1e-12


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_class_that_is_to_be_kept_is_kept(name: str) -> None:
    case = CASES[name]
    model = randomised(Net(case.inner(), case.call))
    groups = cpd.comb(model, case.inputs, keep_class="strict")
    assert "the class is to be kept" in str(groups)
    plan = cpd.choose(groups, random_scores(groups, 1), "params=0.7", unreachable="closest")
    small = cpd.cut(model, plan)
    assert cpd.costs.params(small) < cpd.costs.params(model)
    kept = {n: type(m) for n, m in model.named_modules()}
    assert {n: type(m) for n, m in small.named_modules()} == kept


def test_in_place_and_as_a_copy() -> None:
    case = CASES["encoder"]
    model = randomised(Net(case.inner(), case.call))
    groups = cpd.comb(model, case.inputs, exact=True)
    plan = cpd.choose(groups, random_scores(groups, 1), "params=0.6", unreachable="closest")
    small: Any = copy.deepcopy(cpd.cut(model, plan))
    assert not small.inner.use_nested_tensor
    assert not small.inner.enable_nested_tensor
    with torch.no_grad():
        small(*case.inputs)
    assert model.inner.use_nested_tensor


@pytest.mark.parametrize("apart", [False, True])
def test_what_it_reads_may_be_narrower_than_what_it_puts_out(apart: bool) -> None:
    """Only the embedding in front is cut: rows of all projections stay, and so does the output."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, WIDE)
            self.inner = attention(**({"kdim": 6, "vdim": 6} if apart else {}))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            other = x if apart else y.flip(1)
            return self.inner(y, other, other, need_weights=False)[0]

    model, x = randomised(Last()).eval().double(), tokens()
    groups = cpd.comb(model, x)
    plan = cpd.choose(
        groups,
        random_scores(groups, 0),
        "params=0.8",
        limits={"inner*": 0.0},
        unreachable="closest",
    )
    small = cpd.cut(model, plan)
    assert small.inner.out_proj.weight.shape == (WIDE, WIDE)
    assert small.a.weight.shape[0] < WIDE
    assert difference(flat(small(x)), flat(zeroed(model, plan)(x))) <= 1e-9
    assert difference(flat(small.train()(x)), flat(zeroed(model, plan).train()(x))) <= 1e-9
