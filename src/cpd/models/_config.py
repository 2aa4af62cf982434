"""A smaller configuration of the same class, where one describes a cut network.

Layers that are alike keep the same number under `choose(uniform=True)`. Then the network may be
what its own class builds from other numbers. They are found by trying: every number of the present
configuration that is the width of something the plan changed is replaced by what is left of it, and
the class is built without memory until all tensors have the shapes of the cut network. It is proved
by building it for real, loading the cut network's weights, and comparing outputs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from cpd import _torchvision
from cpd.plan import Plan

TRIES = 200
Build = Callable[[Mapping[str, Any]], nn.Module]


@dataclass(frozen=True)
class Config:
    """What builds a cut network: `values` are the numbers that differ from the original's.

    `library`: "timm" or "transformers"; `name`: the entry point, or the class; `args`: the keywords
    it was called with before.
    """

    library: str
    name: str
    values: dict[str, Any]
    args: dict[str, Any] = field(default_factory=dict)
    _build: Build | None = field(default=None, repr=False, compare=False)

    def build(self) -> nn.Module:
        """Return the network, with weights as its class makes them."""
        assert self._build is not None
        return self._build(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        values = {**self.args, **self.values}
        return {"library": self.library, "name": self.name, "values": values}

    def __str__(self) -> str:
        words = ", ".join(f"{k}={v!r}" for k, v in {**self.args, **self.values}.items())
        if self.library == "timm":
            return f"timm.create_model({self.name!r}, {words})"
        return f"{self.name}({words})"


def smaller(
    model: nn.Module, small: nn.Module, plan: Plan, args: Mapping[str, Any] | None = None
) -> Config | None:
    """Return the configuration of the model's class that describes its cut, or None.

    Args:
        model: the unpruned network, of timm or transformers.
        small: what `cut(model, plan)` gave.
        plan: best chosen with `uniform=True`; others seldom have a configuration.
        args: the keywords that timm's entry point was called with.
    """
    found = _of_transformers(model) or _of_timm(model, dict(args or {}))
    if found is None or plan.branches:
        return None
    kind, known, build = found
    for values in itertools.islice(_others(known, _replacements(model, plan)), TRIES):
        if _fits(build, values, small, plan):
            least = _least(values, lambda some: _fits(build, some, small, plan))
            return Config(*kind, least, dict(args or {}), build)
    return None


def sentence(found: Config | None) -> str:
    """Say which configuration of its class builds a cut network."""
    return f"the same as {found}" if found else "no configuration of its class builds it"


def _least(values: dict[str, Any], fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Leave out what need not change."""
    for name in list(values):
        rest = {key: value for key, value in values.items() if key != name}
        if len(values) > 1 and fits(rest):
            values = rest
    return values


def _fits(build: Build, values: Mapping[str, Any], small: nn.Module, plan: Plan) -> bool:
    """Say whether a configuration builds what takes the cut network's weights and acts alike."""
    wanted = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
    return _shapes(build, values) == wanted and _same(build(values), small, plan)


def _replacements(model: nn.Module, plan: Plan) -> dict[int, list[int]]:
    """Width before -> what may stand in its place: units, tensors' sizes, attributes of modules."""
    pairs = [(w.before, w.after) for w in plan.widths]
    for name in plan.kept:
        pairs += zip(plan.shapes[name], plan.new_shape(name), strict=True)
    for path, values in plan.attributes.items():
        held = vars(model.get_submodule(path))
        pairs += [(held[name], new) for name, new in values.items() if type(new) is int]
    found: dict[int, list[int]] = {}
    for old, new in dict.fromkeys(pairs):
        found.setdefault(old, []).extend([new] if new != old else [])
    return found


def _others(known: Mapping[str, Any], new: Mapping[int, list[int]]) -> Iterator[dict[str, Any]]:
    """Other configurations: one number changed, then all that may, and ever fewer of them."""
    choices = {name: _changed(value, new) for name, value in known.items()}
    names = [name for name, options in choices.items() if options]
    for count in [1, *range(len(names), 1, -1)] if names else ():
        for some in itertools.combinations(names, count):
            for values in itertools.product(*(choices[name] for name in some)):
                yield dict(zip(some, values, strict=True))


