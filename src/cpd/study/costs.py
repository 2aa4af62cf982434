"""What a cut gains, measured without data: the network as its recipe makes it, random weights."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from cpd import costs, exporters
from cpd.compress import CompressConfig, plain
from cpd.compress.run import built
from cpd.costs import latency
from cpd.distill import isolated
from cpd.errors import ArtefactError
from cpd.files import write_text
from cpd.plan import Plan
from cpd.prune import prune
from cpd.report import Measures, Report, environment

__all__ = ["costed"]

_PROBE, _LEAST = 3, 10  # runs that tell how long one takes; the fewest a median is taken of
_WARM = 60.0  # seconds: slow networks are warm after fewer runs than the recipe has


def costed(
    source: Callable[..., nn.Module],
    config: CompressConfig,
    *,
    shape: Any = None,
    seconds: float = 600.0,
    kept: Path | None = None,
) -> Report:
    """Parameters, MACs, ONNX size and latency before and after a cut to the recipe's target.

    The cut is that of the recipe (strategy, ranking, multiples) by magnitude, as the recipe's own
    importance may need data; it is proved. ``source`` also has ``inputs``, which knows the shape of
    a sample where ``shape`` is nothing. ``kept`` is a file with the times of each run: those of the
    same cut on the same machine count, and all are kept, so that slow networks are timed in turns.

    Raises what ``prune`` and the export raise.
    """
    with isolated(config.seed):
        network = built(source, config).eval()
        found: Any = source
        inputs = found.inputs(network, shape)
        options: dict[str, Any] = {
            "ignore": config.ignore,
            "exact": config.exact,
            "unknown": config.unknown,
        }
        small, plan = prune(
            network,
            inputs,
            importance="magnitude",
            target=config.target,
            keep_class=config.keep_class,
            depth=config.depth,
            **options,
            **config.choice,
        )
        networks = {"before": network, "after": small}
        measured: dict[str, dict[str, Any]] = {
            name: {"params": costs.params(each), "macs": costs.macs(each, inputs)}
            for name, each in networks.items()
        }
        timed = _timed(networks, inputs, config, seconds, _Times(kept, plan))
    before, after = (Measures(**measured[name], **timed[name]) for name in networks)
    return Report(
        before,
        after,
        widths=plan.widths,
        config=plain(config.to_dict()),
        environment=environment(),
        proof="random weights, cut by magnitude",
        notes=plan.notes,
        title=f"{config.model or type(network).__name__} → {config.target}",
    )


class _Times:
    """Nanoseconds of each run before and after, kept in a file where there is one."""

    def __init__(self, path: Path | None, plan: Plan) -> None:
        self.path, self.cut = path, hashlib.sha256(plan.to_json().encode()).hexdigest()
        self.taken: dict[str, list[int]] = {}

    def of(self, names: Iterable[str], **how: Any) -> list[list[int]]:
        """What the file has for this cut, this machine and these settings; else nothing."""
        self.key = {"cut": self.cut, "device": latency.device(), **how}
        stored = self._stored()
        known = stored.get("taken", {}) if stored.get("key") == self.key else {}
        self.taken = {name: list(known.get(name, ())) for name in names}
        return list(self.taken.values())

    def keep(self, *_: int) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps({"key": self.key, "taken": self.taken}) + "\n")

    def _stored(self) -> dict[str, Any]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtefactError(
                f"{self.path} is damaged: {error}. Delete it to measure anew."
            ) from error
        return found


def _timed(
    networks: dict[str, nn.Module],
    inputs: Any,
    config: CompressConfig,
    seconds: float,
    times: _Times,
) -> dict[str, dict[str, Any]]:
    """Size and latency of both as ONNX: as many runs as fit into the time, at most the recipe's."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = []
        for name, network in networks.items():
            paths.append(exporters.onnx(network, inputs, Path(temporary) / f"{name}.onnx"))
        bench = config.bench
        common: dict[str, Any] = {"batch": bench.batch, "threads": bench.threads}
        models = [latency.session(path, **common) for path in paths]
        for model in models:
            model.times(2)
        each = sum(median(model.times(_PROBE)) for model in models) / 1e9
        fit = int(seconds / (each * (1 + 1 / latency.BLOCK)))
        warmup = min(bench.warmup, int(_WARM / each))
        for model in models:
            model.times(warmup)
        taken = times.of(networks, **common)
        runs = max(_LEAST, min(bench.runs, min(map(len, taken)) + fit))
        latency.turns(models, taken, runs, times.keep)
        found = [latency.summary(each, warmup, bench.batch, models[0].threads) for each in taken]
        return {
            name: {"onnx_bytes": path.stat().st_size, "latency": time}
            for name, path, time in zip(networks, paths, found, strict=True)
        }
