"""The report: a value that prints itself, JSON both ways, one page that needs nothing else."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from cpd.costs.latency import Latency
from cpd.errors import ArtefactError, OutputError
from cpd.plan import Width
from cpd.report import Measures, Report, environment, picture, plots
from cpd.report.pictures import colours
from cpd.stays import Frozen

EVIL = "<script>alert('x')</script> & $x^2$ \"quoted\" _x"


def latency(factor: float) -> Latency:
    return Latency(1.0 * factor, 1.1 * factor, 1.5 * factor, 2 * factor, 1000, 50, 1, "CPU", 2)


def history() -> list[dict[str, Any]]:
    """Base, prune and recover; every phase counts its steps from 0."""
    records: list[dict[str, Any]] = []
    for phase in ("base", "prune", "recover"):
        for step in range(0, 40, 2):
            records.append({"step": step, "phase": phase, "event": "step", "loss": 2 / (1 + step)})
            if phase == "prune" and step % 10 == 0:
                cost = {"macs": 1000 - 10 * step, "params": 100 - step}
                records.append({"step": step, "phase": phase, "event": "prune", **cost})
        records.append({"step": 39, "phase": phase, "event": "eval", "top1": 0.9})
    return records


def report(**changes: Any) -> Report:
    content: dict[str, Any] = {
        "before": Measures(
            {"top1": 0.9861, "top5": 1.0}, 300_000, 12_000_000, 2_500_000, latency(1)
        ),
        "after": Measures({"top1": 0.9806, "top5": 1.0}, 100_000, 6_000_000, 500_000, latency(0.5)),
        "history": history(),
        "widths": tuple(Width(f"blocks.{i}.weight:0", "channels", 64, 64 - i) for i in range(3)),
        "frozen": (Frozen("head.weight", 0, "feeds the output", 10),),
        "config": {"target": "macs=0.5", "nested": {"lr": 0.1}},
        "environment": {"python": "3"},
        "proof": "verified: exact",
        "notes": ("params: 2.00% below its budget; macs decides",),
        "title": "Digits",
    }
    return Report(**content | changes)


# the table ---------------------------------------------------------------------------------------

TABLE = """\
Digits

                  before      after          after / before
──────────────  ────────  ─────────  ──────────────────────
top1             98.61 %    98.06 %   99.4 % (−0.55 points)
top5            100.00 %   100.00 %  100.0 % (+0.00 points)
parameters      300.00 k   100.00 k     33.3 % (3.00× less)
MACs             12.00 M     6.00 M     50.0 % (2.00× less)
ONNX file        2.50 MB  500.00 kB     20.0 % (5.00× less)
latency median  1.000 ms   0.500 ms     50.0 % (2.00× less)
latency p90     1.500 ms   0.750 ms     50.0 % (2.00× less)
latency p99     2.000 ms   1.000 ms     50.0 % (2.00× less)

params: 2.00% below its budget; macs decides

