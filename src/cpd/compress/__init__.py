"""The whole way: train, comb, prune while a teacher teaches, cut, prove, recover, measure."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from cpd import exporters, models
from cpd.compress.config import BenchOptions, CompressConfig, plain
from cpd.compress.journal import load_weights
from cpd.compress.measure import report
from cpd.compress.run import Run, built
from cpd.distill import isolated
from cpd.distill.failures import explaining
from cpd.files import write_text
from cpd.plan import Plan
from cpd.report import Report, environment

__all__ = ["BenchOptions", "CompressConfig", "Result", "compress", "load_weights", "plain"]

ORIGIN = ("model", "model_args", "target", "seed")  # what of the configuration a manifest notes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What ``compress`` gives back; prints itself as the table of before and after.

    Attributes:
        model: the smaller network, of the class it came from, trained.
        plan: what was kept. report: what was measured, and how it came about.
        described: of a uniform plan, the configuration that builds the network, where there is one.
    """

    model: nn.Module
    plan: Plan
    report: Report
    described: models.Config | None = None

    def __str__(self) -> str:
        """The report's table."""
        return str(self.report)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the artefact (weights and plan, see ``cpd.load``) and the report.

        Raises:
            OutputError: the folder holds something already, or cannot be written.
        """
        path = exporters.save(
            self.model, self.plan, folder, overwrite=overwrite, extra=self._origin()
        )
        write_text(path / "report.json", self.report.to_json())
        if find_spec("matplotlib") is not None:
            self.report.html(path / "report.html")
        else:
            log.warning("report.html is not written: its plots need matplotlib")
        return path

    def _origin(self) -> dict[str, Any]:
        """What the manifest says of how the network came about."""
        config, versions = self.report.config, self.report.environment or environment()
        found = {key: config[key] for key in ORIGIN if config.get(key) is not None}
        if self.described is not None:
            found["config"] = plain(self.described.to_dict())
        return {**found, "versions": {k: v for k, v in versions.items() if k != "machine"}}


def compress(
    model: nn.Module | Callable[..., nn.Module],
    *,
    target: Any,
    data: Any,
    example_inputs: Any = None,
    teacher: nn.Module | str | None = "self",
    callbacks: tuple[Any, ...] = (),
    **options: Any,
) -> Result:
    """Make a network smaller: the interval loop of the paper, from the network to the report.

    Every ``interval`` steps the units of the least accumulated importance go, until the target,
    while the unpruned network teaches; then the network is cut, proved, and recovers with its
    teacher (J. Schmitt et al., CPD: Comb, Prune, Distill, ITSC 2024).

    Args:
        model: the network, which stays as it is, or a callable that makes it from ``model_args``.
        target: costs to reach, as shares of the unpruned network: "macs=0.5" or {"macs": 0.5}.
        data: a name of the data shelf, or any object with ``train``, ``val`` and ``test``: datasets
            of (input, target), or loaders of batches.
        example_inputs: a tensor, a tuple of arguments or a dict of them; by default from the data.
        teacher: "self" for the unpruned network, another network of the same task, or None.
        callbacks: objects with any methods of ``cpd.distill.Callback``.
        **options: the other fields of ``CompressConfig``, each by its name; ``base``, ``prune``,
            ``recover`` and ``bench`` may be mappings.

    Raises:
        UnknownName: a keyword or a name of a shelf that does not exist.
        InputError: a value that cannot work, such as a target above 1.
        UnreachableTarget: the target cannot be met.
        NonFiniteLoss: a loss became NaN or infinite; the last checkpoint is intact, and the batch
            lies beside it.
        OutOfMemory, DataError: no memory is left; a process that loads data died.
        KeyboardInterrupt, Interrupted: Ctrl-C or SIGTERM, after the step; a checkpoint is written.
        OutputError: the output folder holds something already, or cannot be written.
    """
    noted = None if isinstance(model, nn.Module) else plain(model)
    config = CompressConfig.of(target=target, data=data, model=noted, teacher=teacher, **options)
    taught = teacher if isinstance(teacher, nn.Module) else None
    with isolated(config.seed), explaining(lambda: "before, between or after the stages"):
        given = built(model, config)
        flags = {name: module.training for name, module in given.named_modules()}
        run = Run(config, given, example_inputs=example_inputs, teacher=taught, callbacks=callbacks)
        with run.stops:
            groups = run.comb()
            base = run.base()
            student, plan = run.prune(base, groups)
            small, proof = run.cut(student, plan)
            small = run.recover(small, plan, proof)
        for name, module in small.named_modules():
            module.training = flags.get(name, flags[""])
        networks = {"before": base, "after": small}
        found = report(run, networks, groups, plan, proof)
        described = None
        if plan.options.get("uniform"):
            described, said = _described(base, small, replace(plan, groups=groups), config)
            found = replace(found, notes=(*found.notes, said))
        result = Result(small, plan, found, described)
        if run.journal.folder is not None and run.main:
            result.save(run.journal.folder, overwrite=True)
    return result


def _described(
    base: nn.Module, small: nn.Module, plan: Plan, config: CompressConfig
) -> tuple[models.Config | None, str]:
    """The configuration that builds a network, and what to say of it; none fails a run."""
    try:
        found = models.smaller(base, small, plan, config.model_args)
    except Exception as error:  # noqa: BLE001 - of the network's library, or of a factory of one's own
        return None, f"whether a configuration builds it could not be tried: {error}"
    return found, models.sentence(found)


def _signature() -> inspect.Signature:
    """The signature of ``compress`` with every option written out."""
    kept = [p for p in inspect.signature(compress).parameters.values() if p.name != "options"]
    known = {p.name for p in kept}
    kind = inspect.Parameter.KEYWORD_ONLY
    for item in fields(CompressConfig):
        if item.name in known:
            continue
        made = item.default_factory() if item.default_factory is not MISSING else item.default
        kept.append(inspect.Parameter(item.name, kind, default=made, annotation=item.type))
    return inspect.Signature(kept, return_annotation=Result)


compress.__signature__ = _signature()  # type: ignore[attr-defined]
