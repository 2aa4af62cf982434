"""Thousands of random networks, in chunks that a later run goes on from.

Each chunk has a seed of its own. The sums over those that passed are kept in the repository, with
the code that they were checked with; what failed is made smaller, written into docs/fuzz.md, and
checked again by the next run.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from zoo.runner import fingerprint

import generator
from cpd.files import write_text

from .base import IDIOMS
from .check import check, wishes
from .network import Spec
from .shrink import shrunk

CHUNK = 20
DIGEST = 5  # bytes
HEAD = """# Random networks

Written by `make fuzz`. Each network is combed with `exact=True` and without, cut by a random plan
at a random target, and held to all laws: proof ≤ 1e-9 in float64, with `exact=True` equal to the
zeroed network at other batch sizes and, where nothing is random, in training mode, parameters as
predicted (MACs too, of every fourth network: it takes one more trace), shapes as planned, the empty
plan, copies, JSON, gradients, and nothing left behind on the model or the random state.
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
        found["specs"].append(blake2b(text.encode(), digest_size=DIGEST).hexdigest())
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


def chunks(sums: Sums, nets: int, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield chunks of seeds that passed no earlier run, until so many different networks have
    passed with the code as it is at the start.
    """
    code = fingerprint()
    numbers = (k for k in range(10**9) if k not in sums.seeds)
    with get_context("spawn").Pool(jobs) as pool:
        waiting: list[Any] = []
        while len(sums.specs.get(code, ())) < nets:
            while len(waiting) < 2 * jobs:  # none idles while a slow one is waited for
                waiting.append(pool.apply_async(chunk, (next(numbers),)))
            found = waiting.pop(0).get()
            if not found["failures"]:
                sums.add(found, code)
            yield found


@dataclass
class Sums:
    """What passed: seeds, digests of the networks by the code that they passed with, and sums."""

    seeds: list[int] = field(default_factory=list)
    specs: dict[str, set[str]] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    idioms: Counter[str] = field(default_factory=Counter)
    nets: int = 0
    units: int = 0
    of: int = 0
    share: float = 0.0
    seconds: float = 0.0

    @property
    def different(self) -> int:
        """How many different networks passed with any code."""
        return len(set().union(*self.specs.values()))

    def add(self, found: dict[str, Any], code: str) -> None:
        """Add a chunk that passed with a code."""
        self.seeds.append(found["seed"])
        self.specs.setdefault(code, set()).update(found["specs"])
        self.idioms.update(found["idioms"])
        count = len(found["specs"])
        self.codes[code] = self.codes.get(code, 0) + count
        self.nets += count
        for name in ("units", "of", "share", "seconds"):
            setattr(self, name, getattr(self, name) + found[name])

    @classmethod
    def read(cls, path: Path) -> Sums:
        """Return what a file holds, or nothing."""
        if not path.exists():
            return cls()
        held = json.loads(path.read_text())
        texts, size = held.pop("specs"), 2 * DIGEST
        if isinstance(texts, str):
            texts = {"": texts}  # an earlier file did not say by which code
        specs = {
            code: {text[k : k + size] for k in range(0, len(text), size)}
            for code, text in texts.items()
        }
        return cls(**held | {"specs": specs, "idioms": Counter(held["idioms"])})

    def write(self, path: Path) -> None:
        """Write all of it, in one step."""
        specs = {code: "".join(sorted(found)) for code, found in self.specs.items()}
        write_text(path, json.dumps(vars(self) | {"specs": specs}) + "\n")


def page(sums: Sums, failures: list[dict[str, Any]]) -> str:
    """Return docs/fuzz.md."""
    code = fingerprint()
    now, distinct = sums.codes.get(code, 0), len(sums.specs.get(code, ()))
    lines = [
        HEAD,
        "| | |",
        "|---|---|",
        f"| networks | {sums.nets:,} ({sums.different:,} different) |",
        f"| of them with the code of the last run, `{code}` | {now:,} ({distinct:,} different) |",
        f"| plans | {2 * sums.nets:,} |",
        f"| units removed | {sums.units:,} of {sums.of:,} |",
        f"| parameters removed, on average | {sums.share / max(sums.nets, 1):.1%} |",
        f"| failures | {sum(f['times'] for f in failures)} |",
        f"| seconds | {sums.seconds:,.0f} |",
        f"| on | {platform.machine()}, one thread, PyTorch {torch.__version__} |",
        "",
        "## Idioms",
        "",
        "| idiom | networks |",
        "|---|---|",
        *(f"| {name} | {count:,} |" for name, count in sums.idioms.most_common()),
        "",
    ]
    if failures:
        lines += ["## Failures", "", *(_failure(f) for f in failures)]
    return "\n".join(lines)


def _failure(failure: dict[str, Any]) -> str:
    first = failure["text"].splitlines()[0]
    case = json.dumps([failure["spec"], failure["wish"]])
    return f"- {failure['times']} times: {first}\n\n  ```json\n  {case}\n  ```\n"
