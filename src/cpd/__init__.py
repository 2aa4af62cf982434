"""CPD: Comb, Prune, Distill. Make a trained PyTorch network smaller and faster, and prove it.

    import cpd

    small, plan = cpd.prune(model, example_inputs, importance="magnitude", target="macs=0.5")
    cpd.save(small, plan, "out/")
    small = cpd.load("out/", model)

`comb`, `choose`, `cut` and `verify` are the steps of `prune`; `compress` is the whole way, with a
teacher.
"""

from __future__ import annotations

from . import costs, importance
from .choose import choose
from .comb import comb
from .compress import Result, compress
from .cut import cut
from .distill import distill
from .errors import (
    ArtefactError,
    CPDError,
    DataError,
    ExportError,
    InputError,
    Interrupted,
    MissingGradient,
    NonFiniteLoss,
    OutOfMemory,
    OutputError,
    PlanMismatch,
    TraceError,
    UnknownName,
    UnreachableTarget,
    VerifyError,
)
from .explain import explain
from .exporters import load, save
from .groups import CouplingGroup, Groups
from .mask import mask
from .plan import Plan
from .prune import prune
from .pruner import Event, Pruner
from .repair import repair
from .report import Report
from .steps import steps
from .verify import Proof, verify

__version__ = "0.1.0"

__all__ = [
    "ArtefactError",
    "CPDError",
    "CouplingGroup",
    "DataError",
    "Event",
    "ExportError",
    "Groups",
    "InputError",
    "Interrupted",
    "MissingGradient",
    "NonFiniteLoss",
    "OutOfMemory",
    "OutputError",
    "Plan",
    "PlanMismatch",
    "Proof",
    "Pruner",
    "Report",
    "Result",
    "TraceError",
    "UnknownName",
    "UnreachableTarget",
    "VerifyError",
    "choose",
    "comb",
    "compress",
    "costs",
    "cut",
    "distill",
    "explain",
    "importance",
    "load",
    "mask",
    "prune",
    "repair",
    "save",
    "steps",
    "verify",
]