verified: exact
"""


def test_it_prints_itself() -> None:
    assert str(report()) == TABLE


def test_what_was_not_measured_is_left_out_or_a_dash() -> None:
    text = str(Report(Measures({"mse": 3.0}, 10), Measures({"mse": 4.5}, 20, 5)))
    assert re.search(r"mse +3 +4\.5 +150\.0 % \(\+1\.5\)", text)
    assert re.search(r"parameters +10 +20 +200\.0 % \(2\.00× more\)", text)
    assert re.search(r"MACs +– +5 +–", text)
    assert "latency" not in text


def test_table_for_the_terminal() -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(report(title="[red]not markup[/red]").table())
    text = console.export_text()
    assert "[red]not markup[/red]" in text
    assert "50.0 % (2.00× less)" in text


# json --------------------------------------------------------------------------------------------


def test_json_both_ways() -> None:
    one = report()
    text = one.to_json()
    assert Report.from_json(text) == one
    assert Report.from_json(text).to_json() == text
    assert json.loads(text)["schema"] == 1


def test_values_become_plain() -> None:
    given = {
        "tensor": torch.tensor([1.0, float("nan")]),
        "scalar": np.float32(0.5),
        "infinite": float("inf"),
        "path": Path("a/b"),
        "function": json.dumps,
        "pair": (1, True),
        "none": None,
        3: "key",
    }
    one = report(config=given, history=[{"step": np.int64(3), "loss": torch.tensor(2.0)}])
    assert one.config == {
        "tensor": [1.0, None],
        "scalar": 0.5,
        "infinite": None,
        "path": "a/b",
        "function": "json.dumps",
        "pair": [1, True],
        "none": None,
        "3": "key",
    }
    assert one.history == [{"step": 3, "loss": 2.0}]
    assert Report.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"schema": 2}',
        '{"schema": 1}',
        "[" * 100_000,
        '{"schema": 1, "x": 2}',
    ],
    ids=range(8),
)
def test_foreign_json(text: str) -> None:
    with pytest.raises(ArtefactError, match="report: "):
        Report.from_json(text)


def test_unknown_entries_are_refused() -> None:
    content = json.loads(report().to_json())
    content["before"]["speed"] = 3
    with pytest.raises(ArtefactError, match="speed"):
        Report.from_json(json.dumps(content))


# the page ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects tags and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]


def test_page_is_whole_and_self_contained(tmp_path: Path) -> None:
    path = report().html(tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == 2
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    for word in ("98.06 %", "feeds the output", "verified: exact", "macs=0.5", "blocks.2.weight:0"):
        assert word in text
    assert not re.findall(r"#0102[0-9a-f]{2}", text), "a stand-in colour was left"
    assert "prefers-color-scheme: dark" in text


def test_page_escapes_everything(tmp_path: Path) -> None:
    path = report(
        title=EVIL,
        proof=EVIL,
        widths=(Width(EVIL, EVIL, 8, 4),),
        frozen=(Frozen(EVIL, 0, EVIL, 1),),
        config={EVIL: EVIL},
        environment={EVIL: EVIL},
        before=Measures({EVIL: 0.5}),
        history=[{"step": 1, "phase": EVIL, "event": EVIL, EVIL: 0.5}],
    ).html(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert "script" not in Page(text).tags
    assert "<script" not in text


def test_page_is_the_same_each_time(tmp_path: Path) -> None:
    one, two = (report().html(tmp_path / name).read_bytes() for name in ("1.html", "2.html"))
    assert one == two


def test_page_of_an_empty_report(tmp_path: Path) -> None:
    text = Report(Measures(), Measures()).html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Nothing was recorded" in text
    assert "svg" not in Page(text).tags


def test_page_refuses_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        report().html(tmp_path / "file" / "report.html")


# plots -------------------------------------------------------------------------------------------


def test_plot_of_many_widths_is_tall_enough_to_read() -> None:
    entries = [Width(f"layers.{i}." + "deep." * 12 + "weight:0", "heads", 64, i) for i in range(60)]
    root = ElementTree.fromstring(plots.widths(entries))
    height = float(root.attrib["height"].removesuffix("pt"))
    assert height / 60 > 12  # points for a line
    words = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "64 → 0" in words
    assert max(map(len, words)) < 60


def test_run_goes_on_where_a_phase_counts_from_the_start() -> None:
    steps = plots._steps(history())
    assert steps == sorted(steps)
    assert steps[-1] == 3 * 39
    phases = plots._phases(history(), steps)
    assert phases == [("base", 0, 39), ("prune", 39, 78), ("recover", 78, 117)]


def test_run_does_not_draw_every_class() -> None:
    classes = {f"iou_{number}": 0.5 for number in range(150)}
    told = [{"phase": "prune", "step": step, "miou": 0.5, **classes} for step in (1, 2)]
    figure = plots.run_figure(told, ["miou", *classes], {})
    assert figure is not None
    assert [line.get_label() for line in figure.axes[0].lines] == ["miou"]
    ElementTree.fromstring(plots.run(told, ["miou", *classes], {}))  # whose legend would not fit


def test_run_draws_only_what_there_is() -> None:
    figure = plots.run_figure(history(), ["top1"], {"macs": 1000, "params": None})
    assert figure is not None
    assert [axes.get_title("left") for axes in figure.axes] == [
        "accuracy",
        "loss",
        "cost, % of before",
    ]
    cost = figure.axes[2].get_lines()[0]
    assert list(cost.get_ydata()) == [100, 90, 80, 70]
    assert figure.axes[1].get_yscale() == "log"
    loss = [{"step": 0, "loss": 0.0}, {"step": 1, "loss": None}, {"loss": 1.0}, {"step": "x"}]
    figure = plots.run_figure(loss, ["top1"], {"macs": 1000})
    assert figure is not None
    assert [axes.get_title("left") for axes in figure.axes] == ["loss"]
    assert plots.run_figure([], ["top1"], {"macs": 1000}) is None


def test_environment_names_versions() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert "cores" in found["machine"]


# pictures ----------------------------------------------------------------------------------------


def decoded(png: str) -> np.ndarray[Any, Any]:
    from matplotlib.image import imread

    return (imread(io.BytesIO(b64decode(png)))[..., :3] * 255).round().astype(int)


def test_colours_of_classes_by_hand() -> None:
    """The published map of PASCAL VOC begins so."""
    found = colours(np.array([[0, 1, 2, 3, 8, 21, -1]]))[0].tolist()
    assert found[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert found[4:] == [[64, 0, 0], [128, 64, 128], [255, 255, 255]]


def test_a_picture_is_its_pixels() -> None:
    image = np.stack([np.full((2, 3), level) for level in (-2.0, 0.0, 2.0)])
    made = picture("first", image, {"label": np.array([[0, 1, -1], [0, 1, 2]])})
    assert list(made.panels) == ["image", "label"]
    assert (decoded(made.panels["image"]) == [0, 128, 255]).all()
    label = decoded(made.panels["label"]).tolist()
    assert label[0] == [[0, 0, 0], [128, 0, 0], [255, 255, 255]]
    assert label[1][2] == [0, 128, 0]
    grey = picture("grey", np.array([[[0.0, 1.0]]]), {}).panels["image"]
    assert decoded(grey).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_large_pictures_are_thinned_out() -> None:
    made = picture("large", np.zeros((3, 500, 333)), {"label": np.ones((500, 333))})
    for png in made.panels.values():
        assert decoded(png).shape == (125, 84, 3)
    assert (decoded(made.panels["image"]) == 0).all(), "one colour everywhere has no range"


def test_pictures_in_json_and_on_the_page(tmp_path: Path) -> None:
    drawn = picture(EVIL, np.eye(4)[None], {"label": np.eye(4), EVIL: np.eye(4)})
    one = report(pictures=[drawn])
    assert Report.from_json(one.to_json()) == one
    text = one.html(tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("img") == 3
    assert "script" not in page.tags
    links = [link for link in page.links if not link.startswith("#")]
    assert links == [f"data:image/png;base64,{png}" for png in drawn.panels.values()]
    assert "img-src data:" in text
    older = json.loads(one.to_json())
    del older["pictures"]
    assert Report.from_json(json.dumps(older)) == report()
