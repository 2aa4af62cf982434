"""Forward: what a module computes, as data, for modules whose own code cannot follow a cut.

A `Forward` holds one list of operator calls for evaluation and one for training. Children stay
children: they are called, and keep their dropout, hooks and names. Batch and resolution are read
from the inputs at run time; only the sizes that carry channels are numbers, and those are what a
plan changes. It is plain data (JSON both ways): operators of ATen by name, never code.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from keyword import iskeyword
from typing import Any

import torch
from torch import fx, nn

from .errors import ArtefactError, InputError
from .rules import find

Data = dict[str, Any]


def _check(holds: Any) -> None:
    torch._check(
        holds,
        lambda: (
            "this module's forward was cut for other sizes of its inputs: at these its code takes "
            'another way. Comb at the sizes that you use, or with keep_class="strict" to keep it.'
        ),
    )


BUILTINS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "pow": operator.pow,
    "neg": operator.neg,
    "pos": operator.pos,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and": operator.and_,
    "or": operator.or_,
    "getitem": operator.getitem,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "sym_int": torch.sym_int,
    "sym_float": torch.sym_float,
    "sym_max": torch.sym_max,
    "sym_min": torch.sym_min,
    "sym_not": torch.sym_not,
    "sym_sqrt": torch._sym_sqrt,  # type: ignore[attr-defined]
    "check": _check,
}
_NAMES = {function: name for name, function in BUILTINS.items()} | {torch._check: "check"}
_KINDS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
    "device": torch.device,
    "float": float,  # one that is not finite
}
_CASTS: dict[str, Callable[..., Any]] = {
    "list": list,
    "tuple": tuple,
    "float": float,
    "device": torch.device,
}


@dataclass(frozen=True)
class Forward:
    """`call`: parameter name -> tree of what it was given. `graphs`: "eval" and "train" -> calls.

    Leaves of `call` are {"input": k}, the k-th input of the graphs, or {"is": constant}. A leaf's
    "fixed" are axes whose size must be the traced one: axis (as text) -> size. `others` are the
    same forward for calls of other forms.
    """

    call: Data
    graphs: dict[str, list[Data]]
    others: tuple[Forward, ...] = ()

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Forward:
        """Return the forward of JSON values. Raises `ArtefactError` where an operator is none that
        CPD knows.
        """
        graphs = {mode: list(data["graphs"][mode]) for mode in _MODES}
        forms = data.get("others", ())
        others = tuple(cls.from_data({**form, "others": ()}) for form in forms)
        made = cls(dict(data["call"]), graphs, others)
        for graph in made.graphs.values():
            _check_calls(graph)
        return made

    def to_data(self) -> Data:
        """Return the forward as JSON values."""
        others = [other.to_data() for other in self.others]
        made: Data = {"call": self.call, "graphs": self.graphs}
        return {**made, "others": others} if others else made

    @cached_property
    def _compiled(self) -> dict[str, Callable[..., Any]]:
        return {}

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute what the module's own forward would, on its present tensors."""
        given = bound(module, args, kwargs)
        form, leaves = self._form_of(given)
        mode = "train" if module.training else "eval"
        if mode not in form._compiled:
            form._compiled[mode] = compiled(module, form.graphs[mode])
        return form._compiled[mode](module, *leaves)

    def _form_of(self, given: Data) -> tuple[Forward, list[Any]]:
        try:
            return self, self._leaves(given)
        except InputError:
            for other in self.others:
                with suppress(InputError):
                    return other, other._leaves(given)
            raise

    def _leaves(self, given: Data) -> list[Any]:
        leaves: list[Any] = []
        for name, tree in self.call.items():
            _flatten(tree, given.get(name), leaves, name)
        return leaves

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return self  # a value

    def __reduce__(self) -> Any:
        return Forward, (self.call, self.graphs, self.others)


_MODES = ("eval", "train")


def adopt(module: nn.Module, forward: Forward) -> None:
    """Give a module (in place) a forward as data. Its class becomes a subclass of its own."""
    kind: Any = type(module)
    if not hasattr(kind, "cut_from"):
        module.__class__ = _subclass(kind)
    module.__dict__["cut_forward"] = forward


