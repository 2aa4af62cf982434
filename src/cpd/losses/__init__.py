"""The shelf of distillation losses: pure functions ``loss(student, teacher, *, …) -> scalar``.

``resolve`` turns what a person writes (a name, a mapping of names to options, a callable) into one
value: weighted terms by name. Called with both networks' logits it returns the terms on logits;
``attach`` binds it to two networks, so that losses may also see the outputs of modules inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cpd import _shelf
from cpd._numbers import nonnegative
from cpd.errors import InputError, UnknownName
from cpd.losses._attach import Attached, attach
from cpd.losses._points import Kept, kept_at
from cpd.losses._standard import standardised
from cpd.losses._state import Stateful
from cpd.losses._term import Losses, Seen, Term
from cpd.losses.af_dcd import AfDCD
from cpd.losses.at import at
from cpd.losses.cirkd import CIRKD
from cpd.losses.cwd import cwd
from cpd.losses.dist import dist
from cpd.losses.dkd import dkd
from cpd.losses.hard import hard
from cpd.losses.ifvd import ifvd
from cpd.losses.inner import inner
from cpd.losses.kd import kd
from cpd.losses.mgd import MGD
from cpd.losses.nkd import nkd
from cpd.losses.skd import skd

__all__ = [
    "CIRKD",
    "MGD",
    "SHELF",
    "AfDCD",
    "Attached",
    "Kept",
    "Losses",
    "Seen",
    "Stateful",
    "Term",
    "at",
    "attach",
    "cwd",
    "dist",
    "dkd",
    "hard",
    "ifvd",
    "inner",
    "kd",
    "kept_at",
    "nkd",
    "resolve",
    "skd",
    "standardised",
]

Loss = Callable[..., Any]

SHELF: dict[str, Loss] = {
    "af_dcd": AfDCD,
    "at": at,
    "cirkd": CIRKD,
    "cwd": cwd,
    "dist": dist,
    "dkd": dkd,
    "hard": hard,
    "ifvd": ifvd,
    "inner": inner,
    "kd": kd,
    "mgd": MGD,
    "nkd": nkd,
    "skd": skd,
}

# They compare relations inside each map, so the networks' widths may differ.
RELATIONS = (at, ifvd, skd)
# Of logits alone: over the classes, which features do not have.
DECISIONS = (dkd, hard, nkd)
# Official weights on (logits, features) where a recipe gives none; 1 for every other loss. Those of
# mgd, af_dcd and the terms of cirkd are options of theirs.
WEIGHTS: dict[Loss, tuple[float, float]] = {
    at: (1e4, 1e4),
    cwd: (3.0, 50.0),
    ifvd: (20.0, 20.0),
    inner: (20.0, 20.0),
    skd: (10.0, 10.0),
}
# With standardised logits, kd alone (Sun et al., 2024): temperature and weight.
STANDARDISED = (2.0, 9.0)
# What a recipe may say of any loss, beside the options of its function.
COMMON = ("loss", "weight", "warmup", "decay", "at", "axis", "standardise")


def resolve(spec: object) -> Losses:
    """Return the losses that a spec means.

    spec: a name of the shelf (``"kd"``); a mapping of names to options; a callable
        ``f(student, teacher)`` that returns a scalar tensor or a mapping of them; ``None`` or an
        empty mapping for no losses; or what an earlier call returned.

    Options are keywords of the loss, and for every loss:
        weight: ≥ 0, multiplies the term; the official one where left out, see ``WEIGHTS``.
        warmup: steps over which the weight rises linearly. decay: share of it left at the end of
            the stage, in [0, 1].
        at: path of a module, or several, whose output the loss sees instead of the logits; over
            several it is the mean. axis: axis of the channels there, 1 where left out.
        standardise: standardise the logits first, see ``standardised``; kd then has temperature 2
            and weight 9 where left out.
        loss: name of the shelf, where the entry is called otherwise: one loss twice.

    ``{"kd": {"weight": 3.0, "temperature": 4.0}, "deep": {"loss": "cwd", "at": "neck"}}``

    Options are tried at once on tiny tensors, so a bad value is met here and not in training.
    Raises UnknownName for a name or an option that is not there, InputError for any other fault.
    """
    if isinstance(spec, Losses):
        return spec
    if callable(spec):
        return Losses((Term(getattr(spec, "__name__", type(spec).__name__), spec, {}),))
    entries = {} if spec is None else _shelf.parse("loss", spec)
    return Losses(tuple(_term(name, options) for name, options in entries.items()))


def _term(name: str, options: dict[str, Any]) -> Term:
    kind = options.pop("loss", name)
    if kind not in SHELF:
        raise UnknownName("loss", str(kind), SHELF)
    function = SHELF[kind]
    stateful = isinstance(function, type)
    valid = [word for word in _shelf.keywords(function)[2:] if word != "labels"]
    _shelf.check_options("loss", name, options, (*COMMON[1:], *valid))
    common = {word: options.pop(word) for word in COMMON if word in options}
    if stateful and _flag(name, common):
        raise InputError(f"loss {name!r} looks at features: standardise is for losses on logits")
    usual = WEIGHTS.get(function, (1.0, 1.0))[common.get("at") is not None]
    if _flag(name, common) and function is kd:
        temperature, usual = STANDARDISED
        options.setdefault("temperature", temperature)
    term = Term(
        name,
        standardised(function) if _flag(name, common) else function,
        options,
        weight=float(_number(name, common, "weight", usual)),
        warmup=_whole(name, common, "warmup"),
        decay=_part(name, common),
        at=_paths(name, common),
        axis=_axis(name, common),
        labelled="labels" in _shelf.keywords(function),
        stateful=stateful,
        align="pad" if stateful else "none" if function in RELATIONS else "select",
        shown=kind if kind == name else f"{name}: {kind}",
    )
    if term.at and function in DECISIONS:
        raise InputError(f"loss {name!r} compares classes: it sees the logits, leave 'at' out.")
    if term.at and _flag(name, common):
        raise InputError(f"loss {name!r}: standardise is for logits, leave it or 'at' out.")
    _try(term)
    return term


def _try(term: Term) -> None:
    """Meet a bad option now rather than in the first step."""
    if term.stateful:
        with torch.random.fork_rng(devices=[]):
            term.function(2, 2, **term.options)
        return
    tiny = torch.zeros(2, 2, 4, 4)
    more = {"labels": torch.zeros(2, 4, 4, dtype=torch.int64)} if term.labelled else {}
    term.function(tiny, tiny, **term.options, **more)


def _number(name: str, common: dict[str, Any], word: str, default: float) -> float:
    value = common.get(word, default)
    nonnegative(f"{word} of loss {name!r}", value)
    return float(value)


def _part(name: str, common: dict[str, Any]) -> float:
    value = _number(name, common, "decay", 1.0)
    if value > 1:
        raise InputError(f"decay of loss {name!r} is the share left, in [0, 1]; got {value!r}.")
    return value


def _whole(name: str, common: dict[str, Any], word: str) -> int:
    value = common.get(word, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{word} of loss {name!r} must be a number of steps >= 0, got {value!r}.")
    return value


def _axis(name: str, common: dict[str, Any]) -> int:
    value = common.get("axis", 1)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"axis of loss {name!r} must be a whole number, got {value!r}.")
    return value


def _flag(name: str, common: dict[str, Any]) -> bool:
    value = common.get("standardise", False)
    if not isinstance(value, bool):
        raise InputError(f"standardise of loss {name!r} must be true or false, got {value!r}.")
    return value


def _paths(name: str, common: dict[str, Any]) -> tuple[str, ...] | None:
    value = common.get("at")
    if value is None:
        return None
    paths = (value,) if isinstance(value, str) else value
    listed = isinstance(paths, list | tuple) and len(paths) > 0
    if not listed or not all(isinstance(path, str) and path for path in paths):
        raise InputError(f"'at' of loss {name!r} must be a module path or several, got {value!r}.")
    return tuple(paths)
