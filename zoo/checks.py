"""What else a cut network must do: other batches, training, copies, artefacts, ONNX.

Each check returns "ok", or "as before: ..." where the network itself cannot do it either, or says
what is wrong.
"""

from __future__ import annotations

import copy
import tempfile
import traceback
from collections.abc import Callable
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


@torch.no_grad()
def other_batch(model: nn.Module, small: nn.Module, inputs: Any) -> str:
    """Three samples instead of two: the first two come out as before."""
    batch = batch_of(inputs)
    more = resized(inputs, batch + 1)
    try:
        whole, wide = call(model, inputs), call(model, more)
    except Exception as error:  # noqa: BLE001 - whatever the network raises
        return f"as before: {brief(error)}"
    got, got_wide = call(small, inputs), call(small, more)
    if [x.shape for x in got_wide] != [x.shape for x in wide]:
        return f"shapes {[tuple(x.shape) for x in got_wide]}, not {[tuple(x.shape) for x in wide]}"
    if any(x.ndim == 0 or x.shape[0] != batch for x in whole):
        return OK
    if difference([x[:batch] for x in wide], whole) > CLOSE:
        return OK  # its samples depend on each other
    gap = difference([x[:batch] for x in got_wide], got)
    return OK if gap <= CLOSE else f"differs by {gap:.1e}"


def training(model: nn.Module, small: nn.Module, inputs: Any) -> str:
    """One optimizer step; what is random or differs in training still is and does."""
    wanted = dict(_modes(small))
    if {k: v for k, v in _modes(model) if k in wanted} != wanted:
        return "training flags differ"
    try:
        before = _behaviour(copy.deepcopy(model), inputs)
    except Exception as error:  # noqa: BLE001 - whatever the network raises
        return f"as before: {brief(error)}"
    twin = copy.deepcopy(small)
    after = _behaviour(twin, inputs)
    if after != before:
        return f"behaves otherwise in training: {after}, not {before}"
    return _step(twin, inputs)


def _modes(model: nn.Module) -> list[tuple[str, bool]]:
    return [(name, module.training) for name, module in model.named_modules()]


@torch.no_grad()
def _behaviour(model: nn.Module, inputs: Any) -> dict[str, bool]:
    quiet = call(model.eval(), inputs)
    model.train()
    one, two, three = (call(model, inputs, seed) for seed in (0, 1, 0))
    return {
        "evaluation differs": difference(quiet[:1], one[:1]) > CLOSE,
        "random": difference(one, two) > CLOSE,
        "random beyond the seed": difference(one, three) > CLOSE,
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
def copies(model: nn.Module, small: nn.Module, inputs: Any) -> str:
    """A deep copy, a state dict and back: names as before, outputs equal bit for bit."""
    names = list(model.state_dict())
    if list(small.state_dict()) != names:
        return "the state dict has other names"
    if type(small) is not type(model):
        return f"is a {type(small).__name__}"
    wanted = call(small, inputs)
    twin = copy.deepcopy(small)
    if difference(call(twin, inputs), wanted) > 0:
        return "a deep copy differs"
    for tensor in twin.parameters():
        tensor.add_(1) if tensor.is_floating_point() else None
    twin.load_state_dict(small.state_dict())
    return OK if difference(call(twin, inputs), wanted) == 0 else "differs after load_state_dict"


@torch.no_grad()
def artefact(model: nn.Module, small: nn.Module, plan: cpd.Plan, inputs: Any) -> str:
    """Saved and loaded again: outputs equal bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        cpd.save(small, plan, Path(folder) / "artefact")
        again = cpd.load(Path(folder) / "artefact", model)
    gap = difference(call(again.eval(), inputs), call(small, inputs))
    return OK if gap == 0 else f"differs by {gap:.1e}"


def in_onnx(model: nn.Module, small: nn.Module, inputs: Any) -> str:
    """ONNX with an open batch where the network allows it, equal in ONNX Runtime."""
    first = _exported(small, inputs, dynamic=True)
    if first == OK:
        return OK
    second = _exported(small, inputs, dynamic=False)
    if second == OK:
        return "ok, fixed batch"
    whole = _exported(model, inputs, dynamic=False)
    return f"as before: {whole}" if whole != OK else second


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
