"""The coupling graph as a page: a row for each node, an arc for each edge, details on a click.

Rows stand in the order of the network, so a hundred groups are read like a text; arcs lie to their
left, and only those of the row under the pointer stand out.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING

from cpd.report import page

from ._script import SCRIPT, STYLE
from .dot import NAMES, said

if TYPE_CHECKING:
    from .value import Edge, Explanation, Node

__all__ = ["content"]

ROW = 26  # pixels, as in the style
WIDE = 230  # of the arcs
_FROZEN = ("tensor", "axis", "indices", "reason", "operator", "module", "line of code")


def content(found: Explanation) -> str:
    """The page's HTML."""
    groups = [node for node in found.nodes if node.units]
    costs = " and ".join(f"{value:,} {NAMES[name]}" for name, value in found.costs.items())
    head = (
        f"<p>{len(groups)} coupling groups. Can go: {escape(said(found.coverage))} "
        f"(of {escape(costs)}). An arc leads from the group whose channels a weight reads to the "
        "group whose channels it makes; upward arcs lead back into an earlier one. A share is what "
        "hangs on a group: what would be saved if all that can go of it went. Shares overlap.</p>"
    )
    frozen = [
        (f.tensor, str(f.axis), str(f.count), f.reason, f.op, f.path, f.source)
        for f in sorted(found.frozen, key=lambda item: item.of_kernel)
    ]
    sections = [
        head,
        _graph(found),
        page.section("What stays, and why", page.table(_FROZEN, frozen)),
        f'<script type="application/json" id="found">{_data(found)}</script>',
    ]
    return page.document(f"Coupling: {found.network}", sections, style=STYLE, script=SCRIPT)


def _data(found: Explanation) -> str:
    """Nodes and edges as JSON that cannot end the element it stands in."""
    places = {node.name: number for number, node in enumerate(found.nodes)}
    edges = [
        {"from": places[e.source], "to": places[e.target], "tensors": e.tensors}
        for e in found.edges
    ]
    data = {"nodes": [asdict(node) for node in found.nodes], "edges": edges}
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")


def _graph(found: Explanation) -> str:
    rows = "\n".join(_row(node, number) for number, node in enumerate(found.nodes))
    places = {node.name: number for number, node in enumerate(found.nodes)}
    arcs = "\n".join(_arc(edge, places, number) for number, edge in enumerate(found.edges))
    tall = ROW * len(found.nodes)
    return (
        '<div class="graph"><div class="list"><div class="bar">'
        '<input id="search" type="search" placeholder="find a group, a tensor, a reason" '
        'aria-label="find"><span id="count"></span></div>\n'
        '<div class="head"><span></span><span>group</span><span>units</span>'
        '<span class="number">parameters</span><span class="number">MACs</span></div>\n'
        f'<div class="rows"><svg class="arcs" width="{WIDE}" height="{tall}" '
        f'viewBox="0 0 {WIDE} {tall}" role="img" aria-label="weights between groups">{_HEADS}'
        f"{arcs}</svg>\n{rows}</div></div>\n"
        '<aside id="details" aria-live="polite"><p class="none">Point at a row to see what it is '
        "tied to; click it for its tensors and reasons.</p></aside></div>"
    )


_HEADS = "<defs>" + "".join(
    f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
    f'orient="auto"><path class="{name}" d="M0 0 8 4 0 8z"/></marker>'
    for name in ("down", "up")
)
_HEADS += "</defs>"


def _row(node: Node, number: int) -> str:
    if not node.units:
        return (
            f'<div class="row kept" data-k="{number}" tabindex="0" role="button"><span></span>'
            f'<span class="wide" title="{escape(node.name)}">stays: {escape(node.name)}</span>'
            f"<span>{node.size:,} {'index' if node.size == 1 else 'indices'}</span></div>"
        )
    bars = "".join(_bar(node.share.get(name, 0.0)) for name in ("params", "macs"))
    return (
        f'<div class="row" data-k="{number}" tabindex="0" role="button"><span></span>'
        f'<span class="name" title="{escape(node.name)}"><bdi>{escape(node.name)}</bdi></span>'
        f'<span title="{escape(node.units)}">{escape(node.units)}</span>{bars}</div>'
    )


def _bar(share: float) -> str:
    width = f"{100 * min(max(share, 0.0), 1.0):.1f}%"
    return f'<span class="share"><i style="width:{width}"></i><b>{share:.1%}</b></span>'


def _arc(edge: Edge, places: dict[str, int], number: int) -> str:
    """An arc to the left of the rows, the wider the farther apart they are."""
    source, target = places[edge.source], places[edge.target]
    down = source < target
    apart = abs(target - source)
    reach = min(30 + 22 * apart**0.75, WIDE / 0.75 - 12)  # a cubic comes 3/4 of the way
    start, end = (ROW * (place + 0.5) + off for place, off in ((source, -3), (target, 3)))
    left = f"{WIDE - reach:.1f}"
    shape = f"M{WIDE} {start:g}C{left} {start:g} {left} {end:g} {WIDE} {end:g}"
    name = "down" if down else "up"
    return f'<path class="arc {name}" data-e="{number}" marker-end="url(#{name})" d="{shape}"/>'
