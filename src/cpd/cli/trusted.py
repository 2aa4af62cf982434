"""What a folder may say of the network it was made from: a known name, and numbers for known keys.

A folder is untrusted. What is not listed here has to be typed.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpd.cli.models import LIBRARIES
from cpd.errors import ArtefactError, InputError
from cpd.reading import contents

__all__ = ["network", "notes"]

LIMITS = {"manifest.json": 1 << 20, "config.yaml": 1 << 18}  # bytes
DEEPEST = 32  # of a configuration; a recipe has some six levels
LARGEST = 1 << 20  # of a number: widths and vocabularies are smaller
MOST_ENTRIES = 64  # of a list: one for each stage or layer
MOST_LAYERS = 1 << 9
OF_LAYERS = {
    "block_config", "decoder_layers", "depth", "depths", "encoder_layers", "layers", "n_layer",
    "n_layers", "num_decoder_layers", "num_encoder_blocks", "num_hidden_layers", "num_layers",
}  # fmt: skip
DROPPED = {"timm": ("pretrained",)}  # says where weights come from, and the folder has them
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}", re.ASCII)
# Keys whose values are names of layers, which the libraries look up in tables of their own.
WORDS = {
    "timm": {"act_layer", "global_pool", "norm_layer"},
    "hf": {"feedforward_activation", "hidden_act", "activation", "activation_function"},
}
# Keys whose values are numbers, yes or no, or lists of numbers.
NUMBERS = {
    "timm": {
        "base_width", "block_size", "cardinality", "channels", "class_token", "depth", "depths",
        "dims", "drop_block_rate", "drop_path_rate", "drop_rate", "embed_dim", "global_pool_size",
        "growth_rate", "head_hidden_size", "img_size", "in_chans", "init_values", "layers",
        "mlp_ratio", "num_classes", "num_features", "num_heads", "output_stride", "patch_size",
        "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "qk_norm", "qkv_bias", "reg_tokens",
        "stem_width", "strict_img_size", "width", "widths", "window_size",
    },
    "torchvision": {
        "attention_dropout", "aux_logits", "aux_loss", "block_config", "bn_size", "depths",
        "dropout", "drop_rate", "embed_dim", "growth_rate", "groups", "image_size", "init_weights",
        "mlp_ratio", "num_classes", "num_heads", "num_init_features", "patch_size",
        "reduced_tail", "replace_stride_with_dilation", "stochastic_depth_prob",
        "transform_input", "width_mult", "width_per_group", "window_size",
        "zero_init_residual",
    },
    "hf": {
        "attention_dropout", "attention_probs_dropout_prob", "classifier_dropout",
        "classifier_dropout_prob", "d_ff", "d_kv", "d_model", "decoder_attention_heads",
        "decoder_ffn_dim", "decoder_hidden_size", "decoder_layers", "depths", "dim", "dropout",
        "embed_dim", "embedding_size", "encoder_attention_heads", "encoder_ffn_dim",
        "encoder_layers", "ffn_dim", "head_dim", "hidden_dim", "hidden_dropout_prob", "hidden_size",
        "hidden_sizes", "image_size", "initializer_range", "intermediate_size", "layer_norm_eps",
        "max_position_embeddings", "mlp_ratio", "mlp_ratios", "n_embd", "n_head", "n_heads",
        "n_inner", "n_layer", "n_layers", "n_positions", "num_attention_heads", "num_channels",
        "num_decoder_layers", "num_encoder_blocks", "num_heads", "num_hidden_layers",
        "num_key_value_heads", "num_labels", "num_layers", "patch_size", "patch_sizes", "qkv_bias",
        "rms_norm_eps", "sr_ratios", "strides", "tie_word_embeddings", "type_vocab_size",
        "vocab_size", "window_size",
    },
    "cpd": {
        "auxiliary", "channels", "depths", "drop_path", "final_norm", "fused", "heads",
        "image_size", "in_chans", "key_dims", "num_classes", "pools", "ratios", "scales", "stem",
        "stride", "taken",
    },
}  # fmt: skip
NUMBERS["cpd"] |= NUMBERS["hf"]  # some of ours take the keys of theirs


def notes(path: Path) -> Any:
    """What a manifest (JSON) or a configuration (YAML) in a folder holds.

    Raises:
        ArtefactError: it cannot be read, is too large, or is another kind of file.
    """
    data = contents(path, LIMITS[path.name], "Give a folder that cpd wrote.")
    try:
        return json.loads(data) if path.suffix == ".json" else _yaml(data.decode())
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise ArtefactError(f"{path} cannot be read: {said}. cpd did not write it so") from error


def _yaml(text: str) -> Any:
    """YAML without references, by which a short text may stand for a very long one, and not deep,
    as its reader takes ever longer for every level.
    """
    import yaml

    deep = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            deep += isinstance(event, yaml.CollectionStartEvent)
            deep -= isinstance(event, yaml.CollectionEndEvent)
            if deep > DEEPEST or isinstance(event, yaml.AliasEvent):
                raise ValueError("it refers to parts of itself, or is nested too deep")
        return yaml.safe_load(text)
    except (yaml.YAMLError, AttributeError) as error:  # a date such as 1-1-1 is an AttributeError
        raise ValueError(str(error)) from error


def network(folder: Path, found: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the network that a folder names, if nothing but a network can come of
    them: a name that a known library lists, and numbers or names of layers for known keys.

    Raises:
        InputError: anything else, which has to be typed.
    """
    spec, given = str(found["model"])[:200], found.get("model_args") or {}
    library, _, name = spec.partition(":")
    if library not in LIBRARIES:
        raise InputError(
            f"{folder} names {spec!r}, which is code of your own: only what you type is imported. "
            f"Give --model {spec} if you trust it"
        )
    if not NAME.fullmatch(name) or (library == "hf" and name not in _kinds()):
        raise InputError(
            f"{folder} names {spec!r}, which is no network that {library} lists, and may be a path "
            f"or a place on a hub: only what you type is read. Give --model {spec} if you trust it"
        )
    if not isinstance(given, Mapping):
        raise InputError(f"{folder}: model_args are {type(given).__name__}, not names and values")
    args = {key: value for key, value in given.items() if key not in DROPPED.get(library, ())}
    for key, value in args.items():
        if not _harmless(library, key, value):
            raise InputError(
                f"{folder} makes its network with {reprlib.repr(key)}={reprlib.repr(value)}, which "
                "is not known to be harmless (it may name a file, or code): only what you type is "
                f"used. Give --model {spec} and its --model_args"
            )
    return spec, args


def _kinds() -> list[str]:
    """The kinds of model that transformers itself has."""
    import transformers

    return list(transformers.CONFIG_MAPPING.keys())


def _harmless(library: str, key: object, value: object) -> bool:
    """Whether a key takes numbers and has them, or takes the name of a layer and has one."""
    if key in WORDS.get(library, ()) and isinstance(value, str):
        return WORD.fullmatch(value) is not None
    entries: list[Any] = value if isinstance(value, list) else [value]
    most = MOST_LAYERS if key in OF_LAYERS else LARGEST
    small = len(entries) <= MOST_ENTRIES and all(_within(entry, most) for entry in entries)
    if small and key in OF_LAYERS:  # one number for each stage: it has their sum
        small = sum(abs(entry or 0) for entry in entries) <= most
    return key in NUMBERS[library] and small


def _within(value: object, most: int) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) <= most)
