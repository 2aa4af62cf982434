"""`python -m bench.latency`: a latency target, held to a real clock end to end.

Networks are cut to a share of their time by `cpd.prune`, then measured once more by a new clock
beside the unpruned network, with more runs. Nothing here asserts: times are those of a machine.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "budgets.md"
BEGIN, END = "<!-- bench.latency begins -->", "<!-- bench.latency ends -->"
NETWORKS = ("resnet10t", "mobilenetv2_050", "deit_tiny_patch16_224")
WAYS = ("onnx", "eager")
BATCH, SIDE = 8, 64


def measure(
    network: str, way: str, share: float, runs: int, multiple: int | str = "auto"
) -> dict[str, Any]:
    """Cut a network to a share of its latency; return what was said and what a new clock says."""
    import timm

    import cpd
    from cpd.measure import measurer

    torch.manual_seed(0)
    options = {"img_size": SIDE} if "deit" in network else {}
    model = timm.create_model(network, num_classes=10, **options).eval()
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    start = perf_counter()
    small, plan = cpd.prune(
        model,
        images,
        target={"latency": share},
        multiple_of=multiple,
        measure={way: {"cache": None, "threads": 1, "runs": runs}},
        unreachable="closest",
        verify=False,
    )
    seconds = perf_counter() - start
    before, after = plan.costs["latency_ms"]
    clock = measurer({way: {"cache": None, "threads": 1, "runs": 3 * runs}}).clock
    assert clock is not None
    return {
        "network": network,
        "way": way,
        "share": share,
        "ms": before,
        "said": after / before,
        "again": clock.share(small, model, (images,)),
        "macs": plan.costs["macs"][1] / plan.costs["macs"][0],
        "asked": str(multiple),
        "multiple": plan.options["multiple_of"],
        "notes": [note for note in plan.notes if note.startswith("latency")],
        "seconds": seconds,
    }


def section(results: list[dict[str, Any]]) -> str:
    """Return what `docs/budgets.md` says of it."""
    from .__main__ import machine, versions

    facts = [", ".join(f"{k} {v}" for k, v in x.items() if v) for x in (machine(), versions())]
    lines = [
        BEGIN,
        f"Made by `python -m bench.latency` on {date.today().isoformat()}, {BATCH} images of "
        f"{SIDE}×{SIDE}, one thread. "
        f"Machine: {facts[0]}. Versions: {facts[1]}.",
        "",
        "| network | by | whole, ms | asked | multiple of | said by the plan | a new clock | off "
        "| MACs left | measured | seconds | load |",
        "|---|---|" + "---:|" * 10,
    ]
    for r in results:
        off = r["again"] / r["share"] - 1
        times = r["notes"][0].rpartition("end to end ")[2] if r["notes"] else "–"
        cells = [r["network"], r["way"], f"{r['ms']:.2f}", f"{r['share']:.0%}", str(r["multiple"])]
        cells += [f"{r['said']:.1%}", f"{r['again']:.1%}", f"{off:+.1%}", f"{r['macs']:.1%}", times]
        cells += [f"{r['seconds']:.0f}", f"{r['load']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Load: programs that ran or waited on the machine meanwhile, beside the measuring one.",
    ]
    return "\n".join([*lines, END])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--multiple", default="auto", help="multiple_of: auto, or a number")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "latency.json")
    parser.add_argument("--again", action="store_true", help="measure what is known as well")
    parser.add_argument("--write-docs", action="store_true", help="write it into docs/budgets.md")
    options = parser.parse_args()
    from os import getloadavg

    from cpd import _torchvision

    _torchvision.ensure()
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.output.read_text()) if options.output.exists() else []
    multiple = options.multiple if options.multiple == "auto" else int(options.multiple)
    results = [r for r in results if r.get("asked") == str(multiple)]  # one page, one way to ask
    for network in options.networks:
        for way in options.ways:
            if options.again:
                results = [r for r in results if (r["network"], r["way"]) != (network, way)]
            if not any((r["network"], r["way"]) == (network, way) for r in results):
                load = getloadavg()[0]
                found = measure(network, way, options.share, options.runs, multiple)
                results.append(found | {"load": load})
                print(json.dumps(results[-1]), flush=True)
                options.output.write_text(json.dumps(results, indent=1) + "\n")
    if options.write_docs:
        text = PAGE.read_text()
        before, _, rest = text.partition(BEGIN)
        PAGE.write_text(before + section(results) + rest.partition(END)[2])


if __name__ == "__main__":
    main()
