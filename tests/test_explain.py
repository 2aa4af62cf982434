"""What combing explains: reasons with their places, shares, the coupling graph, its pages."""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cpd
from cpd.cli import main
from cpd.comb import finish
from cpd.errors import OutputError
from cpd.explain.value import Explanation
from cpd.groups import joined_kinds
from cpd.stays import Frozen

IMAGE = torch.randn(2, 3, 6, 6)


def linear(*sizes: int) -> nn.Sequential:
    pairs = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


class Sorted(nn.Module):
    """Two layers, the channels between them sorted: they stay."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.make(x)
        x = x.sort(-1).values
        return self.read(x)


class Residual(nn.Module):
    """stem - (a - b + identity) - head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.a, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.b(self.a(x).relu())
        return self.head(x)


class Turned(nn.Module):
    """Attention whose queries and keys are rotated: heads may go, their dims may not."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v, self.proj = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (
            m(x).view(b, n, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        q, k = self.turned(q), self.turned(k)
        out = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, -1))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[-2] * x.shape[-1], dtype=x.dtype).view(x.shape[-2:])
        half = x.shape[-1] // 2
        return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()


# --- shares ---------------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    """4-6-5-2: 77 parameters and 64 MACs; the middle weight (30) hangs on both groups."""
    groups = cpd.comb(linear(4, 6, 5, 2), torch.randn(3, 4))
    assert groups.shares == {
        "0": {"macs": pytest.approx((24 + 30) / 64), "params": pytest.approx((24 + 6 + 30) / 77)},
        "2": {"macs": pytest.approx((30 + 10) / 64), "params": pytest.approx((30 + 5 + 10) / 77)},
    }
    assert groups.coverage == {"macs": pytest.approx(1.0), "params": pytest.approx(75 / 77)}
    assert groups["2"].share == groups.shares["2"]


def test_shares_are_what_removing_a_group_saves() -> None:
    grouped = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)
    )
    for model, x in ((grouped, IMAGE), (Residual(), IMAGE), (Turned(), torch.randn(2, 5, 12))):
        groups = cpd.comb(model, x)
        everything = groups.everything()
        assert len(groups)
        for group in groups:
            left = groups.everything()
            left[group.classes] = False
            for cost, share in group.share.items():
                assert share == 1 - groups.cost(cost, left) / groups.cost(cost, everything)


def test_nothing_that_can_go_covers_nothing() -> None:
    groups = cpd.comb(nn.Linear(3, 2), torch.randn(1, 3))
    assert not len(groups)
    assert groups.coverage == {"macs": 0.0, "params": 0.0}
    assert "can go: 0.0% of the MACs, 0.0% of the parameters" in str(groups)


# --- reasons --------------------------------------------------------------------------------------


def line_of(owner: Any, text: str) -> str:
    """ "file:line" of the line of an object's source that has a text."""
    lines, first = inspect.getsourcelines(owner)
    (number,) = [first + k for k, line in enumerate(lines) if text in line]
    return f"{Path(__file__).name}:{number}"


def test_a_reason_names_operator_module_and_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Sorted())
    found = {(f.tensor, f.axis): f for f in cpd.comb(model, torch.randn(2, 4)).frozen}
    made = found["1.make.weight", 0]
    assert (made.op, made.path, made.count) == ("sort", "1", 6)
    assert made.source.endswith(line_of(Sorted, "x.sort"))
    assert made.reason == "sort along channels"
    out = found["1.read.bias", 0]
    assert (out.reason, out.op, out.path) == ("model output", "linear", "1.read")
    assert out.source.endswith(line_of(Sorted, "self.read(x)"))
    assert str(out) == f"1.read.bias axis 0, 5 of it: model output (linear in 1.read, {out.source})"
    assert not Path(out.source).is_absolute()


