"""A process for one network: `python -m zoo.worker JOB NAME SECONDS`.

It prints its row after every stage.

JOB is "prune" (both modes, everything but ONNX) or "onnx". The last line is the row as far as it
came, so a network that runs out of time or memory still says where.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from time import process_time
from typing import Any

import torch
from torch import nn

import cpd
from cpd import _torchvision

from . import checks
from .attentions import attentions
from .census import operators
from .network import Network
from .registry import registry
from .tensors import call, difference

JOBS = ("prune", "onnx")
MODES = {"exact": True, "kept": False}
TARGET = "macs=0.5"

Emit = Callable[[dict[str, Any]], None]


class Clock:
    """Processor seconds of each step of one mode, and the step that is under way."""

    def __init__(self, row: dict[str, Any], mode: dict[str, Any], emit: Emit) -> None:
        self.row, self.mode, self.emit = row, mode, emit

    def __call__(self, step: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one step on the clock."""
        before, self.mode["stage"] = self.mode["stage"], step
        self.emit(self.row)
        start = process_time()
        result = function(*args, **kwargs)
        spent = self.mode["seconds"].get(step, 0.0) + process_time() - start
        self.mode["seconds"][step] = round(spent, 3)
        self.mode["stage"] = before  # where it was: a step can hold another
        self.emit(self.row)
        return result


@contextlib.contextmanager
def traced(clock: Clock) -> Iterator[None]:
    """While it lasts, the clock sees the trace that `comb` makes."""
    module = importlib.import_module("cpd.comb")  # the name `cpd.comb` is the function
    trace = module.trace
    module.trace = lambda *args, **kwargs: clock("trace", trace, *args, **kwargs)
    try:
        yield
    finally:
        module.trace = trace


def prune(network: Network, emit: Emit) -> None:
    """Both modes of one network."""
    row, *built = described(network, emit)
    whole = checks.Whole(*built)
    row["modes"] = {key: {"seconds": {}, "stage": "start"} for key in MODES}
    for key, exact in MODES.items():
        mode = row["modes"][key]
        try:
            _mode(whole, exact, Clock(row, mode, emit))
        except Exception as error:  # noqa: BLE001 - an exception is a result, and is reported
            mode.update(status="error", message=checks.brief(error))
        emit(row)


def described(network: Network, emit: Emit) -> tuple[dict[str, Any], nn.Module, Any]:
    """Return the row of a network before anything is done to it, the network and its inputs."""
    row: dict[str, Any] = {
        "name": network.name, "library": network.library, "part": network.part,
        "note": network.note, "stage": "build",
    }  # fmt: skip
    emit(row)
    model, inputs = network.make()
    with torch.no_grad():
        outputs = call(model, inputs)
    alive = [x for x in outputs if x.ndim and x.shape[0] == 2 and x.is_floating_point()]
    row.update(
        kind=type(model).__name__,
        params=sum(p.numel() for p in model.parameters()),
        live=not alive or any(difference([x[:1]], [x[1:]]) > 1e-3 for x in alive),
        finite=all(bool(x.isfinite().any()) for x in outputs if x.is_floating_point()),
        stage="run",
    )
    return row, model, inputs


def _mode(whole: checks.Whole, exact: bool, clock: Clock) -> None:
    mode, seconds = clock.mode, clock.mode["seconds"]
    model, inputs = whole.model, whole.inputs
    with traced(clock):
        groups = clock("comb", cpd.comb, model, inputs, exact=exact)
    seconds["comb"] = round(seconds["comb"] - seconds["trace"], 3)
    mode.update(found(groups))
    clock.row["ops"] = sorted({*clock.row.get("ops", ()), *operators(groups.trace.graph)})
    scores = cpd.importance.score("random", model, groups)
    plan = clock("choose", cpd.choose, groups, scores, TARGET, unreachable="closest")
    small = clock("cut", cpd.cut, model, plan, verify=False)
    before, after = plan.costs["macs"]
    parameters = plan.costs["params"]
    mode.update(
        macs=round(after / max(before, 1), 4),
        params=round(parameters[1] / max(parameters[0], 1), 4),
        reached=after <= 0.5 * before,
        kinds=_kinds(plan),
    )
    proof = clock("verify", cpd.verify, model, small, plan)
    mode.update(
        error=proof.max_error, limit=proof.limit, proof=proof.mode, proved=bool(proof),
        message="" if proof else f"{proof.where}; {proof.checks}"[:400],
    )  # fmt: skip
    mode["status"] = "sound" if proof else "unsound"
    if proof.mode == "run":
        mode.update(status="error", stage="run")
        return
    _further(whole, small, plan, clock)


