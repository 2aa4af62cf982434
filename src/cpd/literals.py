"""Literals: which numbers in the calls of a captured forward carry channels.

The calls are matched with those of the traced network, which know for every literal whose axis it
is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from fractions import Fraction
from typing import Any

from .calls import Uncapturable
from .errors import CPDError
from .forward import Data, Forward, encode
from .graph import Step
from .labels import Labels, Mask, axis_size
from .partners import Pair, agree, apart, name_of, none_left
from .rules import Size

Place = tuple[str, int, str, int | None]


class Disagreement(CPDError):
    """One literal of a forward would need two values; `path`: the module whose forward it is."""

    def __init__(self, text: str, path: str = "") -> None:
        super().__init__(text)
        self.path = path


@dataclass
class Literal:
    """A number in the calls of a forward, and the sizes that it is, or is a factor of."""

    old: int
    sizes: list[Size] = field(default_factory=list)

    def at(self, alive: Mask) -> int:
        """Return the new number. Raises `Disagreement` where there is no such."""
        found = {
            Fraction(self.old * axis_size(size.labels, size.axis, alive), size.old)
            for size in self.sizes
        }
        if len(found) > 1 or any(x.denominator > 1 for x in found):
            raise Disagreement(f"a size of {self.old} becomes {sorted(map(float, found))}")
        return int(found.pop())


_SHAPED = ("view", "reshape", "_unsafe_view", "unflatten")


def matched(forward: Forward, steps: list[Step]) -> tuple[dict[Place, Literal], list[Size]]:
    """Return the literals of a forward that carry channels (both modes have the same ones), and
    the sizes that it computes from its inputs.
    """
    rigid: list[Size] = []
    places: dict[Place, Literal] = {}
    factors = Factors(forward)
    graph, train = forward.graphs["eval"], forward.graphs["train"]
    training = in_training(forward)
    none_left(train, set(training.values()))
    for number, step, size in ((k, x, size) for k, x in partners(graph, steps) for size in x.sizes):
        place = _place("eval", number, step, size)
        held = _held(graph[number], place)
        if held == -1:
            continue
        if isinstance(held, dict) and graph[number]["op"].split(".")[1] in _SHAPED:
            twin = ("train", _number(training, number), *place[2:])
            if not (_inferred(graph[number], place) and _inferred(train[twin[1]], twin)):
                factors.add([place, twin], size)
        elif held != size.old:
            rigid.append(size)
        else:
            places.setdefault(place, Literal(held)).sizes.append(size)
    for place, literal in list(places.items()):
        number = _number(training, place[1])
        if _held(train[number], place) != literal.old:
            raise Uncapturable("its forward in training is another one")
        places["train", number, place[2], place[3]] = literal
    return places | factors.places(), rigid


def in_training(forward: Forward) -> dict[int, int]:
    """Return which call in evaluation is which in training."""
    evaluation, training = ([x["op"] for x in forward.graphs[mode]] for mode in ("eval", "train"))
    runs = SequenceMatcher(None, evaluation, training, autojunk=False).get_matching_blocks()
    return {run.a + k: run.b + k for run in runs for k in range(run.size)}


def _number(training: Mapping[int, int], number: int) -> int:
    if number not in training:
        raise Uncapturable("its forward in training is another one")
    return training[number]


def goes_apart(forward: Forward, steps: list[Step]) -> bool:
    """Say whether a forward takes another way than its trace."""
    try:
        list(aligned(forward.graphs["eval"], steps))
    except Uncapturable:
        return True
    return False


def partners(graph: list[Data], steps: list[Step]) -> list[Pair]:
    """Pair the calls of the trace with those of the forward, also where the two go apart."""
    try:
        return list(aligned(graph, steps))
    except Uncapturable:
        return apart(graph, steps)


def aligned(graph: list[Data], steps: list[Step]) -> Iterator[tuple[int, Step]]:
    """Pair the calls of the trace with those of the forward, which may be called several times."""
    numbers = [k for k, node in enumerate(graph) if "." in node["op"]]
    at = 0
    for step in steps:
        name = name_of(step)
        if name is None:
            continue
        order = [(at + offset) % len(numbers) for offset in range(len(numbers))]
        order = [k for k in order if graph[numbers[k]]["op"] == name]
        given = encode(list(step.node.args))
        found = next((k for k in order if agree(graph[numbers[k]]["args"], given)), None)
        if found is None and step.sizes:
            raise Uncapturable(f"its trace and its code disagree about {name}")
        if found is not None:
            at = found + 1
            yield numbers[found], step


def _place(mode: str, number: int, step: Step, size: Size) -> Place:
    schema: Any = step.node.target._schema  # type: ignore[union-attr]
    position = [argument.name for argument in schema.arguments].index(size.arg)
    inside = position < len(step.node.args)
    return mode, number, str(position) if inside else size.arg, size.index


def _held(node: Data, place: Place) -> Any:
    _, _, argument, entry = place
    try:
        value = (
            node["args"]["list"][int(argument)]
            if argument.isdigit()
            else node["kwargs"]["dict"][argument]
        )
        return value if entry is None else next(iter(value.values()))[entry]
    except (KeyError, IndexError, AttributeError) as error:
        raise Uncapturable("a size that carries channels is not among the arguments") from error


def _inferred(node: Data, place: Place) -> bool:
    """Let PyTorch infer an axis of both channels and positions; say whether it can."""
    _, _, argument, entry = place
    sizes = next(iter(node["args"]["list"][int(argument)].values()))
    if -1 not in sizes:
        sizes[entry] = -1
    return bool(sizes[entry] == -1)


class Factors:
    """The numbers in products that stand in shapes (`batch * heads`).

    Where a product stands in anything else it cannot change: it would be computed with.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.found: dict[Place, Literal] = {}
        self.shapes: dict[Place, set[tuple[int, int | None]]] = {}

    def add(self, places: list[Place], size: Size) -> None:
        """Take the product at each of `places` for a size."""
        olds = set()
        for mode, number, argument, entry in places:
            graph = self.forward.graphs[mode]
            held = _held(graph[number], (mode, number, argument, entry))
            if not isinstance(held, dict):
                raise Uncapturable("its forward in training is another one")
            place, old = _factor(mode, graph, held["node"])
            self.found.setdefault(place, Literal(old)).sizes.append(size)
            self.shapes.setdefault(place, set()).add((number, entry))
            olds.add(old)
        if len(olds) > 1:
            raise Uncapturable("its forward in training is another one")

    def places(self) -> dict[Place, Literal]:
        """Return them. Raises `Uncapturable` where one stands in anything but these shapes."""
        for mode, number, _, _ in self.found:
            shapes = set().union(*(self.shapes[x] for x in self.found if x[0] == mode))
            if _stands_elsewhere(self.forward.graphs[mode], number, shapes):
                raise Uncapturable("its code computes with a size that would change")
        return self.found


