"""The smallest network that still fails: parts are left out, and options set to their first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .base import BODY, IDIOMS
from .network import Spec

PLAIN = {"head": "flat", "aux": [], "extra": "nothing", "outputs": "tensor", "frozen": 0, "seed": 0}
WISH = {
    "target": {"params": 0.5}, "ranking": "isomorphic", "strategy": "oneshot", "min_keep": 0.0,
    "multiple_of": 1, "seed": 0,
}  # fmt: skip

Case = tuple[Spec, dict[str, Any]]


def shrunk(spec: Spec, wish: dict[str, Any], fails: Callable[..., bool], most: int = 150) -> Case:
    """Return the smallest case found for which `fails(spec, wish)` is still true.

    `most`: how many smaller ones are tried.
    """
    tried = 0
    smaller = True
    while smaller and tried < most:
        smaller = False
        for case in _smaller(spec, wish):
            tried += 1
            if fails(*case):
                spec, wish = case
                smaller = True
                break
            if tried >= most:
                break
    return spec, wish


def _smaller(spec: Spec, wish: dict[str, Any]) -> Iterator[Case]:
    for blocks in _fewer(spec["blocks"]):
        yield {**spec, "blocks": blocks}, wish
    for name, value in PLAIN.items():
        if spec[name] != value:
            yield {**spec, name: value}, wish
    if spec["input"] not in ("plane", "tokens"):
        yield {**spec, "input": "plane"}, wish
        yield {**spec, "input": "tokens"}, wish
    for name, value in WISH.items():
        if wish[name] != value:
            yield spec, {**wish, name: value}
    for blocks in _plainer(spec["blocks"]):
        yield {**spec, "blocks": blocks}, wish


def _bodies(block: Spec) -> list[str]:
    return [name for name, values in IDIOMS[block["is"]].options.items() if values is BODY]


def _fewer(blocks: list[Spec]) -> Iterator[list[Spec]]:
    """Blocks with one left out, one replaced by what is inside it, or the same one level down."""
    for k, block in enumerate(blocks):
        yield blocks[:k] + blocks[k + 1 :]
        for name in _bodies(block):
            inside = block.get(name) or []
            yield blocks[:k] + inside + blocks[k + 1 :]
            for fewer in _fewer(inside):
                yield [*blocks[:k], {**block, name: fewer}, *blocks[k + 1 :]]


def _plainer(blocks: list[Spec]) -> Iterator[list[Spec]]:
    """Blocks with one option set to its first value."""
    for k, block in enumerate(blocks):
        for name, values in IDIOMS[block["is"]].options.items():
            if values is BODY:
                for plainer in _plainer(block.get(name) or []):
                    yield [*blocks[:k], {**block, name: plainer}, *blocks[k + 1 :]]
            elif block.get(name, values[0]) != values[0]:
                yield [*blocks[:k], {**block, name: values[0]}, *blocks[k + 1 :]]
