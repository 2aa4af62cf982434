"""Language models of transformers, small and random: what can go, and that cutting is masking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import cpd
from cpd.errors import InputError
from laws import prove, wide, zeroed

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
EQUAL = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
PHI3 = {**SIZES, **HEADS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def ids(length: int = 7) -> torch.Tensor:
    return torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(0))


def built(kind: str, config: Any, attention: str | None) -> nn.Module:
    """A network in float64, every one of its norms random."""
    torch.manual_seed(0)
    cls: Any = getattr(transformers, kind)
    options = {} if attention is None else {"attn_implementation": attention}
    model = cls._from_config(config, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def causal(kind: str, attention: str | None = "sdpa", **sizes: Any) -> tuple[nn.Module, Any]:
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = built(f"{kind}ForCausalLM", config, attention)
    return model, {"input_ids": ids(), "use_cache": False}


def gpt2(attention: str) -> tuple[nn.Module, Any]:
    config = transformers.GPT2Config(
        vocab_size=96, n_positions=64, n_embd=48, n_layer=2, n_head=4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return built("GPT2LMHeadModel", config, attention), {"input_ids": ids(), "use_cache": False}


def bert(attention: str) -> tuple[nn.Module, Any]:
    config = transformers.BertConfig(**SIZES, num_attention_heads=4)
    inputs = {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    return built("BertForMaskedLM", config, attention), inputs


def t5() -> tuple[nn.Module, Any]:
    config = transformers.T5Config(
        vocab_size=96, d_model=48, d_kv=12, d_ff=56, num_layers=2, num_heads=4
    )
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(5), "use_cache": False}
    return built("T5ForConditionalGeneration", config, None), inputs


def whisper(attention: str) -> tuple[nn.Module, Any]:
    config = transformers.WhisperConfig(
        vocab_size=96, num_mel_bins=16, d_model=48, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=56,
        decoder_ffn_dim=56, max_source_positions=20, max_target_positions=30, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {
        "input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids(5), "use_cache": False,
    }  # fmt: skip
    return built("WhisperForConditionalGeneration", config, attention), inputs


def mamba() -> tuple[nn.Module, Any]:
    return causal("Mamba", None, vocab_size=96, hidden_size=48, state_size=8, num_hidden_layers=2)


# name -> how to make it with an attention, kinds of units that must be free by default
NETS: dict[str, tuple[Callable[[str], tuple[nn.Module, Any]], set[str]]] = {
    "llama": (
        lambda a: causal("Llama", a, **SIZES, num_attention_heads=6),
        {"channels", "heads", "head dims"},
    ),
    "llama, grouped queries, tied": (
        lambda a: causal("Llama", a, **SIZES, **HEADS, tie_word_embeddings=True),
        {"channels", "heads", "head groups", "head dims"},
    ),
    # half a head has as many dims as a key has queries, and nothing else in common with it
    "llama, equal sizes": (
        lambda a: causal("Llama", a, **SIZES, **EQUAL),
        {"channels", "heads", "head groups", "head dims"},
    ),
    "qwen3": (
        lambda a: causal("Qwen3", a, **SIZES, **HEADS, head_dim=12),
        {"channels", "heads", "head groups", "head dims"},
    ),
    "phi3": (
        lambda a: causal("Phi3", a, **PHI3),
        {"channels"},  # heads with sdpa alone: only there a replaced forward follows the slices
    ),
    "gpt2": (gpt2, {"channels", "heads", "head dims"}),
    "bert": (bert, {"channels", "heads", "head dims"}),
    "whisper": (whisper, {"channels", "heads", "head dims"}),
}


def kinds(groups: cpd.Groups) -> set[str]:
    return {family.kind for group in groups for family in group.families}


def check(made: tuple[nn.Module, Any], wanted: set[str], *, exact: bool) -> None:
    model, inputs = made
    groups, removed = prove(model, wide(inputs), exact=exact, count=2)
    assert removed > 0
    if not exact:
        assert wanted <= kinds(groups), groups


@pytest.mark.parametrize("name", NETS)
def test_cutting_is_masking(name: str) -> None:
    make, wanted = NETS[name]
    check(make("sdpa"), wanted, exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("name", NETS)
def test_every_attention_and_mode(name: str, attention: str, exact: bool) -> None:
    make, wanted = NETS[name]
    check(make(attention), wanted, exact=exact)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("make", [t5, mamba])
def test_other_architectures(make: Callable[[], tuple[nn.Module, Any]], exact: bool) -> None:
    check(make(), {"channels"}, exact=exact)


def test_experts_of_each_token_have_channels_and_no_heads() -> None:
    """Their weights are picked by data and multiplied in batches, as an attention's activations."""
    sizes = {**SIZES, **HEADS, "num_local_experts": 3, "num_experts_per_tok": 2}
    model, inputs = causal("Mixtral", **sizes)
    model.set_experts_implementation("batched_mm")
    groups = cpd.comb(model, inputs)
    found = {g.name: {f.kind for f in g.families} for g in groups if "experts" in g.name}
    assert set(map(frozenset, found.values())) == {frozenset({"channels"})}, groups
    assert {"heads", "head groups", "head dims"} <= kinds(groups)


