"""Names from the shell → networks, data and other objects. Nothing else knows these strings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpd import _torchvision
from cpd.errors import InputError, UnknownName

__all__ = ["Source", "imported", "named"]

HEADS = ("SemanticSegmentation", "ImageClassification", "SequenceClassification")  # of transformers
FORMS = "timm:NAME, torchvision:NAME, hf:CONFIG, cpd:NAME or package.module:callable"


@dataclass(frozen=True)
class Source:
    """Where a network comes from; calling it makes the network.

    Attributes:
        spec: the name as typed. args: keyword arguments that go with every call.
    """

    spec: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, **more: Any) -> nn.Module:
        """Make the network.

        Raises:
            UnknownName: the library has no network of that name.
            InputError: no such library, form or argument.
        """
        library, _, name = self.spec.partition(":")
        if not name:
            raise InputError(f"MODEL is {FORMS}; got {self.spec!r}")
        make = LIBRARIES.get(library)
        args = {**self.args, **more}
        try:
            made = imported(self.spec)(**args) if make is None else make(name, args)
        except (TypeError, ModuleNotFoundError) as error:
            if isinstance(error, ModuleNotFoundError) and make is not None:
                raise InputError(
                    f"{self.spec} needs the package {error.name!r}: install it, or cpd[vision]"
                ) from error
            raise InputError(f"cannot make {self.spec} with {args}: {error}") from error
        if not isinstance(made, nn.Module):
            raise InputError(f"{self.spec} gave {type(made).__name__}, not a network (nn.Module)")
        return made

    def inputs(self, model: nn.Module, shape: str | list[int] | None, batch: int = 2) -> Any:
        """Example inputs: of a shape (without the batch axis), or as the library says.

        Raises:
            InputError: nobody says which shape; give one.
        """
        if shape is not None:
            return torch.randn(batch, *_sizes(shape))
        library = self.spec.partition(":")[0]
        if library == "torchvision":
            return torch.randn(batch, 3, *_square(self.args.get("image_size", 224)))
        if library == "timm":
            return torch.randn(batch, *_timm_shape(model, self.args))
        if library == "hf" and getattr(model, "main_input_name", "") == "pixel_values":
            config: Any = model.config
            sizes = _square(getattr(config, "image_size", 224))
            pixels = torch.randn(batch, getattr(config, "num_channels", 3), *sizes)
            return {"pixel_values": pixels}
        dummy: Any = getattr(model, "dummy_inputs", None)
        if library == "hf" and isinstance(dummy, Mapping):
            return dict(dummy)
        raise InputError(f"which inputs does {self.spec} take? Give --input_shape, e.g. 3,224,224")


def _sizes(shape: str | list[int]) -> list[int]:
    """ "3,224,224" or a list of numbers."""
    parts = shape.strip("[]() ").split(",") if isinstance(shape, str) else shape
    try:
        sizes = [int(part) for part in parts]
    except ValueError as error:
        raise InputError(f"--input_shape must be like 3,224,224, got {shape!r}") from error
    if min(sizes, default=0) < 1:
        raise InputError(f"--input_shape must be sizes of at least 1, got {shape!r}")
    return sizes


def _square(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _timm_shape(model: nn.Module, args: Mapping[str, Any]) -> tuple[int, ...]:
    given: Any = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = given.get("input_size", (3, 224, 224))
    if "img_size" in args:
        size = list(_square(args["img_size"]))
    return (args.get("in_chans", channels), *size)


def _from_timm(name: str, args: dict[str, Any]) -> nn.Module:
    _torchvision.ensure()
    import timm

    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    made: nn.Module = timm.create_model(name, **args)
    return made


def _from_torchvision(name: str, args: dict[str, Any]) -> nn.Module:
    _torchvision.ensure()
    from torchvision import models

    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        args = {"weights_backbone": None, **args}  # else ImageNet's are downloaded
    made: nn.Module = models.get_model(name, **args)
    return made


def _unknown(library: str, name: str, valid: list[str]) -> UnknownName:
    """The nearest of very many names."""
    near = get_close_matches(name, valid, n=12, cutoff=0.3) or valid[:12]
    return UnknownName(
        f"network of {library} ({len(valid)} in all; the nearest are listed):", name, near
    )


def _from_hf(name: str, args: dict[str, Any]) -> nn.Module:
    """A network of random weights: from a kind of model, a file, or a hub's OWNER/NAME.

    It is a classifier where there is one, unless ``architectures`` of the configuration names
    another of ``HEADS``.
    """
    _torchvision.ensure()
    import transformers

    kinds = list(transformers.CONFIG_MAPPING.keys())
    if name in kinds:
        config = transformers.AutoConfig.for_model(name, **args)
    elif not Path(name).exists() and ("/" not in name or name.endswith(".json")):
        raise _unknown("transformers", name, kinds)
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(name, **args)
        except OSError as error:
            raise InputError(f"cannot read the configuration hf:{name}: {error}") from error
    said = getattr(config, "architectures", None) or ()
    for head in HEADS:
        shelf = getattr(transformers, f"MODEL_FOR_{_snake(head)}_MAPPING")
        there = type(config) in shelf
        asked = there and getattr(shelf[type(config)], "__name__", "") in said
        if asked or (there and head.endswith("Classification")):
            made: nn.Module = getattr(transformers, f"AutoModelFor{head}").from_config(config)
            return made
    plain: nn.Module = transformers.AutoModel.from_config(config)
    return plain


def _snake(name: str) -> str:
    split = "".join(f"_{letter}" if letter.isupper() else letter for letter in name)
    return split.strip("_").upper()


def _from_cpd(name: str, args: dict[str, Any]) -> nn.Module:
    try:
        shelf = importlib.import_module("cpd.models").SHELF
    except ModuleNotFoundError:
        shelf = {}
    if name not in shelf:
        raise UnknownName("network of cpd", name, shelf)
    made: nn.Module = shelf[name](**args)
    return made


LIBRARIES: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "hf": _from_hf,
    "cpd": _from_cpd,
}


def imported(spec: str) -> Any:
    """The object that ``package.module:name`` means; the module is imported.

    Raises:
        InputError: no such module, or nothing of that name in it.
    """
    module, _, name = spec.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        known = ", ".join(f"{library}:NAME" for library in LIBRARIES)
        raise InputError(
            f"cannot import {module!r} of {spec!r}: {error}. A network is {known} or "
            "package.module:callable"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"module {module} has no {name!r}")
        found = getattr(found, part)
    return found


def named(kind: str, value: Any) -> Any:
    """A value of the YAML; ``package.module:name`` in it becomes the object.

    ``kind`` is the key: "data" and "task" are called with their options, "teacher" becomes a
    network (its option ``weights`` is a safetensors file with its tensors), others ("importance",
    "losses") stay the callable. A mapping of one such name to its options works too.
    """
    spec: Any = value
    options: Mapping[str, Any] = {}
    if isinstance(value, Mapping) and len(value) == 1:
        spec, options = next(iter(value.items()))
        options = options or {}
    if not isinstance(spec, str) or ":" not in spec:
        return value
    if kind == "teacher":
        from cpd.compress import load_weights

        args = dict(options)
        weights = args.pop("weights", None)
        teacher = Source(spec, args)()
        if weights is not None:
            load_weights(teacher, weights)
        return teacher
    found = imported(spec)
    if kind not in ("data", "task"):
        return found
    return found(**options) if callable(found) else found