def _stands_elsewhere(graph: list[Data], number: int, shapes: set[tuple[int, int | None]]) -> bool:
    """Whether anything but entries of shapes is given a product, or a product of it."""
    products = [graph[number]["name"]]
    for name in products:  # it grows
        for k, user in enumerate(graph):
            entries = {entry for at, entry in shapes if at == k}
            if user["op"] == "mul" and name in _names(user):
                products.append(user["name"])
            elif not _uses(user, name) <= entries:
                return True
    return False


def _factor(mode: str, graph: list[Data], name: str) -> tuple[Place, int]:
    """Return the only number in a product, and where it is."""
    numbers = {node["name"]: k for k, node in enumerate(graph)}
    found: list[tuple[Place, int]] = []
    products = [name]
    for at in products:  # it grows
        node = graph[numbers[at]]
        for k, x in enumerate(node["args"]["list"] if node["op"] == "mul" else ()):
            if isinstance(x, dict):
                products.append(x["node"])
            else:
                found.append(((mode, numbers[at], str(k), None), x))
    if len(found) != 1:
        raise Uncapturable("two axes of one shape are computed from the inputs")
    return found[0]


def _uses(node: Data, name: str) -> set[int | None]:
    """Return the entries of a call's lists at which another stands; None for anywhere else."""
    found: set[int | None] = set()
    for value in (*node["args"]["list"], *node["kwargs"]["dict"].values()):
        parts = value.get("list", value.get("tuple")) if isinstance(value, dict) else None
        if parts is not None:
            found |= {k for k, x in enumerate(parts) if name in _names(x)}
        elif name in _names(value):
            found.add(None)
    return found


def _names(value: Any) -> set[str]:
    """Return the names of the calls in arguments."""
    if isinstance(value, dict):
        inside = set().union(*map(_names, value.values()))
        return inside | ({value["node"]} if isinstance(value.get("node"), str) else set())
    return set().union(*map(_names, value)) if isinstance(value, list | tuple) else set()


def scales_of(forward: Forward, steps: list[Step]) -> dict[Place, tuple[Labels, int]]:
    """Return the attentions that divide by the root of the head size that they find."""
    found: dict[Place, tuple[Labels, int]] = {}
    for number, step in partners(forward.graphs["eval"], steps):
        query = step.args.get("query")
        default = step.args.get("scale") is None
        if not isinstance(query, Labels) or "attention" not in str(step.node.target) or not default:
            continue
        found["eval", number, "scale", None] = (query, len(query.shape) - 1)
    training = in_training(forward)
    for (_, number, _, _), value in list(found.items()):
        found["train", _number(training, number), "scale", None] = value
    paired = set(training.values())
    for number, node in enumerate(forward.graphs["train"]):
        if number not in paired and "attention" in node["op"]:
            raise Uncapturable("its forward in training is another one")
    return found