def _further(whole: checks.Whole, small: nn.Module, plan: cpd.Plan, clock: Clock) -> None:
    """Run the checks after the proof: one that fails makes the status."""
    mode = clock.mode
    all_checks = {
        "batch": lambda: checks.other_batch(whole, small),
        "train": lambda: checks.training(whole, small),
        "copies": lambda: checks.copies(whole, small),
        "artefact": lambda: checks.artefact(whole, small, plan),
    }
    mode["checks"], failed = {}, ""
    for key, check in all_checks.items():
        mode["checks"][key] = answer = clock(key, checks.guarded, check)
        if answer != checks.OK and not answer.startswith("as before") and mode["proved"]:
            mode.update(status="error", message=f"{key}: {answer}")
            failed = failed or key
    mode["stage"] = failed or "done"
    if not failed:
        left = clock("count", checks.counted_macs, small, whole.inputs)
        mode["counted"] = round(left / max(whole.macs, 1), 4)


def found(groups: cpd.Groups) -> dict[str, Any]:
    """Return what combing found: sizes, and what stays, by the parameters it holds."""
    shapes = groups.trace.shapes
    parameters = {name for name, _ in groups.model.named_parameters()}
    held: dict[str, dict[str, int]] = {}
    for item in groups.frozen:
        reason, shape = str(item.reason), shapes[item.tensor]
        if item.tensor in parameters and not reason.startswith("kernel axis"):
            size = 1
            for length in shape:
                size *= length
            part = size // max(shape[item.axis], 1) * item.count
            tensors = held.setdefault(reason, {})
            tensors[item.tensor] = max(tensors.get(item.tensor, 0), min(part, size))
    by_size = sorted(((sum(t.values()), r) for r, t in held.items()), reverse=True)
    return {
        "nodes": len(groups.trace.graph.nodes),
        **attentions(groups),
        "groups": len(groups),
        "frozen": [[reason[:300], size] for size, reason in by_size[:3]],
    }


def _kinds(plan: cpd.Plan) -> dict[str, list[int]]:
    """Return kind of unit -> families, units before, units after."""
    kinds: dict[str, list[int]] = {}
    for width in plan.widths:
        entry = kinds.setdefault(width.family, [0, 0, 0])
        entry[0] += 1
        entry[1] += width.before
        entry[2] += width.after
    return kinds


def export(network: Network, emit: Emit) -> None:
    """The network at half of its MACs as ONNX."""
    row, model, inputs = described(network, emit)
    mode: dict[str, Any] = {"seconds": {}, "stage": "start"}
    row["modes"] = {"kept": mode}
    clock = Clock(row, mode, emit)
    try:
        groups = clock("comb", cpd.comb, model, inputs)
        scores = cpd.importance.score("random", model, groups)
        plan = cpd.choose(groups, scores, TARGET, unreachable="closest")
        small = clock("cut", cpd.cut, model, plan, verify=False)
        answer = clock("onnx", checks.in_onnx, checks.Whole(model, inputs), small)
    except Exception as error:  # noqa: BLE001 - an exception is a result, and is reported
        mode.update(status="error", message=checks.brief(error))
    else:
        good = answer.startswith((checks.OK, "as before"))
        mode.update(status="sound" if good else "error", message=answer, stage="done")
    emit(row)


def main() -> None:
    """Run one job of one network; print its row after every stage."""
    job, name, limit = sys.argv[1:]
    if sys.platform == "linux":
        import resource  # not on every system

        known = registry().get(name)
        memory = (Network.memory if known is None else known.memory) << 30
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    answers = sys.stdout

    def emit(row: dict[str, Any]) -> None:
        answers.write(json.dumps(row) + "\n")
        answers.flush()

    torch.set_num_threads(1)
    _torchvision.ensure()
    with contextlib.redirect_stdout(sys.stderr):  # libraries may print
        try:
            {"prune": prune, "onnx": export}[job](registry()[name], emit)
        except Exception as error:  # noqa: BLE001 - an exception is a result, and is reported
            emit({"name": name, "stage": "build", "message": checks.brief(error)})
    sys.stderr.flush()
    os._exit(0)  # threads of libraries can keep a finished process alive


if __name__ == "__main__":
    main()
