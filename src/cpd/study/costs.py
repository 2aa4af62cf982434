"""What a cut gains, measured without data: the network as its recipe makes it, random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from cpd import costs, exporters
from cpd.compress import CompressConfig, plain
from cpd.compress.run import built
from cpd.costs import latency
from cpd.distill import isolated
from cpd.prune import prune
from cpd.report import Measures, Report, environment

__all__ = ["costed"]

_PROBE, _LEAST = 3, 10  # runs that tell how long one takes; the fewest a median is taken of


def costed(
    source: Callable[..., nn.Module],
    config: CompressConfig,
    *,
    shape: Any = None,
    seconds: float = 600.0,
) -> Report:
    """Parameters, MACs, ONNX size and latency before and after a cut to the recipe's target.

    The cut is that of the recipe (strategy, ranking, multiples) by magnitude, as the recipe's own
    importance may need data; it is proved. ``source`` also has ``inputs``, which knows the shape of
    a sample where ``shape`` is nothing.

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
        timed = _timed(networks, inputs, config, seconds)
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


def _timed(
    networks: dict[str, nn.Module],
    inputs: Any,
    config: CompressConfig,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """Size and latency of both as ONNX: as many runs as fit into the time, at most the recipe's."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = []
        for name, network in networks.items():
            paths.append(exporters.onnx(network, inputs, Path(temporary) / f"{name}.onnx"))
        bench = config.bench
        common: dict[str, Any] = {"batch": bench.batch, "threads": bench.threads}
        probe = latency.compare(paths, runs=_PROBE, warmup=2, **common)
        each = sum(one.median_ms for one in probe) / 1000 * (1 + 1 / latency.BLOCK)
        runs = max(_LEAST, min(bench.runs, int(seconds / each)))
        times = latency.compare(paths, runs=runs, warmup=min(bench.warmup, runs // 10), **common)
        return {
            name: {"onnx_bytes": path.stat().st_size, "latency": time}
            for name, path, time in zip(networks, paths, times, strict=True)
        }
