"""Comb: from a traced network to its coupling groups.

Every call of the graph passes its rule (`graph`), the relations are solved (`units`), classes of
channels with one signature become groups, and what the network's own Python code cannot follow is
found by trial and kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from .branches import find_branches
from .channels import Ids, components
from .errors import InputError, TraceError, UnknownName
from .graph import Pinned, Reader
from .groups import CouplingGroup, Groups, frozen_axes
from .handed import HandedOn
from .kinds import attended, named_families
from .labels import Labels, Layer
from .pins import freeze_computed_scales, pin_queries
from .replace import Replacements
from .sizes import Site, find_sites
from .solver import solve
from .terms import Terms, factors_of
from .trace import Inputs, Trace, named_tensors, trace, uncollected, used_tensors
from .trial import freeze_unfollowed
from .unheld import balance_shared, freeze_attentions, freeze_operands, freeze_unheld, uses
from .units import Family, Units


def comb(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    ignore: Iterable[str | nn.Module] = (),
    exact: bool = False,
    unknown: str = "freeze",
    keep_class: str = "loose",
    depth: bool = False,
) -> Groups:
    """Find the coupling groups of a network.

    Args:
        model: any network that `torch.export` can trace; it is not changed.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        ignore: modules, names or name patterns (`"layer4.*"`) whose output width stays.
        exact: also keep every axis that a statistic is taken across (LayerNorm, softmax or mean
            over channels), so that cutting equals zeroing.
        unknown: "freeze" keeps what an operator without a rule touches and says so; "error" refuses
            it.
        keep_class: "loose" lets a module whose code computes a size that no attribute holds run a
            forward as data, in a subclass of its class, and `nn.MultiheadAttention` become one with
            an inner width of its own; "strict" keeps their channels instead.
        depth: also find residual branches that may go whole (`groups.branches`); those that cannot
            are in `groups.kept_branches`, with the reason.

    Raises:
        InputError: the model does not run on the inputs, or `ignore` names nothing.
        TraceError: the model cannot be exported, or an operator is unknown with `unknown="error"`.
    """
    if unknown not in ("freeze", "error"):
        raise UnknownName("handling of unknown operators", unknown, ("freeze", "error"))
    if keep_class not in ("loose", "strict"):
        raise UnknownName("handling of classes", keep_class, ("loose", "strict"))
    ignored: list[str | nn.Module] = (
        [ignore] if isinstance(ignore, str | nn.Module) else list(ignore)
    )
    graph = trace(model, example_inputs)
    training = _training(model, graph, example_inputs)
    reader = Reader(graph, exact=exact, unknown=unknown)
    with uncollected():
        held = _read(model, reader, training, ignored)
        if keep_class == "strict":
            freeze_attentions(model, reader)
        replaced = Replacements(model, graph, reader.steps, strict=keep_class == "strict")
        groups = _combed(model, reader, replaced)
    groups.options.update(exact=exact, unknown=unknown, keep_class=keep_class)
    groups.options["ignore"] = [_name(model, x) for x in ignored]
    return find_branches(groups, held) if depth else groups


def _read(
    model: nn.Module, reader: Reader, training: Trace | None, ignored: list[str | nn.Module]
) -> set[str]:
    """Let every call pass its rule; return the tensors that the user wants to stay."""
    reader.used |= used_tensors(training) if training is not None else set()
    reader.read()
    if training is not None:
        reader.read_training(training)
    _note_unused(model, reader)
    _freeze_untouched(reader)
    return _freeze_ignored(model, reader, ignored)


def _combed(model: nn.Module, reader: Reader, replaced: Replacements) -> Groups:
    """Solve what was read, and keep what the network's own code cannot follow."""
    graph = reader.trace
    handed_on = HandedOn(model, graph)
    sites = find_sites(model, uses(reader), handed_on)
    freeze_unheld(reader, replaced, sites)
    balance_shared(reader, sites)
    freeze_operands(reader, sites, handed_on)
    freeze_computed_scales(model, reader, replaced)
    own_scale = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    pins = pin_queries(reader, replaced, own_scale)
    heads = attended(reader)
    units = solve(reader.channels)
    groups = _build(model, graph, reader, units, pins, replaced, sites)
    signature = _signatures(groups)
    units.families = [f for f in units.families if _in_tensors(units, f, signature)]
    units.families += _singles(units, signature)
    units.families = named_families(units, heads)
    units.keep_multiples()
    units.nonempty += _bound_layers(groups)
    freeze_unfollowed(groups)
    return finish(groups)