def test_different_reasons_of_one_axis_are_all_told() -> None:
    """Of 9 channels 4 are put out, 3 are sorted, and 2 may go."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = (4, 3, 2)
            self.make, self.read, self.other = nn.Linear(4, 9), nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            a, b, c = self.make(x).split(self.parts, -1)
            return a, self.read(b.sort(-1).values), self.other(c)

    groups = cpd.comb(Net(), torch.randn(2, 4))
    told = {f.reason: f.count for f in groups.frozen if (f.tensor, f.axis) == ("make.weight", 0)}
    assert told == {"model output": 4, "sort along channels": 3}
    assert groups["make"].kinds == "2 channels"


def test_what_comb_itself_keeps_has_no_place() -> None:
    groups = cpd.comb(linear(4, 6, 2), torch.randn(2, 4), ignore=["0"])
    kept = next(f for f in groups.frozen if f.reason == "ignored by the user")
    assert (kept.op, kept.path, kept.source, kept.place) == ("", "", "", "")
    assert str(kept) == "0.weight axis 0, 6 of it: ignored by the user"


def test_code_that_cannot_follow_is_named_by_its_line() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.make(x)
            x = x.reshape(-1, 6)
            return self.read(x)

    model = nn.Sequential(nn.Linear(3, 4), Fixed())
    groups = cpd.comb(model, torch.randn(2, 3), keep_class="strict")
    (kept,) = [kept for kept in groups.kept if kept.reason.startswith("the code cannot follow")]
    assert kept.source.endswith(line_of(Fixed, "self.read(x)"))
    assert kept.paths == ("1.read",)
    assert kept.place == f"1.read, {kept.source}"
    assert [group.name for group in groups] == ["0"]


def test_equal_lines_of_equal_modules_are_one_entry() -> None:
    model = nn.Sequential(Sorted(), nn.Linear(5, 4), Sorted())
    groups = cpd.comb(model, torch.randn(2, 4))
    (kept,) = [kept for kept in groups.kept if kept.reason == "sort along channels"]
    assert kept.paths == ("0", "2")
    assert [item.tensor for item in kept.items if item.axis == 0] == [
        *("0.make.weight", "0.make.bias", "2.make.weight", "2.make.bias")
    ]
    assert kept.place == f"sort in 0 and 1 more, {kept.source}"
    assert kept.tensors == f"0.make.weight axis 0 and {len(kept.items) - 1} more"
    assert f"      {kept.tensors} ({kept.place})" in str(groups).splitlines()


def test_many_lines_for_one_reason_are_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Linear(3, 2) for _ in range(5))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            a = self.a(x)
            b = self.b(x)
            c = self.c(x)
            d = self.d(x)
            return a, b, c, d, self.e(x)

    text = str(cpd.comb(Net(), torch.randn(2, 3)))
    assert "    model output: 10 axes" in text
    assert "      and 2 more lines of code" in text


def test_kernel_axes_are_listed_but_not_printed() -> None:
    groups = cpd.comb(Residual(), IMAGE)
    assert any(f.of_kernel for f in groups.frozen)
    assert not any(item.of_kernel for kept in groups.kept for item in kept.items)
    assert "kernel" not in str(groups)


class Normed(nn.Module):
    """Two norms that part the same channels in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)
        self.halves, self.thirds = nn.GroupNorm(2, 12), nn.GroupNorm(3, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.halves(self.make(x))
        x = self.thirds(x)
        return self.read(x)


def test_partitions_that_overlap_are_named_by_the_call_that_parts_anew() -> None:
    groups = cpd.comb(Normed(), IMAGE)
    (kept,) = [k for k in groups.kept if k.reason == "rows of different partitions overlap"]
    assert (kept.op, kept.paths) == ("group_norm", ("thirds",))
    assert kept.source.endswith(line_of(Normed, "self.thirds(x)"))


def test_what_no_reason_holds_is_named_by_the_call_that_binds_it() -> None:
    """Families taken away by hand, as where rows fit no common unit."""
    groups = cpd.comb(nn.Sequential(Turned()), torch.randn(2, 5, 12))
    groups.units.families = []
    kept = [k for k in finish(groups).kept if k.reason.startswith("must keep step")]
    assert kept
    assert {k.op for k in kept} == {"view"}
    assert all(k.paths == ("0",) and "test_explain.py:" in k.source for k in kept)


def test_outputs_of_other_shapes_are_named_by_what_makes_them() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = self.make(x)
            ones = torch.ones(2, x.shape[1])
            return x.relu().sum(-1), ones

    groups = cpd.comb(nn.Sequential(Counted()), torch.randn(2, 4), keep_class="strict")
    (kept,) = [k for k in groups.kept if "puts out" in k.reason]
    assert (kept.op, kept.paths) == ("ones", ("0",))
    assert kept.source.endswith(line_of(Counted, "torch.ones"))


def test_buffers_that_hold_channels_are_listed_and_others_are_not() -> None:
    class Moved(nn.Module):
        """A shift of channels that are sorted, and a grid, which has no channels."""

        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(4, 6), nn.Linear(6, 5)
            self.register_buffer("shift", torch.ones(6))
            self.register_buffer("grid", torch.ones(2, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.read((self.make(x) + self.shift).sort(-1).values) * self.grid

    found = {(f.tensor, f.axis): f.reason for f in cpd.comb(Moved(), torch.randn(2, 4)).frozen}
    assert found["shift", 0] == found["make.weight", 0] == "sort along channels"
    assert not any(tensor == "grid" for tensor, _ in found)
    normed = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    found = {(f.tensor, f.axis): f.reason for f in cpd.comb(normed, torch.randn(2, 4)).frozen}
    assert found["1.running_mean", 0] == found["1.running_var", 0] == "model output"


# --- words ----------------------------------------------------------------------------------------


def test_equal_kinds_are_joined() -> None:
    assert joined_kinds([(4, "a"), (4, "a"), (2, "b"), (4, "a")]) == "3×4 a, 2 b"
    assert joined_kinds([(4, "a"), (2, "a")]) == "4 a, 2 a"
    assert joined_kinds([]) == ""


def test_heads_are_what_an_attention_keeps_apart() -> None:
    group = cpd.comb(Turned(), torch.randn(2, 5, 12))["q"]
    assert {family.kind for family in group.families} <= {"heads", "head dims"}
    assert "3 heads" in group.kinds
    shuffle = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 3, 1))
    (group,) = cpd.comb(shuffle, IMAGE)
    assert not {"heads", "head dims"} & {family.kind for family in group.families}


def test_dims_of_query_and_key_and_of_value_are_two_families() -> None:
    """Three layers of their own, each seen as heads by a view with -1: dims go apart."""

    class Apart(Turned):
        def turned(self, x: torch.Tensor) -> torch.Tensor:
            return x

    groups = cpd.comb(Apart(), torch.randn(2, 5, 12))
    kinds = [(f.width, f.kind) for group in groups for f in group.families]
    assert sorted(kinds) == [(3, "heads"), (4, "head dims"), (4, "head dims")]
    (group,) = groups
    query, value = (f for f in group.families if f.kind == "head dims")
    classes = [set(groups.units.label[groups.labels[f"{n}.weight"].layers[0].ids].ravel().tolist())
               for n in "qkv"]  # fmt: skip
    dims = [set().union(*(c.tolist() for c in f.clusters)) for f in (query, value)]
    assert [[bool(mine & d) for mine in classes] for d in dims] == [
        [True, True, False], [False, False, True],
    ]  # fmt: skip


def test_packed_sequences_are_refused_with_the_reason() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(5, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            lengths = torch.tensor([5, 3])
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]

    with pytest.raises(cpd.TraceError, match=r"Packed runs on \[\(2, 5, 5\)\] but torch.export"):
        cpd.comb(Packed(), torch.randn(2, 5, 5))


def test_heads_that_stay_hold_back_their_dims() -> None:
    """Each head has a gain that is put out: heads stay, their dims may go; the rest is free."""

    class Gained(Turned):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3, 1, 1))
            self.up, self.down = nn.Linear(12, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            b, n, _ = x.shape
            v = self.v(x).view(b, n, self.heads, -1).transpose(1, 2) * self.gain
            out = self.proj(v.transpose(1, 2).reshape(b, n, -1))
            return self.down(self.up(out).relu()), self.gain * 2

    groups = cpd.comb(Gained(), torch.randn(2, 5, 12))
    assert groups["v"].kinds == "4 channels"
    assert {reason.text for reason in groups["v"].held} == {"model output"}
    assert not groups["up"].held
    assert not groups["proj"].held
    (line,) = [line for line in str(groups).splitlines() if line.startswith("    v: ")]
    assert line.startswith("    v: model output (mul, ")


def test_a_group_says_why_rows_keep_their_width() -> None:
    groups = cpd.comb(Turned(), torch.randn(2, 5, 12), exact=True)
    for group in groups:
        assert [f"  held back: {reason}" for reason in group.held] == [
            line for line in str(group).splitlines() if line.startswith("  held back: ")
        ]


# --- the graph ------------------------------------------------------------------------------------


def explained(model: nn.Module | None = None) -> Explanation:
    return cpd.explain(cpd.comb(model or Residual(), IMAGE))


def test_nodes_and_edges_of_a_residual_network() -> None:
    found = explained()
    fixed, out = "meets an axis of fixed size", "model output"
    assert [node.name for node in found.nodes] == [fixed, "stem", "a", out]
    assert {(edge.source, edge.target): edge.tensors for edge in found.edges} == {
        (fixed, "stem"): ("stem.weight",),
        ("stem", "a"): ("a.weight",),
        ("a", "stem"): ("b.weight",),
        ("stem", out): ("head.weight",),
    }
    first, stem, _, last = found.nodes
    assert (first.kind, first.size, first.tensors) == ("kept", 3, ("stem.weight axis 1",))
    assert (stem.kind, stem.units, stem.size) == ("group", "8 channels", 8)
    assert {"out stem.weight axis 0", "in a.weight axis 1", "in head.weight axis 1"} <= {
        *stem.tensors
    }
    assert (last.size, last.tensors) == (8, ("head.weight axis 0", "head.bias axis 0"))
    (note,) = last.notes
    assert note.startswith("head.weight axis 0 and 1 more: conv2d in head, ")
    text = str(found)
    assert "  stem: 8 channels; " in text
    assert "  a -> stem: b.weight" in text


def test_an_explanation_is_json() -> None:
    found = explained()
    content = json.loads(found.to_json())
    assert content["network"] == "Residual"
    assert content["costs"] == dict(found.costs)
    assert [node["name"] for node in content["nodes"]] == [node.name for node in found.nodes]
    assert [Frozen(**entry) for entry in content["frozen"]] == list(found.frozen)


def odd() -> nn.Module:
    """A network with a name that breaks quotes, elements and escapes that are not careful."""
    model = nn.Sequential()
    model.add_module('a"</script><b>\\', nn.Conv2d(3, 8, 1))
    model.add_module("&amp", nn.Conv2d(8, 2, 1))
    return model


def test_graphviz(tmp_path: Path) -> None:
    path = tmp_path / "new" / "graph.dot"
    for model in (Residual(), odd()):
        found = explained(model)
        text = found.dot(path)
        assert text == path.read_text(encoding="utf-8") == found.dot()
        string = r'"(?:[^"\\\n]|\\.)*"'
        value = rf"(?:{string}|[\w.]+)"
        attributes = rf"\[{value}={value}(?:, {value}={value})*\]"
        head, *body, last = text.splitlines()
        assert re.fullmatch(rf"digraph {string} {{", head)
        assert last == "}"
        nodes = [line for line in body if re.fullmatch(rf"  n\d+ {attributes};", line)]
        edges = [line for line in body if re.fullmatch(rf"  n\d+ -> n\d+ {attributes};", line)]
        assert (len(nodes), len(edges)) == (len(found.nodes), len(found.edges))
        assert len(body) == 3 + len(nodes) + len(edges)
    assert 'a\\"</script><b>\\\\' in text


def test_the_page_is_whole_and_closed(tmp_path: Path) -> None:
    found = explained(odd())
    html = found.html(tmp_path / "graph.html").read_text(encoding="utf-8")
    assert html.count(" data-k=") == len(found.nodes)
    assert html.count('<path class="arc ') == len(found.edges) > 0
    assert not re.findall(r"(?:src|href)=|https?:", html)
    data = re.search(r'<script type="application/json" id="found">(.*?)</script>', html, re.S)
    assert data is not None
    content = json.loads(data[1])
    assert [node["name"] for node in content["nodes"]] == [node.name for node in found.nodes]
    assert [
        (found.nodes[edge["from"]].name, found.nodes[edge["to"]].name) for edge in content["edges"]
    ] == [(edge.source, edge.target) for edge in found.edges]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#x27;sha256-{digest}&#x27;" in html
    assert "<b>\\" not in html


def test_a_hundred_groups_have_a_row_each(tmp_path: Path) -> None:
    found = cpd.explain(cpd.comb(linear(*[4] * 122), torch.randn(1, 4)))
    assert sum(node.kind == "group" for node in found.nodes) == 120
    html = found.html(tmp_path / "graph.html").read_text(encoding="utf-8")
    assert html.count(" data-k=") == 122
    assert f'height="{26 * 122}"' in html


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for write in (explained().html, explained().dot):
        with pytest.raises(OutputError, match="cannot write"):
            write(tmp_path / "file" / "graph.html")


# --- the shell ------------------------------------------------------------------------------------


def small() -> nn.Module:
    return Residual()


def test_comb_prints_time_and_coverage_and_writes_graphs(capsys: Any, tmp_path: Path) -> None:
    dot, html = tmp_path / "graph.dot", tmp_path / "graph.html"
    words = ["comb", "test_explain:small", "--input_shape", "3,6,6"]
    assert main([*words, "--dot", str(dot), "--html", str(html)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    groups = cpd.comb(Residual(), IMAGE)
    assert re.search(r"combed in \d+\.\d s; can go: ", shown)
    params = groups.cost("params", groups.everything())
    assert f"{groups.coverage['params']:.1%} of {params:,} parameters" in shown
    for group in groups:
        assert f"{group.share['params']:.1%}" in shown
        assert f"{group.share['macs']:.1%}" in shown
    assert "conv2d in head" in shown
    assert dot.read_text(encoding="utf-8").startswith("digraph")
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main([*words, "--html", str(dot / "graph.html")]) == 5
    assert "cannot write" in capsys.readouterr().err
