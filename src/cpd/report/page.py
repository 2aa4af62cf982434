"""A self-contained HTML page from small blocks. Every text that comes in is escaped here."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape

__all__ = ["document", "section", "table", "text"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --back: #ffffff;
  --raised: #f5f7fa; --before: #b3bcc9; --after: #0b7285; --accent: #c2410c; --third: #6741d9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa6b5; --line: #333c48;
  --back: #12161c; --raised: #1a2028; --before: #566375; --after: #3bc9db; --accent: #ff9f5a;
  --third: #b197fc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2, summary { font-size: 1.15rem; font-weight: 600; margin: 2rem 0 .6rem; }
summary { cursor: pointer; }
.scroll { overflow: auto; max-height: 44rem; border: 1px solid var(--line); border-radius: 8px; }
.scroll.plot { padding: .75rem; max-height: 60rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: left; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { background: var(--raised); color: var(--soft); font-weight: 600; position: sticky; top: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
td { overflow-wrap: break-word; }
pre { margin: 0; padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, monospace; background: var(--raised); }
svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.none { color: var(--soft); }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {script}"
_NUMBER = "0123456789–−"
_NONE = '<p class="none">Nothing was recorded.</p>'


def document(title: str, sections: Sequence[str], *, style: str = "", script: str = "") -> str:
    """The whole page. ``script`` runs at its end, and nothing but it: its hash is the policy."""
    body = "\n".join(sections)
    allowed = "'none'"
    if script:
        digest = b64encode(sha256(script.encode()).digest()).decode()
        allowed, body = f"'sha256-{digest}'", f"{body}\n<script>{script}</script>"
    policy = _POLICY.format(script=allowed)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def section(title: str, content: str, *, folded: bool = False) -> str:
    """``content`` (HTML) under a heading; ``folded`` sections open on a click. Empty says so."""
    content = content or _NONE
    if folded:
        return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"
    kind = "scroll plot" if content.startswith("<svg") else ""
    content = f'<div class="{kind}">{content}</div>' if kind else content
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An HTML table; columns whose every cell starts like a number stand to the right."""
    if not lines:
        return ""
    columns = [[line[i] for line in lines] for i in range(len(head))]
    right = [all(cell[:1] in _NUMBER for cell in cells) and any(cells) for cells in columns]
    classes = [' class="number"' if is_right else "" for is_right in right]
    cells = "".join(f"<th{c}>{escape(name)}</th>" for c, name in zip(classes, head, strict=True))
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{c}>{escape(cell)}</td>" for c, cell in zip(classes, line, strict=True))
        + "</tr>"
        for line in lines
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr>{cells}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def text(content: str) -> str:
    """Text as it is, in lines."""
    return f'<div class="scroll"><pre>{escape(content)}</pre></div>' if content.strip() else ""