def _changed(value: Any, new: Mapping[int, list[int]]) -> list[Any]:
    """What may stand in place of a value: a width, a list of them, or a ratio of two."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return list(new.get(value, ()))
    if isinstance(value, float):
        return _ratios(value, new)
    if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        options = [new.get(x, [x]) for x in value]
        every = itertools.islice(itertools.product(*options), 16)
        return [type(value)(x) for x in every if list(x) != list(value)]
    return []


def _ratios(value: float, new: Mapping[int, list[int]]) -> list[float]:
    """Ratios of a hidden width to an embedding, after; the embedding may be as it was."""
    found: dict[float, None] = {}
    for (hidden, afters), (base, belows) in itertools.product(new.items(), new.items()):
        if int(base * value) != hidden:
            continue
        for after, below in itertools.product([*afters, hidden], [*belows, base]):
            ratio = after / below
            found[ratio if int(below * ratio) == after else (after + 0.5) / below] = None
    return [ratio for ratio in found if ratio != value]


def _shapes(build: Build, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    try:
        with torch.device("meta"):
            made = build(values)
    except Exception:  # noqa: BLE001 - numbers that its class refuses describe nothing
        return None
    return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}


def _same(made: nn.Module, small: nn.Module, plan: Plan) -> bool:
    """Say whether a network computes with the cut network's weights what that computes."""
    from torch.utils._pytree import tree_leaves, tree_map_only

    if plan.groups is None:
        return True
    kinds = [x.dtype for x in small.parameters() if x.is_floating_point()]
    first = next(small.parameters(), torch.empty(0))
    made = (made.to(kinds[0]) if kinds else made).to(first.device)
    made.load_state_dict(small.state_dict())
    inputs = (plan.groups.trace.args, plan.groups.trace.kwargs)
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(first.device), inputs)
    modes = [(module, module.training) for module in small.modules()]
    try:
        with torch.no_grad():
            pairs = zip(
                tree_leaves(made.eval()(*args, **kwargs)),
                tree_leaves(small.eval()(*args, **kwargs)),
                strict=True,
            )
            both = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
    finally:
        for module, training in modes:
            module.training = training
    return all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5) for a, b in both)


Found = tuple[tuple[str, str], Mapping[str, Any], Build]


def _of_transformers(model: nn.Module) -> Found | None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or not type(model).__module__.startswith("transformers."):
        return None

    def build(values: Mapping[str, Any]) -> nn.Module:
        other = copy.deepcopy(config)
        for name, value in values.items():
            setattr(other, name, value)
        made: nn.Module = type(model)(other)
        return made

    known = {name: getattr(config, name) for name in config.to_dict() if hasattr(config, name)}
    return ("transformers", type(config).__name__), known, build


def _of_timm(model: nn.Module, args: dict[str, Any]) -> Found | None:
    given: Any = getattr(model, "pretrained_cfg", None) or {}
    name = given.get("architecture") if hasattr(given, "get") else None
    if not name or not type(model).__module__.startswith("timm."):
        return None
    _torchvision.ensure()
    import timm

    args = {key: value for key, value in args.items() if key != "pretrained"}

    def build(values: Mapping[str, Any]) -> nn.Module:
        made: nn.Module = timm.create_model(name, **{**args, **values})
        return made

    return ("timm", name), _called_with(type(model), build), build


def _called_with(kind: type[nn.Module], build: Build) -> dict[str, Any]:
    """The arguments that a class is made with, defaults too, seen while it is being made."""
    import inspect

    original, seen = kind.__init__, dict[str, Any]()

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        bound.apply_defaults()
        seen.update(bound.arguments)
        original(self, *args, **kwargs)

    with patch.object(kind, "__init__", spy), torch.device("meta"):
        build({})
    return seen
