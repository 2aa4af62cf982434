"""`python -m bench.collecting`: what an importance costs on top of a plain training step.

A plain step is forward, backward and SGD. The time that an importance observes gradients for is
taken by itself. What its hooks add inside of forward and backward, where it has any, is the step's
time beside that of the plain ones before and after it, and as exact as that.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import date
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = ("resnet18", "mobilenetv2_100", "deit_tiny_patch16_224")
IMPORTANCES: dict[str, Any] = {
    "hessian": "hessian",
    "hessian, mended": {"hessian": {"mended": True}},
    "fisher": "fisher",
    "taylor": "taylor",
    "obd": "obd",
    "kfac": "kfac",
    "variance": "variance",
}
LIMITS = {"hessian": 0.10, "fisher": 0.35}
BATCH, SIDE = 32, 96


def measure(network: str, rounds: int) -> dict[str, Any]:
    """Return the seconds of a plain step, and the share that each importance adds to it."""
    import timm

    import cpd
    from cpd.importance import resolve

    torch.manual_seed(0)
    options = {"img_size": SIDE} if "vit" in network or "deit" in network else {}
    model = timm.create_model(network, num_classes=10, **options)
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(10, (BATCH,))
    groups = cpd.comb(model, images[:2])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    watching = {name: resolve(spec) for name, spec in IMPORTANCES.items()}
    shares: dict[str, list[float]] = {name: [] for name in watching}
    plain = []

    def timed(importance: Any = None) -> tuple[float, float]:
        start = process_time()
        own = _step(model, optimizer, images, labels, importance)
        return process_time() - start, own

    for number in range(rounds + 1):
        for name, importance in watching.items():
            before, _ = timed()
            importance.start(model, groups)
            hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
            timed(importance)  # the first step of an interval also counts what is left
            seconds, own = timed(importance)
            importance.close()
            after, _ = timed()
            if number:  # the first round warms up
                inside = 2 * (seconds - own) / (before + after) - 1 if hooked else 0.0
                shares[name].append(inside + own / (seconds - own))
                plain.append(after)
    added = {name: median(found) for name, found in shares.items()}
    return {"network": network, "seconds": median(plain), "added": added}


def _step(
    model: nn.Module, optimizer: Any, images: torch.Tensor, labels: torch.Tensor, importance: Any
) -> float:
    """Take a step; return the seconds that the importance observed its gradients for."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    start = process_time()
    if importance is not None:
        importance.observe()
    own = process_time() - start
    optimizer.step()
    return own


def page(results: list[dict[str, Any]], rounds: int) -> str:
    """Return the page of the documentation."""
    from .__main__ import machine, versions

    facts = [", ".join(f"{k} {v}" for k, v in x.items() if v) for x in (machine(), versions())]
    lines = [
        "# Measured: what collecting an importance costs",
        "",
        f"Made by `python -m bench.collecting` on {date.today().isoformat()}; not written by hand.",
        "",
        f"Share that is added to a plain training step (forward, backward, SGD; {BATCH} images of "
        f"{SIDE}×{SIDE}, one thread), in CPU time: the median of {rounds} steps. What observes "
        "gradients alone is timed by itself, at the second step of an interval (the first also "
        "counts the channels that are left); what hooks add (fisher, kfac, variance) is the "
        "difference to plain steps before and after, and only as exact as these are alike.",
        "",
        f"Machine: {facts[0]}, load {os.getloadavg()[0]:.1f}. Versions: {facts[1]}.",
        "",
        "| importance | " + " | ".join(r["network"] for r in results) + " | at most |",
        "|---" + "|---:" * (len(results) + 1) + "|",
        "| plain step, s | " + " | ".join(f"{r['seconds']:.3f}" for r in results) + " | |",
    ]
    for name in IMPORTANCES:
        cells = [f"{r['added'][name]:+.1%}" for r in results]
        limit = f"{LIMITS[name]:.0%}" if name in LIMITS else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {limit} |")
    lines += ["", "`hutchinson` is not here: it makes four to six steps of one."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.collecting", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--write-docs", action="store_true", help="write docs/collecting.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from cpd import _torchvision

    _torchvision.ensure()
    results = []
    for network in options.networks:
        results.append(measure(network, options.rounds))
        print(json.dumps(results[-1]), flush=True)
    if options.write_docs:
        (ROOT / "docs" / "collecting.md").write_text(page(results, options.rounds))


if __name__ == "__main__":
    main()