def _name(model: nn.Module, item: str | nn.Module) -> str:
    if isinstance(item, str):
        return item
    for name, module in model.named_modules():
        if module is item:
            return name
    raise InputError(f"ignore has a {type(item).__name__} that is no part of the model")


def _freeze_ignored(model: nn.Module, reader: Reader, ignore: list[str | nn.Module]) -> set[str]:
    """Keep the widths that the user wants to stay; return the tensors that were meant."""
    every: set[str] = set()
    consumed = _consumed(reader)
    names = [name for name, _ in named_tensors(model)]
    for item in ignore:
        pattern = _name(model, item)
        found = [
            n
            for n in names
            if n == pattern or n.startswith(f"{pattern}.") or fnmatchcase(n, pattern)
        ]
        if not found:
            modules = [name for name, _ in model.named_modules() if name]
            raise UnknownName("module or tensor to ignore", pattern, modules)
        every |= {reader.trace.aliases[name] for name in found}
        for first in {reader.trace.aliases[name] for name in found}:
            made = [x for x in reader.labels[first].layers if (first, x.owner) not in consumed]
            for layer in made:
                reader.channels.freeze(layer.ids, "ignored by the user")
    return every


def _training(model: nn.Module, graph: Trace, example_inputs: Inputs) -> Trace | None:
    """Trace the network as it trains where evaluation leaves out whole modules (auxiliary heads):
    they read channels that others make.
    """
    used = {name.rpartition(".")[0] for name in used_tensors(graph)}
    held = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    if held <= used:
        return None
    try:
        return trace(model, example_inputs, training=True)
    except (TraceError, InputError) as error:
        warnings.warn(
            f"{min(held - used)} is not used in evaluation, and how it is in training cannot be "
            f"traced. If training uses it, the cut network may not train. {error}",
            stacklevel=3,
        )
        return None


def _note_unused(model: nn.Module, reader: Reader) -> None:
    """A tensor that no call reads has no ids: it is known, and kept as it is."""
    for name, tensor in named_tensors(model):
        name = reader.trace.aliases[name]
        reader.labels.setdefault(name, Labels(tuple(tensor.shape)))


def _freeze_untouched(reader: Reader) -> None:
    """Keep what no operator computes with: the end of a table that these inputs do not reach."""
    layers = [layer for labels in reader.labels.values() for layer in labels.layers]
    if layers:
        ids = np.concatenate([layer.ids.ravel() for layer in layers])
        reason = "nothing computes with it for these inputs"
        reader.channels.freeze(reader.channels.unused(ids), reason)


def _consumed(reader: Reader) -> set[tuple[str, int]]:
    """Return the (tensor, owner axis) pairs whose layers read channels that others make."""
    read = np.zeros(reader.channels.count, bool)
    for ids in reader.consumed:
        read[ids.ravel()] = True
    found = set()
    for name, labels in reader.labels.items():
        for layer in labels.layers:
            if read[layer.ids].any():
                found.add((name, layer.owner))
    return found


def _build(
    model: nn.Module,
    graph: Trace,
    reader: Reader,
    units: Units,
    pins: list[Pinned],
    replaced: Replacements,
    sites: list[Site],
) -> Groups:
    costs = {
        "macs": Terms(reader.macs, per=max(graph.batch, 1)),
        "params": _param_terms(model, reader),
    }
    return Groups(
        trace=graph,
        units=units,
        labels=reader.labels,
        steps=reader.steps,
        sites=sites,
        pins=pins,
        replaced=replaced,
        costs=costs,
        groups=(),
        frozen=(),
        options={},
        consumed=_consumed(reader),
        activation=reader.activation,
        model=model,
    )


def _param_terms(model: nn.Module, reader: Reader) -> Terms:
    named = model.named_parameters()
    return Terms(factors_of(reader.labels[reader.trace.aliases[n]], p.shape) for n, p in named)


def finish(groups: Groups) -> Groups:
    """Form groups of the units that can go, and list what stays with its reasons."""
    units = groups.units
    families = units.families
    closures = [units.closure(np.concatenate(family.clusters).tolist()) for family in families]
    firsts = [np.full(len(closure), closure[0]) for closure in closures]
    empty = [np.empty(0, np.int64)]
    component = components(
        units.count, np.concatenate(firsts or empty), np.concatenate(closures or empty)
    )
    numbers: dict[int, list[int]] = {}
    for number, closure in enumerate(closures):
        numbers.setdefault(int(component[closure[0]]), []).append(number)
    made = []
    for mine in numbers.values():
        classes = np.unique(np.concatenate([closures[k] for k in mine]))
        made.append((classes, tuple(families[k] for k in mine)))
    groups.groups = _named(groups, made)
    groups.frozen = tuple(frozen_axes(groups, closures))
    return groups


