"""Style and script of the page. Text goes in by ``textContent``: nothing is parsed as HTML."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
body { max-width: 96rem; }
.graph { display: grid; grid-template-columns: minmax(0, 1fr) 24rem; gap: 1.25rem;
  align-items: start; }
.list { border: 1px solid var(--line); border-radius: 8px; overflow: clip; }
.bar { display: flex; gap: 1rem; align-items: center; padding: .6rem .75rem; }
.bar input { flex: 1; max-width: 28rem; padding: .35rem .6rem; font: inherit; color: inherit;
  background: var(--back); border: 1px solid var(--line); border-radius: 6px; }
#count { color: var(--soft); }
.head, .row { display: grid; align-items: center; gap: .75rem; padding-right: .75rem;
  grid-template-columns: 230px minmax(8rem, 3fr) minmax(7rem, 2fr) minmax(5rem, 1fr)
  minmax(5rem, 1fr); }
.head { height: 30px; background: var(--raised); color: var(--soft); font-weight: 600;
  position: sticky; top: 0; z-index: 2; }
.head .number { text-align: right; }
.rows { position: relative; }
.arcs { position: absolute; left: 0; top: 0; margin: 0; max-width: none; pointer-events: none; }
.row { height: 26px; cursor: pointer; border-radius: 4px; outline-offset: -2px; }
.row > span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.row .wide { font-style: italic; }
.row .name { direction: rtl; text-align: left; }
.row.kept { color: var(--accent); }
.row:hover, .row.near { background: var(--raised); }
.row.on { background: color-mix(in srgb, var(--after) 18%, transparent); }
.row.dim { opacity: .25; }
.share { position: relative; height: 16px; background: var(--raised); border-radius: 3px; }
.row:hover .share, .row.near .share { background: var(--line); }
.share i { position: absolute; inset: 0 auto 0 0; background: var(--after); opacity: .35; }
.share b { position: relative; display: block; padding-right: .4rem; text-align: right;
  font: 12px/16px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.arc { fill: none; stroke-width: 1.2; opacity: .45; }
.arc.down { stroke: var(--after); }
.arc.up { stroke: var(--third); }
marker .down { fill: var(--after); }
marker .up { fill: var(--third); }
.picked .arc { opacity: .08; }
.picked .arc.on { opacity: 1; stroke-width: 2; }
aside { position: sticky; top: 1rem; align-self: start; max-height: calc(100vh - 2rem);
  overflow: auto; border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; }
aside h2 { margin: 0 0 .25rem; overflow-wrap: anywhere; }
aside h3 { margin: 1rem 0 .25rem; font-size: .95rem; color: var(--soft); }
aside ul { margin: 0; padding: 0; list-style: none; }
aside li { padding: .12rem 0; overflow-wrap: anywhere; font: 13px/1.4 ui-monospace, monospace; }
aside p { margin: .25rem 0; }
aside button { font: inherit; color: var(--after); background: none; border: 0; padding: 0;
  cursor: pointer; text-align: left; overflow-wrap: anywhere; }
@media (max-width: 62rem) { .graph { grid-template-columns: minmax(0, 1fr); }
  aside { position: static; max-height: none; } }
@media (max-width: 44rem) { .arcs { display: none; } .head, .row { grid-template-columns: 0
  minmax(0, 2fr) minmax(0, 2fr) 5rem 5rem; } }
"""

SCRIPT = """
'use strict';
const found = JSON.parse(document.getElementById('found').textContent);
const rows = [...document.querySelectorAll('.row')];
const arcs = [...document.querySelectorAll('.arc')];
const details = document.getElementById('details');
const holder = document.querySelector('.rows');
let pinned = null;

function light(k) {
  holder.classList.toggle('picked', k !== null);
  const near = new Set();
  arcs.forEach((arc, i) => {
    const edge = found.edges[i], on = edge.from === k || edge.to === k;
    arc.classList.toggle('on', on);
    if (on) { near.add(edge.from); near.add(edge.to); arc.parentNode.append(arc); }
  });
  rows.forEach((row, i) => {
    row.classList.toggle('on', i === k);
    row.classList.toggle('near', i !== k && near.has(i));
  });
}

function add(parent, tag, text) {
  const made = document.createElement(tag);
  if (text) for (const piece of text.split(/(?<=[.:,])/)) {
    made.append(piece, document.createElement('wbr'));
  }
  parent.append(made);
  return made;
}

function listed(title, items, click) {
  if (!items.length) return;
  add(details, 'h3', title + ' (' + items.length + ')');
  const list = add(details, 'ul');
  for (const item of items) {
    const line = add(list, 'li', click ? '' : item);
    if (click) add(line, 'button', item.text).onclick = () => pin(item.to, true);
  }
}

function percent(x) { return (100 * x).toFixed(1) + '%'; }

function show(k) {
  const node = found.nodes[k];
  details.replaceChildren();
  add(details, 'h2', node.kind === 'kept' ? 'stays: ' + node.name : node.name);
  if (node.kind === 'group') {
    add(details, 'p', node.units);
    add(details, 'p', percent(node.share.params) + ' of the parameters and ' +
      percent(node.share.macs) + ' of the MACs hang on it');
  } else add(details, 'p', 'indices that stay: ' + node.size);
  listed(node.kind === 'kept' ? 'demanded by' : 'notes', node.notes);
  const far = (end, other) => found.edges.filter(e => e[end] === k).map(e => ({
    to: e[other], text: found.nodes[e[other]].name + ': ' + e.tensors.join(', ')}));
  listed('reads from', far('to', 'from'), true);
  listed('is read by', far('from', 'to'), true);
  const role = word => node.tensors.filter(t => t.startsWith(word)).map(t => t.slice(word.length));
  if (node.kind === 'kept') { listed('tensors', node.tensors); return; }
  listed('made or scaled by', role('out '));
  listed('read by', role('in '));
}

function pin(k, move) {
  pinned = k;
  light(k);
  if (k === null) return;
  show(k);
  if (move) rows[k].scrollIntoView({block: 'nearest', behavior: 'smooth'});
}

rows.forEach((row, k) => {
  row.onmouseenter = () => light(k);
  row.onmouseleave = () => light(pinned);
  row.onclick = () => pin(pinned === k ? null : k);
  row.onkeydown = event => {
    if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); row.click(); }
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (step && rows[k + step]) { event.preventDefault(); rows[k + step].focus(); }
  };
});
document.addEventListener('keydown', event => { if (event.key === 'Escape') pin(null); });

const words = found.nodes.map(node =>
  [node.name, node.units, ...node.tensors, ...node.notes].join('\\n').toLowerCase());
document.getElementById('search').oninput = event => {
  const wanted = event.target.value.trim().toLowerCase();
  let hits = 0, first = null;
  rows.forEach((row, k) => {
    const hit = words[k].includes(wanted);
    row.classList.toggle('dim', !hit);
    if (hit) { hits += 1; if (first === null) first = row; }
  });
  document.getElementById('count').textContent = wanted ? hits + ' of ' + rows.length : '';
  if (wanted && first) first.scrollIntoView({block: 'nearest'});
};
"""