def test_rotary_pairs_go_together_in_all_layers_and_the_table_follows() -> None:
    model, inputs = causal("Llama", **SIZES, **HEADS)
    groups = cpd.comb(model, inputs)
    (pairs,) = [f for group in groups for f in group.families if f.kind == "head dims"]
    assert pairs.width == 4
    scores = {group.name: torch.rand(group.size) for group in groups}
    plan = cpd.choose(groups, scores, "params=0.6", ranking="uniform")
    small = cpd.cut(model, plan)
    left = small.model.rotary_emb.inv_freq.shape[0]
    assert 1 <= left < 4
    for layer in small.model.layers:
        attention = layer.self_attn
        assert attention.head_dim == 2 * left
        assert attention.q_proj.out_features % attention.head_dim == 0
        assert attention.k_proj.out_features == attention.v_proj.out_features
    assert small.model.embed_tokens.weight.shape[1] == small.lm_head.in_features < 48
    assert small(**inputs).logits.shape == (2, 7, 96)
    longer = {"input_ids": ids(11)[:1], "use_cache": False}
    assert small(**longer).logits.shape == (1, 11, 96)


def test_heads_of_a_fused_projection_go_with_a_mask_and_without() -> None:
    """Slices at products of numbers, and another kernel where no mask is needed."""
    model, inputs = causal("Phi3", **PHI3)
    groups = cpd.comb(model, inputs, exact=True)
    assert kinds(groups) >= {"heads", "head groups", "head dims"}
    scores = {group.name: torch.rand(group.size) for group in groups}
    plan = cpd.choose(groups, scores, "params=0.7", ranking="uniform")
    small, whole = cpd.cut(model, plan), zeroed(model, plan)
    assert small.model.layers[0].self_attn.qkv_proj.out_features < 80
    for batch, length in ((1, 7), (3, 7), (3, 11)):
        words = torch.randint(3, 96, (batch, length))
        padded = torch.ones_like(words)
        padded[0, :2] = 0
        for mask in ({}, {"attention_mask": torch.ones_like(words)}, {"attention_mask": padded}):
            mine, theirs = (m(words, use_cache=False, **mask).logits for m in (small, whole))
            seen = padded.bool() if mask else slice(None)
            torch.testing.assert_close(mine[seen], theirs[seen], rtol=1e-9, atol=1e-9)
    options = {"max_new_tokens": 3, "do_sample": False}
    mine, theirs = (m.generate(words, use_cache=False, **options) for m in (small, whole))
    assert mine.tolist() == theirs.tolist()
    with pytest.raises(InputError, match=r"cache is DynamicCache.* but .* cut for None"):
        small.generate(words, **options)
    with pytest.raises(RuntimeError, match="cut for other sizes of its inputs"):
        small(words[:, :1], use_cache=False)


def test_code_that_is_kept_takes_a_cache() -> None:
    model, inputs = causal("Phi3", **PHI3)
    options = {"importance": "random", "keep_class": "strict"}
    small, plan = cpd.prune(model, inputs, target="params=0.7", **options)
    assert not plan.forwards
    first, second = (
        small.generate(ids(), use_cache=cache, max_new_tokens=3, do_sample=False)
        for cache in (True, False)
    )
    assert first.tolist() == second.tolist()


def test_tied_embeddings_stay_tied() -> None:
    model, inputs = causal("Llama", **SIZES, **HEADS, tie_word_embeddings=True)
    small, plan = cpd.prune(model, inputs, importance="random", target="params=0.6")
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert plan.costs["params"][1] == sum(p.numel() for p in small.parameters())


@pytest.mark.slow
def test_layers_as_wide_as_those_of_seven_billion_parameters_are_planned_without_weights() -> None:
    """Two layers of Llama-2-7B's width: 667 million parameters, of which no byte is held."""
    import resource

    sizes = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 32,
    }  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
        inputs = {"input_ids": torch.zeros(1, 16, dtype=torch.long), "use_cache": False}
    groups = cpd.comb(model, inputs)
    scores = {g.name: torch.rand(g.size) for g in groups}
    plan = cpd.choose(groups, scores, "params=0.7")
    whole, left = plan.costs["params"]
    assert whole == sum(p.numel() for p in model.parameters()) == 666_914_816
    assert 0.69 < left / whole <= 0.7
    assert {"heads", "head dims", "channels"} <= {w.family for w in plan.widths}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 600 << 20  # the weights would be 2.5 GiB