def _named(groups: Groups, made: list[tuple[Ids, tuple[Family, ...]]]) -> tuple[CouplingGroup, ...]:
    """Name each group after the first tensor that makes its channels, and order them so."""
    tensors = list(groups.labels)
    first = _first_tensors(groups)
    kinds = _layer_kinds(groups, made)
    made_at = sorted(range(len(made)), key=lambda k: (int(first[made[k][0]].min()), k))
    taken: dict[str, int] = {}
    result = []
    for k in made_at:
        classes, families = made[k]
        tensor = tensors[int(first[classes].min()) % len(tensors)]
        name = tensor.rpartition(".")[0] or tensor
        taken[name] = taken.get(name, 0) + 1
        name = name if taken[name] == 1 else f"{name}#{taken[name]}"
        kind = (tuple(family.kind for family in families), kinds[k])
        result.append(CouplingGroup(name, classes, families, kind, groups))
    return tuple(result)


def _in_tensors(units: Units, family: Family, signature: np.ndarray) -> bool:
    """Say whether a family runs through any tensor: what a forward makes on the spot alone has
    none.
    """
    return bool(signature[units.closure(np.concatenate(family.clusters).tolist())].any())


def _singles(units: Units, signature: np.ndarray) -> list[Family]:
    """Channels bound to no row or column: one family for each set of tensors they run through."""
    free = np.flatnonzero((units.fold_of < 0) & (signature != 0))
    families = []
    order = free[np.argsort(signature[free], kind="stable")]
    if not len(order):
        return []
    cuts = np.flatnonzero(np.diff(signature[order])) + 1
    for classes in np.split(order, cuts):
        left = classes[units.frozen[classes] < 0]
        if len(left):
            families.append(Family("channels", (left,), len(classes)))
    return families


def _bound_layers(groups: Groups) -> list[Ids]:
    """Axes that run through rows: a family may be wider than they are, so they must not vanish."""
    units, found = groups.units, {}
    for labels in groups.labels.values():
        for layer in labels.layers:
            classes = np.unique(units.label[layer.ids])
            if (units.fold_of[classes] >= 0).any() and not (units.frozen[classes] >= 0).any():
                found[classes.tobytes()] = classes
    return list(found.values())


def _signatures(groups: Groups) -> np.ndarray:
    """Return for each class a hash of the layers that it runs through; 0 where it runs through
    none.
    """
    generator = np.random.default_rng(0)
    total = np.zeros(groups.units.count, np.uint64)
    for labels in groups.labels.values():
        for layer in labels.layers:
            word = generator.integers(1, 2**63, dtype=np.uint64)
            classes = np.unique(groups.units.label[layer.ids])
            total[classes] += word
    return total


def _layers(groups: Groups) -> Iterable[tuple[int, str, Layer, Ids]]:
    """Return every layer of every tensor: (number of the tensor, its name, layer, classes)."""
    for number, (tensor, labels) in enumerate(groups.labels.items()):
        for layer in labels.layers:
            yield number, tensor, layer, groups.units.label[layer.ids]


def _first_tensors(groups: Groups) -> Ids:
    """Return for each class the number of the first tensor that makes it.

    Weights of layers come first, then what else makes channels (biases, norms, tables), then
    readers.
    """
    count = len(groups.labels)
    weights = {tensor for tensor, _ in groups.consumed}
    first = np.full(groups.units.count, 3 * count, np.int64)
    for number, tensor, layer, classes in _layers(groups):
        reads = (tensor, layer.owner) in groups.consumed
        late = 2 * count if reads else 0 if tensor in weights else count
        first[classes] = np.minimum(first[classes], number + late)
    return first


def _layer_kinds(
    groups: Groups, made: list[tuple[Ids, tuple[Family, ...]]]
) -> list[tuple[object, ...]]:
    """Return what structurally identical groups share: kinds of layers and axes, not sizes or
    names.
    """
    owner = np.full(groups.units.count, -1, np.int64)
    for number, (classes, _) in enumerate(made):
        owner[classes] = number
    keys: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in made]
    for _, tensor, layer, classes in _layers(groups):
        path, _, leaf = tensor.rpartition(".")
        key = (type(groups.model.get_submodule(path)).__name__, leaf, layer.axes)
        for number in np.unique(owner[classes]).tolist():
            if number >= 0:
                keys[number].append(key)
    return [tuple(sorted(key)) for key in keys]