@cache
def _subclass(kind: Any) -> type[nn.Module]:
    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.cut_forward.run(self, args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        del protocol
        return _restored, (kind,), self.__dict__

    body = {
        "forward": forward,
        "cut_from": kind,
        "__reduce_ex__": reduce,
        "__setstate__": lambda self, state: self.__dict__.update(state),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), body)


def _restored(kind: Any) -> nn.Module:
    made = _subclass(kind)
    return made.__new__(made)


def parameters(kind: type) -> tuple[tuple[str, Any, Any], ...]:
    """Return (name, kind, default) of what a class's forward takes."""
    function = getattr(getattr(kind, "cut_from", kind), "forward")  # noqa: B009 - any class
    found = list(inspect.signature(function).parameters.values())[1:]
    return tuple((p.name, p.kind, p.default) for p in found)


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names of its parameters, defaults filled in."""
    given: dict[str, Any] = {}
    rest, named = list(args), dict(kwargs)
    for name, kind, default in parameters(type(module)):
        if kind is inspect.Parameter.VAR_POSITIONAL:
            given[name], rest = tuple(rest), []
        elif kind is inspect.Parameter.VAR_KEYWORD:
            given[name], named = named, {}
        elif rest and kind is not inspect.Parameter.KEYWORD_ONLY:
            given[name] = rest.pop(0)
        elif name in named:
            given[name] = named.pop(name)
        elif default is not inspect.Parameter.empty:
            given[name] = default
    if rest or named:
        raise TypeError(f"{type(module).__name__} takes no argument {[*map(type, rest), *named]}")
    return given


def _flatten(tree: Any, value: Any, leaves: list[Any], where: str) -> None:
    """Append the inputs in `value`; raise where it has another form than the trace had."""
    if "input" in tree:
        kind = torch.Tensor if tree["tensor"] else (int, torch.SymInt)
        if isinstance(value, kind):
            _fixed(tree.get("fixed", {}), value, where)
            leaves.append(value)
            return
    elif "is" in tree:
        if value is tree["is"] or (type(value) is type(tree["is"]) and value == tree["is"]):
            return
    elif "dict" in tree:
        if isinstance(value, dict) and set(value) == set(tree["dict"]):
            for key, part in tree["dict"].items():
                _flatten(part, value[key], leaves, f"{where}[{key!r}]")
            return
    elif isinstance(value, list | tuple) and len(value) == len(tree["list"]):
        for k, part in enumerate(tree["list"]):
            _flatten(part, value[k], leaves, f"{where}[{k}]")
        return
    found = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
    raise InputError(
        f"{where} is {found}, but this module's forward was cut for {_form(tree)} there. Comb with "
        'inputs of the form that you use, or with keep_class="strict" to keep the original code.'
    )


def _fixed(sizes: Mapping[str, int], value: Any, where: str) -> None:
    for axis, size in sizes.items():
        if value.shape[int(axis)] != size:
            raise InputError(
                f"{where} has the size {value.shape[int(axis)]} in axis {axis}, but this module's "
                f"forward was cut for {size} there: comb at the size that you use"
            )


def _form(tree: Data) -> str:
    if "input" in tree:
        return "a tensor" if tree["tensor"] else "an integer"
    return repr(tree["is"]) if "is" in tree else "another structure"


def compiled(module: nn.Module, graph: list[Data]) -> Callable[..., Any]:
    """Return a function of (module, inputs) that runs a list of calls."""
    made = fx.Graph()
    env: dict[str, fx.Node] = {}
    for data in graph:
        args, kwargs = _lookup(data["args"], env), _lookup(data["kwargs"], env)
        env[data["name"]] = _add(made, data, args, kwargs)
    return type(fx.GraphModule(module, made)).forward


def _add(graph: fx.Graph, data: Data, args: Any, kwargs: Any) -> fx.Node:
    op = data["op"]
    if op == "input":
        return graph.placeholder(data["name"])
    if op == "tensor":
        return graph.get_attr(args[0])
    if op == "child":
        return graph.call_module(args[0], tuple(args[1:]), kwargs)
    if op == "output":
        return graph.output(args[0])
    if op in ("dtype", "device"):
        return graph.call_function(getattr, (args[0], op))
    return graph.call_function(_target(op), tuple(args), kwargs)


def _check_calls(graph: list[Data]) -> None:
    """Refuse calls that are not as `encode` writes them.

    They come from files, and their names get into generated source: each must be a plain name.
    """
    env: Any = {}
    for data in graph:
        name, op = data["name"], data["op"]
        args, kwargs = _lookup(data["args"], env), _lookup(data["kwargs"], env)
        held = args[0] if op in ("tensor", "child") else "x"
        paths = held.split(".") if isinstance(held, str) else [""]
        plain = all(part.isdecimal() or _is_name(part) for part in paths)
        if not (isinstance(op, str) and _is_name(name) and plain and all(map(_is_name, kwargs))):
            raise ArtefactError(f"{name!r} is no call of a forward: a name in it is not plain")
        _target(op)
        env[name] = None


def _is_name(word: Any) -> bool:
    """Say whether a word may stand in generated source: an identifier of one's own."""
    plain = isinstance(word, str) and word.isascii() and word.isidentifier()
    return plain and not iskeyword(word) and not word.startswith("__")


