"""What else a cut network must do: other batches, training, copies, artefacts, ONNX.

Each check returns "ok", or "as before: ..." where the network itself cannot do it either, or says
what is wrong.
"""

from __future__ import annotations

import copy
import tempfile
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cpd
from cpd.exporters import onnx

from .tensors import batch_of, call, difference, resized

OK = "ok"
CLOSE = 1e-4  # float32, another batch: other kernels


def brief(error: BaseException, limit: int = 400) -> str:
    """Return an exception on one line, with the last lines of code it came through."""
    here = Path(__file__).parent
    found = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in found if Path(frame.filename).parent != here]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:]]
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:limit]
    return f"{text} ({' > '.join(places)})" if places else text


class Whole:
    """The network as it was, and what it does, found once for all modes."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs

    @cached_property
    @torch.no_grad()
    def batches(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs of the inputs, and with one sample more."""
        more = resized(self.inputs, batch_of(self.inputs) + 1)
        return call(self.model, self.inputs), call(self.model, more)

    @cached_property
    def behaviour(self) -> dict[str, bool]:
        """What is otherwise in training."""
        return _behaviour(copy.deepcopy(self.model), self.inputs)

    @cached_property
    def macs(self) -> int:
        """What PyTorch's own counter sees."""
        return counted_macs(self.model, self.inputs)


@torch.no_grad()
def other_batch(whole: Whole, small: nn.Module) -> str:
    """Three samples instead of two: the first two come out as before."""
    batch = batch_of(whole.inputs)
    try:
        same, wide = whole.batches
    except Exception as error:  # noqa: BLE001 - whatever the network raises
        return f"as before: {brief(error)}"
    got = call(small, whole.inputs)
    got_wide = call(small, resized(whole.inputs, batch + 1))
    if [x.shape for x in got_wide] != [x.shape for x in wide]:
        return f"shapes {[tuple(x.shape) for x in got_wide]}, not {[tuple(x.shape) for x in wide]}"
    if any(x.ndim == 0 or x.shape[0] != batch for x in same):
        return OK
    if difference([x[:batch] for x in wide], same) > CLOSE:
        return OK  # its samples depend on each other
    gap = difference([x[:batch] for x in got_wide], got)
    return OK if gap <= CLOSE else f"differs by {gap:.1e}"


def training(whole: Whole, small: nn.Module) -> str:
    """One optimizer step; what is random or differs in training still is and does."""
    wanted = dict(_modes(small))
    if {k: v for k, v in _modes(whole.model) if k in wanted} != wanted:
        return "training flags differ"
    try:
        before = whole.behaviour
    except Exception as error:  # noqa: BLE001 - whatever the network raises
        return f"as before: {brief(error)}"
    twin = copy.deepcopy(small)
    after = _behaviour(twin, whole.inputs)
    # statistics of a batch that are those of the norm before differ once channels are gone
    lost = any(before[key] and not after[key] for key in before)
    if lost or after["random"] != before["random"]:
        return f"behaves otherwise in training: {after}, not {before}"
    return _step(twin, whole.inputs)


def _modes(model: nn.Module) -> list[tuple[str, bool]]:
    return [(name, module.training) for name, module in model.named_modules()]


@torch.no_grad()
def _behaviour(model: nn.Module, inputs: Any) -> dict[str, bool]:
    quiet = call(model.eval(), inputs)
    model.train()
    one, two = (call(model, inputs, seed) for seed in (0, 1))
    return {
        "evaluation differs": difference(quiet[:1], one[:1]) > CLOSE,
        "random": difference(one, two) > CLOSE,
    }


def _step(model: nn.Module, inputs: Any) -> str:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    outputs = [x for x in call(model, inputs) if x.requires_grad and x.numel()]
    loss = sum((x.square().mean() for x in outputs), torch.zeros(()))
    if not loss.requires_grad:
        return "no output has a gradient"
    loss.backward()
    live = [p.grad for p in model.parameters() if p.grad is not None]
    if not live or not any(bool(g.abs().max() > 0) for g in live if g.numel()):
        return "no parameter has a gradient"
    if not torch.isfinite(loss):
        return "the loss is not finite"
    optimizer.step()
    model.eval()
    call(model, inputs)
    return OK


@torch.no_grad()
def copies(whole: Whole, small: nn.Module) -> str:
    """A deep copy, a state dict and back: names as before, outputs equal bit for bit."""
    model, inputs = whole.model, whole.inputs
    names = list(model.state_dict())
    if list(small.state_dict()) != names:
        return "the state dict has other names"
    if not isinstance(small, type(model)):
        return f"is a {type(small).__name__}"  # a subclass is one whose own forward was replaced
    wanted = call(small, inputs)
    twin = copy.deepcopy(small)
    if difference(call(twin, inputs), wanted) > 0:
        return "a deep copy differs"
    for tensor in twin.parameters():
        tensor.add_(1) if tensor.is_floating_point() else None
    twin.load_state_dict(small.state_dict())
    return OK if difference(call(twin, inputs), wanted) == 0 else "differs after load_state_dict"


@torch.no_grad()
def artefact(whole: Whole, small: nn.Module, plan: cpd.Plan) -> str:
    """Saved and loaded again: outputs equal bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        cpd.save(small, plan, Path(folder) / "artefact")
        again = cpd.load(Path(folder) / "artefact", whole.model)
    gap = difference(call(again.eval(), whole.inputs), call(small, whole.inputs))
    return OK if gap == 0 else f"differs by {gap:.1e}"


def in_onnx(whole: Whole, small: nn.Module) -> str:
    """ONNX with an open batch where the network allows it, equal in ONNX Runtime."""
    inputs = whole.inputs
    first = _exported(small, inputs, dynamic=True)
    if first == OK:
        return OK
    second = _exported(small, inputs, dynamic=False)
    if second == OK:
        return "ok, fixed batch"
    before = _exported(whole.model, inputs, dynamic=False)
    return f"as before: {before}" if before != OK else second


def _exported(model: nn.Module, inputs: Any, *, dynamic: bool) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            onnx(model, inputs, Path(folder) / "model.onnx", dynamic_batch=dynamic)
        except Exception as error:  # noqa: BLE001 - the exporter's own exceptions too
            return brief(error)
    return OK


@torch.no_grad()
def counted_macs(model: nn.Module, inputs: Any) -> int:
    """Return what PyTorch's own counter sees, attention as two matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = copy.deepcopy(model).requires_grad_(False)  # the counter asks leaves for gradients
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
            call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(seen.get_total_flops() // 2)


def guarded(check: Callable[[], str]) -> str:
    """Run a check; an exception is its finding."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - an exception is a finding, and is reported
        return brief(error)
