"""Thousands of random networks, in chunks that a later run goes on from.

Each chunk has a seed of its own and leaves a file; what failed is made smaller and kept in it, and
docs/fuzz.md is written from all of them.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import generator

from .base import IDIOMS
from .check import check, wishes
from .network import Spec
from .shrink import shrunk

CHUNK = 20
HEAD = """# Random networks

Written by `make fuzz`. Each network is combed with `exact=True` and without, cut by a random plan
at a random target, and held to all laws: proof ≤ 1e-9 in float64, equal to the zeroed network
at other batch sizes and in training mode, parameters and MACs as predicted, shapes as planned, the
empty plan, copies, JSON, gradients, and nothing left behind on the model or the random state.
"""


def failure(spec: Spec, wish: dict[str, Any]) -> str:
    """Return how the laws fail on a network, or ""."""
    try:
        check(spec, wish)
    except Exception as error:  # noqa: BLE001 - any error is the finding
        return f"{type(error).__name__}: {error}".strip()
    return ""


def kind(text: str) -> str:
    """Return what two failures of one cause share: the first line, without its numbers."""
    first = text.splitlines()[0] if text else ""
    return "".join(x for x in first if not x.isdigit())[:80]


def chunk(number: int) -> dict[str, Any]:
    """Check the networks of one seed, all with one idiom in common; failures do not end it."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"seed": number, "failures": [], "specs": [], "idioms": Counter()}
    found |= {"units": 0, "of": 0, "share": 0.0}
    of = list(IDIOMS)[number % len(IDIOMS)]
    started = time.perf_counter()

    @seed(number)
    @settings(
        max_examples=CHUNK, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(generator.specs(of), wishes())
    def networks(spec: Spec, wish: dict[str, Any]) -> None:
        text = json.dumps([spec, wish], sort_keys=True)
        found["specs"].append(blake2b(text.encode(), digest_size=8).hexdigest())
        found["idioms"].update(set(generator.names(spec["blocks"])))
        try:
            removed = check(spec, wish)
        except Exception as error:  # noqa: BLE001 - any error is the finding
            found["failures"].append([spec, wish, f"{type(error).__name__}: {error}".strip()])
            return
        found["units"] += removed.units
        found["of"] += removed.of
        found["share"] += removed.share

    networks()
    found["failures"] = smallest(found["failures"])
    found["seconds"] = time.perf_counter() - started
    return found


def smallest(failures: list[Any]) -> list[Any]:
    """Make the first failure of each kind smaller; count the others with it."""
    kinds: dict[str, list[Any]] = {}
    for spec, wish, text in failures:
        kinds.setdefault(kind(text), []).append((spec, wish, text))
    result = []
    for name, cases in kinds.items():
        spec, wish, _ = min(cases, key=lambda case: len(json.dumps(case[0])))
        spec, wish = shrunk(spec, wish, lambda s, w, name=name: kind(failure(s, w)) == name, 80)
        text = failure(spec, wish)
        result.append({"times": len(cases), "spec": spec, "wish": wish, "text": text})
    return result


def chunks(nets: int, folder: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield the chunks there are, then new ones, until so many different networks are checked.

    A chunk with failures is checked again.
    """
    distinct: set[str] = set()
    taken = set()
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if not found["failures"]:
            distinct.update(found["specs"])
            taken.add(found["seed"])
            yield found
    with get_context("spawn").Pool(jobs) as pool:
        numbers = (k for k in range(10**9) if k not in taken)
        while len(distinct) < nets:
            for found in pool.map(chunk, [next(numbers) for _ in range(jobs)]):
                (folder / f"{found['seed']:06}.json").write_text(json.dumps(found))
                distinct.update(found["specs"])
                yield found


def page(found: list[dict[str, Any]]) -> str:
    """Return docs/fuzz.md."""
    nets = sum(len(x["specs"]) for x in found)
    distinct = len({spec for x in found for spec in x["specs"]})
    failures = [f for x in found for f in x["failures"]]
    idioms: Counter[str] = Counter()
    for x in found:
        idioms.update(x["idioms"])
    units, of = (sum(x[key] for x in found) for key in ("units", "of"))
    passed = max(nets - sum(f["times"] for f in failures), 1)
    lines = [
        HEAD,
        "| | |",
        "|---|---|",
        f"| networks | {nets:,} ({distinct:,} different) |",
        f"| plans | {2 * nets:,} |",
        f"| units removed | {units:,} of {of:,} |",
        f"| parameters removed, on average | {sum(x['share'] for x in found) / passed:.1%} |",
        f"| failures | {sum(f['times'] for f in failures)} |",
        f"| seconds | {sum(x['seconds'] for x in found):,.0f} |",
        f"| on | {platform.machine()}, one thread, PyTorch {torch.__version__} |",
        "",
        "## Idioms",
        "",
        "| idiom | networks |",
        "|---|---|",
        *(f"| {name} | {count:,} |" for name, count in idioms.most_common()),
        "",
    ]
    if failures:
        lines += ["## Failures", "", *(_failure(f) for f in failures)]
    return "\n".join(lines)


def _failure(failure: dict[str, Any]) -> str:
    first = failure["text"].splitlines()[0]
    case = json.dumps([failure["spec"], failure["wish"]])
    return f"- {failure['times']} times: {first}\n\n  ```json\n  {case}\n  ```\n"
