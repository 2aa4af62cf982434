"""transformers: text and sound. Small random configurations of every kind of attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .network import Built, Network

WORDS = 100  # vocabulary
LENGTH = 12
SMALL = {
    "vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
CAUSAL = {**SMALL, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**CAUSAL, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}


def build(model: str, config: str, options: dict[str, Any]) -> Built:
    """Return a model of a small configuration and two texts."""
    import transformers

    options = dict(options)
    experts = options.pop("experts", None)
    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    if experts:
        made.set_experts_implementation(experts)
    inputs = {
        "input_ids": torch.randint(3, WORDS, (2, LENGTH)),
        "attention_mask": torch.ones(2, LENGTH, dtype=torch.long),
    }
    if model.startswith("Mamba"):
        del inputs["attention_mask"]
    return made, inputs


def t5() -> Built:
    """Return encoder and decoder with tied embeddings."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=WORDS, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, use_cache=False,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    texts = torch.randint(3, WORDS, (2, LENGTH))
    return T5ForConditionalGeneration(config), {
        "input_ids": texts,
        "decoder_input_ids": texts[:, :6],
    }


def whisper() -> Built:
    """Return encoder and decoder, on two spectra of 100 frames."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=WORDS, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16,
        max_source_positions=50, max_target_positions=32, use_cache=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {
        "input_features": torch.randn(2, 16, 100),
        "decoder_input_ids": torch.randint(3, WORDS, (2, 6)),
    }
    return WhisperForConditionalGeneration(config), inputs


def _entry(name: str, model: str, config: str, options: dict[str, Any]) -> Network:
    return Network(f"transformers:{name}", partial(build, model, config, options), note=model)


MOE = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **CAUSAL, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
GPT2 = {
    "vocab_size": WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "use_cache": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DISTIL = {
    "vocab_size": WORDS, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128,
    "max_position_embeddings": 64,
}  # fmt: skip
MAMBA = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
    "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

NETWORKS = (
    _entry("bert", "BertForSequenceClassification", "BertConfig", SMALL),
    _entry("bert_mlm", "BertForMaskedLM", "BertConfig", SMALL),
    _entry("distilbert", "DistilBertForMaskedLM", "DistilBertConfig", DISTIL),
    _entry("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2),
    Network("transformers:t5", t5, note="T5ForConditionalGeneration"),
    _entry("llama_mha", "LlamaForCausalLM", "LlamaConfig", {**CAUSAL, "num_key_value_heads": 4}),
    _entry("llama_gqa", "LlamaForCausalLM", "LlamaConfig", GROUPED),
    _entry("llama_tied", "LlamaForCausalLM", "LlamaConfig",
           {**GROUPED, "tie_word_embeddings": True}),
    _entry("qwen3", "Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    _entry("phi3", "Phi3ForCausalLM", "Phi3Config", GROUPED),
    _entry("mixtral", "MixtralForCausalLM", "MixtralConfig", MOE),
    _entry("mixtral_batched", "MixtralForCausalLM", "MixtralConfig",
           {**MOE, "experts": "batched_mm"}),
    _entry("deepseek_v3_batched", "DeepseekV3ForCausalLM", "DeepseekV3Config",
           {**DEEPSEEK, "experts": "batched_mm"}),
    _entry("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    Network("transformers:whisper", whisper, note="WhisperForConditionalGeneration"),
    _entry("mamba", "MambaForCausalLM", "MambaConfig", MAMBA),
)  # fmt: skip
