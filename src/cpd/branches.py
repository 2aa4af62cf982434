"""Branches: residual branches that may go whole.

In `x + f(x)` the branch f may vanish: with all of its own tensors at zero it puts out zero, and x
is left. A branch is found in the traced graph, from the addition backwards: all calls that nothing
else reads. It may go where each of these holds:

- x itself goes into it, so that what is left is the identity;
- its tensors are read by nothing else, and zero in them makes its output zero, whatever comes in;
- the forward of the module that adds can be had as data (`replace`), and without the addition it
  calls nothing of the branch any more.

A branch has a class of its own beside the classes of channels: with it goes all that is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from .aliases import base, op_name, writes
from .calls import Uncapturable
from .channels import Ids
from .drop import Addition, addition, called, dropped
from .graph import place_of
from .labels import Layer
from .literals import Disagreement
from .replace import Replacements, Template
from .rules import Factor
from .terms import Terms, factors_of
from .trace import Trace, location
from .units import Family, Units
from .vanish import Vanishing

if TYPE_CHECKING:
    from .groups import Groups

KIND = "branches"


@dataclass(frozen=True)
class Place:
    """Where a branch is: the module whose code adds, the addition, what is left of it, the calls
    that go, and the first names of their tensors.
    """

    name: str
    path: str
    add: fx.Node
    stays: int
    nodes: frozenset[fx.Node]
    tensors: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Branch:
    """A residual branch that may go whole, with all of `tensors`. `number` is its class, `id` the
    id of that, `inside` the classes of channels that are in it alone.
    """

    place: Place
    tensors: tuple[str, ...]
    number: int
    id: int
    inside: Ids
    family: Family
    template: Template
    addition: Addition

    @property
    def name(self) -> str:
        """The module that adds, and which of its branches it is: "blocks.3:2"."""
        return self.place.name

    @property
    def kind(self) -> tuple[object, ...]:
        """What branches have in common that are alike: the operators of their calls, in order."""
        calls = (x for x in self.place.add.graph.nodes if x.op == "call_function")
        return (KIND, *(op_name(x) for x in calls if x in self.place.nodes))


@dataclass(frozen=True)
class KeptBranch:
    """A residual branch that cannot go whole, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def find_branches(groups: Groups, ignored: Iterable[str] = ()) -> Groups:
    """Give groups the branches of their network, and list those that cannot go, with the reason."""
    groups.options["depth"] = True
    found, held = [], []
    finder = _Finder(groups, set(ignored))
    for place in places(groups.trace):
        try:
            found.append(finder.branch(place))
        except Uncapturable as reason:
            held.append(KeptBranch(place.name, str(reason)))
    groups.branches, groups.kept_branches = tuple(found), tuple(held)
    if found:
        _gate(groups)
    return groups


def _gate(groups: Groups) -> None:
    """Let what is behind a branch cost nothing once it has gone."""
    gates: dict[Any, tuple[Factor, ...]] = {}
    for branch in groups.branches:
        factor = Factor(Layer((0,), np.array([branch.id])), 0)
        for at in (*branch.place.nodes, *branch.tensors):
            gates[at] = (*gates.get(at, ()), factor)
    groups.gates = gates
    mine = [step for step in groups.steps if step.node.graph is groups.trace.graph]
    macs = [(n, (*x, *gates.get(step.node, ()))) for step in mine for n, x in step.macs]
    sized = [
        (parameter, groups.labels[groups.trace.aliases[name]], gates.get(name, ()))
        for name, parameter in groups.model.named_parameters()
    ]
    params = ((factors_of(labels, p.shape), more) for p, labels, more in sized)
    groups.costs = {
        "macs": Terms(macs, per=max(groups.trace.batch, 1)),
        "params": Terms((times, (*factors, *more)) for (times, factors), more in params),
    }


