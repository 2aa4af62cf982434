"""The coupling graph as text: in words, and in Graphviz' language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .value import Edge, Explanation, Node

__all__ = ["NAMES", "graphviz", "said", "text"]

NAMES = {"macs": "MACs", "params": "parameters"}
_LISTED = 3  # tensors named at an edge; the page lists all


def said(share: Mapping[str, float]) -> str:
    """Shares in words: "4.5% of the parameters, 7.9% of the MACs"."""
    return ", ".join(f"{value:.1%} of the {NAMES[name]}" for name, value in share.items())


def text(found: Explanation) -> str:
    """One line for each node, and for each edge."""
    lines = [f"{found.network}: {said(found.coverage)} can go"]
    for node in found.nodes:
        about = (
            f"{node.units}; {said(node.share)}" if node.units else f"indices that stay: {node.size}"
        )
        lines.append(f"  {node.name}: {about}")
    lines += [f"  {edge.source} -> {edge.target}: {_some(edge.tensors)}" for edge in found.edges]
    return "\n".join(lines)


def graphviz(found: Explanation) -> str:
    """A digraph: a box for each group, a dashed one for each reason, an arrow for its weights."""
    lines = [
        f"digraph {_quoted(found.network)} {{",
        '  rankdir=TB; node [shape=box, style="rounded", fontname="Helvetica", fontsize=11];',
        '  edge [fontname="Helvetica", fontsize=9, color="#5b6675"];',
        f"  label={_quoted(said(found.coverage) + ' can go')};",
    ]
    names = {node.name: f"n{number}" for number, node in enumerate(found.nodes)}
    lines += [f"  {names[node.name]} [{_box(node)}];" for node in found.nodes]
    lines += [f"  {names[x.source]} -> {names[x.target]} [{_arrow(x)}];" for x in found.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _arrow(edge: Edge) -> str:
    tip = _quoted("\n".join(edge.tensors))
    return f"label={_quoted(_some(edge.tensors))}, tooltip={tip}"


def _box(node: Node) -> str:
    tip = f"tooltip={_quoted(chr(10).join((*node.notes, *node.tensors)))}"
    if node.units:
        return f"label={_quoted(chr(10).join((node.name, node.units, said(node.share))))}, {tip}"
    label = _quoted(f"stays: {node.name}")
    return f'label={label}, style="rounded,dashed", color="#c2410c", {tip}'


def _some(tensors: tuple[str, ...]) -> str:
    more = f" and {len(tensors) - _LISTED} more" if len(tensors) > _LISTED else ""
    return ", ".join(tensors[:_LISTED]) + more


def _quoted(words: str) -> str:
    """A string of Graphviz: quotes and backslashes escaped, lines broken by its own sign."""
    escaped = words.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