def _target(op: str) -> Any:
    """Return the operator of a name. Raises `ArtefactError`: names come from files."""
    if op in ("input", "tensor", "child", "output", "dtype", "device"):
        return None
    if op in BUILTINS:
        return BUILTINS[op]
    space, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    if space == "aten":
        found = getattr(getattr(torch.ops.aten, name, None), overload, None)
        if found is not None and allowed(found):
            return found
    raise ArtefactError(f"{op!r} is no operator that a forward may call")


def allowed(target: Any) -> bool:
    """Say whether a forward may call an operator: those that comb knows, and shape queries."""
    name = target._schema.name.split("::")[-1]
    return name != "item" and (
        name.startswith("sym_")
        or torch.Tag.pointwise in target.tags
        or find(name) is not None
        or name in ("lift_fresh_copy", "detach", "detach_", "dropout_", "alpha_dropout")
    )


def op_name(target: Any) -> str | None:
    """Return the name of an operator in a forward's data, or None where it may not be in one."""
    if isinstance(target, torch._ops.OpOverload):
        space = target.namespace
        name = target._schema.name.split("::")[-1]
        listed = space == "aten" and allowed(target)
        return f"{space}.{name}.{target._overloadname}" if listed else None
    return _NAMES.get(target)


def encode(value: Any) -> Any:
    """Return an argument as JSON values. Raises `TypeError` for what has no such form."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [encode(x) for x in value]}
    if isinstance(value, dict):
        return {"dict": {str(key): encode(item) for key, item in value.items()}}
    finite = not isinstance(value, float) or math.isfinite(value)
    if value is None or (isinstance(value, bool | int | float | str) and finite):
        return value
    for name, kind in _KINDS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise TypeError(f"a {type(value).__name__} has no form as data")


def _lookup(value: Any, env: Mapping[str, fx.Node]) -> Any:
    """Undo `encode`."""
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "node":
        return env[held]
    if kind == "dict":
        return {key: _lookup(item, env) for key, item in held.items()}
    if kind in _CASTS:
        cast = _CASTS[kind]
        return cast(_lookup(x, env) for x in held) if kind in ("list", "tuple") else cast(held)
    found = getattr(torch, held, None) if kind in _KINDS else None
    if found is None or not isinstance(found, _KINDS[kind]):
        raise ArtefactError(f"{kind} {held!r} is unknown")
    return found


def changed(forward: Forward, places: Mapping[tuple[str, int, str, int | None], Any]) -> Forward:
    """Return a forward with other literals: (mode, number of the call, argument, entry) -> value.

    An argument is a position ("0", "1", ...) or a keyword.
    """
    graphs = {mode: list(calls) for mode, calls in forward.graphs.items()}
    for mode, number in {place[:2] for place in places}:
        graphs[mode][number] = copy.deepcopy(graphs[mode][number])
    for (mode, number, argument, entry), value in places.items():
        node = graphs[mode][number]
        held = node["args"]["list"] if argument.isdigit() else node["kwargs"]["dict"]
        key: Any = int(argument) if argument.isdigit() else argument
        if entry is None:
            held[key] = value
        else:
            next(iter(held[key].values()))[entry] = value
    return Forward(forward.call, graphs, forward.others)