def places(trace: Trace) -> Iterator[Place]:
    """Return every addition of a value and of what is computed from it with tensors of its own."""
    nodes = list(trace.graph.nodes)
    order = {node: k for k, node in enumerate(nodes)}
    counts: dict[str, int] = {}
    for node in nodes:
        if node.op != "call_function" or op_name(node) not in ("add", "add_"):
            continue
        both = [x for x in node.args if isinstance(x, fx.Node)]
        if len(both) != 2 or node.kwargs or _shape(both[0]) != _shape(both[1]):
            continue
        path = location(node)[0]
        for stays in (0, 1):
            nodes_of = _behind(nodes[: order[node]], both[1 - stays], node)
            outside = {x for y in nodes_of for x in y.all_input_nodes} - nodes_of
            held = tuple(dict.fromkeys(
                trace.tensors[x.name] for x in sorted(nodes_of, key=order.__getitem__)
                if x.name in trace.tensors
            ))  # fmt: skip
            if both[stays] in outside and held:
                counts[path] = counts.get(path, 0) + 1
                name = f"{path}:{counts[path]}"
                yield Place(name, path, node, stays, frozenset(nodes_of), held)


def _behind(before: list[fx.Node], last: fx.Node, add: fx.Node) -> set[fx.Node]:
    """Return what only `last` needs, which only `add` reads: calls and tensors."""
    if _readers(last) != {add}:
        return set()
    found = {last}
    for node in reversed(before):
        readers = _readers(node)
        if readers and readers <= found:
            found |= {node, *node.users}
    return found


def _readers(node: fx.Node) -> set[fx.Node]:
    """Return the calls that compute with a value; a check of its type does not."""
    return {user for user in node.users if not op_name(user).startswith("_assert")}


def _under(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


class _Finder:
    """Says of each place whether its branch may go."""

    def __init__(self, groups: Groups, ignored: set[str]) -> None:
        self.groups, self.ignored = groups, ignored
        self.units: Units = groups.units
        self.replaced: Replacements = groups.replaced
        self.steps = {step.node: step for step in groups.steps}
        self.uses = _uses(groups.trace)

    def branch(self, place: Place) -> Branch:
        """Return the branch at a place. Raises `Uncapturable` with the reason where it stays."""
        calls = [node for node in place.nodes if node.op == "call_function"]
        if not all(_under(location(node)[0], place.path) for node in calls):
            raise Uncapturable(f"it is computed outside of {place.path}, whose code adds it")
        tensors = self._tensors(place)
        _check_writes(place)
        zero = Vanishing(place.nodes, self.groups.trace)
        if not zero(place.add.args[1 - place.stays]):
            raise Uncapturable(f"it is not zero where its tensors are: {zero.why}")
        inside = self._inside(tensors)
        owned = self.groups.owners()[0][inside]
        if not (owned >= 0).any():
            shared = [
                self.groups.trace.tensors[x.name]
                for node in self.groups.trace.graph.nodes
                if node in place.nodes
                for x in node.all_input_nodes
                if x not in place.nodes and x.name in self.groups.trace.tensors
            ]
            why = f"{shared[0]} is used elsewhere too" if shared else "so no score"
            raise Uncapturable(f"it has no channels of its own, {why}")
        template, found = self._template(place, tensors)
        self._check_widths(template)
        number, place_of_id = self.units.count, len(self.units.label)
        self.units.label = np.append(self.units.label, number)
        self.units.count += 1
        for name in ("frozen", "held"):
            setattr(self.units, name, np.append(getattr(self.units, name), -1))
        self.units.fold_of = np.append(self.units.fold_of, len(self.units.places))
        self.units.places.append(place_of(place.add))
        self.units.below[number] = inside
        family = Family(KIND, (np.array([number]),), 1)
        return Branch(place, tensors, number, place_of_id, inside, family, template, found)

    def _tensors(self, place: Place) -> tuple[str, ...]:
        """Return the names of all tensors that go: those that its calls read, and those that no
        call reads of modules that lose all others.
        """
        trace = self.groups.trace
        inside = {node.name for node in place.nodes}
        for name in place.tensors:
            if not self.uses[name] <= inside:
                raise Uncapturable(f"{name} is used elsewhere too")
            if name in self.ignored:
                raise Uncapturable(f"{name} is ignored by the user")
            if not _under(name.rpartition(".")[0], place.path):
                raise Uncapturable(f"{name} is no part of {place.path}")
        mine = set(place.tensors)
        by_owner: dict[str, list[str]] = {}
        for name in trace.aliases:
            by_owner.setdefault(name.rpartition(".")[0], []).append(name)
        gone: list[str] = []
        for names in by_owner.values():
            firsts = {trace.aliases[name] for name in names}
            used = {first for first in firsts if first in self.uses}
            if used and used <= mine:
                gone += names
            else:
                gone += [name for name in names if trace.aliases[name] in mine]
        loose = [n for n in gone if trace.aliases[n] not in mine and trace.aliases[n] != n]
        if loose:
            raise Uncapturable(f"{loose[0]} is tied to what stays")
        return tuple(gone)

    def _inside(self, tensors: tuple[str, ...]) -> Ids:
        """Return the classes that run through these tensors alone, with the blocks over them."""
        mine = np.zeros(self.units.count, bool)
        other = np.zeros(self.units.count, bool)
        aliases = self.groups.trace.aliases
        gone = {aliases[name] for name in tensors}
        for name, labels in self.groups.labels.items():
            at = mine if name in gone else other
            for layer in labels.layers:
                at[self.units.label[layer.ids]] = True
        alone = mine & ~other
        for _ in range(8):
            before = alone.copy()
            for block, below in self.units.below.items():
                if len(below) and not other[block] and alone[below].all():
                    alone[block] = True
            if (alone == before).all():
                break
        return np.flatnonzero(alone & (self.units.frozen[: len(alone)] < 0))

    def _template(self, place: Place, tensors: tuple[str, ...]) -> tuple[Template, Addition]:
        template = self.replaced.template(place.path)
        if template is None:
            raise Uncapturable(self.replaced.why_not[place.path])
        steps = self.replaced.steps[place.path]
        found = addition(template.forward, steps, self.steps[place.add], place.stays)
        left = called(dropped(template.forward, [found]))
        if left == called(template.forward):
            raise Uncapturable("the addition in its code is of something else")
        for name in tensors:
            owner, _, leaf = name.rpartition(".")
            inside = owner.removeprefix(place.path).removeprefix(".")
            words = [leaf] if not inside else []
            words += [path for path in left if inside and _touch(path, inside)]
            if any(word in left for word in words):
                raise Uncapturable(f"the modules of {name} compute what stays, too")
        return template, found

    def _check_widths(self, template: Template) -> None:
        """Refuse a forward that cannot follow other widths beside it."""
        alive = np.ones(self.units.count, bool)
        for family in (f for group in self.groups for f in group.families):
            first = [cluster[: family.size // 2] for cluster in family.clusters]
            alive[self.units.closure(np.concatenate(first).tolist())] = False
        try:
            template.at(alive[self.units.label])
        except Disagreement as error:
            raise Uncapturable(str(error)) from error


def _touch(a: str, b: str) -> bool:
    return _under(a, b) or _under(b, a)


def _uses(trace: Trace) -> dict[str, set[str]]:
    """Tensor's first name -> names of its placeholders and of the calls that read it."""
    found: dict[str, set[str]] = {}
    for node in trace.graph.nodes:
        if node.name in trace.tensors and node.users:
            mine = found.setdefault(trace.tensors[node.name], set())
            mine |= {node.name, *(user.name for user in node.users)}
    return found


_SAME = ("dropout", "alpha_dropout", "feature_dropout", "contiguous", "to", "reshape", "flatten")


def _check_writes(place: Place) -> None:
    """Refuse a branch that writes into what it does not hold, or into a view of it."""
    for node in (x for x in place.nodes if x.op == "call_function"):
        for value in writes(node):
            if _origin(value) not in place.nodes:
                raise Uncapturable(f"{op_name(node)} writes into what goes into it")


def _origin(node: fx.Node) -> fx.Node:
    """Return the call that made the storage of a value; some return what they are given."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        if base(node) is node and op_name(node) not in _SAME:
            break
        node = base(node) if base(node) is not node else node.args[0]
    return node


def dead_branches(groups: Groups, alive: Any) -> list[Branch]:
    """Return the branches that have gone, without those inside of others that have."""
    gone = [branch for branch in groups.branches if not alive[branch.number]]
    return [
        x for x in gone
        if not any(x is not y and x.place.nodes < y.place.nodes for y in gone)
    ]  # fmt: skip
