"""How a network lies on several processes: whole on each (DDP), or in shards (FSDP2)."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cpd.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Sharded", "Spread", "leave", "not_finite", "snapshot", "spread"]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's parameters and buffers, on the CPU."""
    return {n: t.detach().to("cpu", copy=True) for n, t in model.state_dict().items()}


def not_finite(tensors: Mapping[str, Any]) -> Iterator[str]:
    """Names of tensors that hold a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue  # a module's extra state
        empty = tensor.is_meta or nn.parameter.is_lazy(tensor)
        if empty or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        wide = tensor.float() if tensor.itemsize == 1 else tensor  # float8 cannot be asked
        if not bool(wide.isfinite().all()):
            yield name


class Spread:
    """A network whole on every process; gradients are averaged by ``DistributedDataParallel``."""

    def __init__(self, accelerator: Accelerator, student: nn.Module) -> None:
        """``student`` is moved to the device and wrapped."""
        self.accelerator, self.student = accelerator, student
        self.model: nn.Module = accelerator.prepare_model(student)

    def waiting(self, synced: bool) -> AbstractContextManager[Any]:
        """Gradients of a backward pass inside are averaged, or wait for those of later parts."""
        return nullcontext() if synced else self.accelerator.no_sync(self.model)

    def before_step(self) -> None:
        """What has to be the same on all processes before a forward pass."""

    def whole(self) -> nn.Module:
        """The network with all its present values, on every process."""
        return self.student

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over whole weights."""
        self.student.load_state_dict(weights)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of an optimizer, its tensors whole."""
        return optimizer.state_dict()

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Take over what ``optimizer_state`` gave."""
        optimizer.load_state_dict(dict(state))


class Sharded(Spread):
    """A network in shards: each process has a part of every parameter, gradient and moment.

    The network is one unit: its parameters come together for a step. ``whole`` fills a copy of the
    network from all processes; all of them have to call it together.
    """

    def __init__(self, accelerator: Accelerator, student: nn.Module) -> None:
        """``student`` is sharded in place.

        Raises:
            InputError: the network has parameters that cannot be sharded.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.accelerator, self.student = accelerator, student.to(accelerator.device)
        self.copy = copy.deepcopy(student)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        try:
            made: Any = fully_shard(student, mesh=mesh)
        except ValueError as error:
            raise InputError(
                f"{type(self.copy).__name__} cannot be sharded: {error}. Use parallel: ddp"
            ) from error
        self.model = made

    def waiting(self, synced: bool) -> AbstractContextManager[Any]:
        """See ``Spread``."""
        model: Any = self.model
        model.set_requires_gradient_sync(synced)
        return nullcontext()

    def before_step(self) -> None:
        """Buffers are those of the main process, as data parallel has it."""
        for buffer in self.student.buffers():
            torch.distributed.broadcast(buffer, 0)

    def whole(self) -> nn.Module:
        """See ``Spread``."""
        self.before_step()
        held = self.student.state_dict()
        self.copy.load_state_dict({name: _full(tensor) for name, tensor in held.items()})
        for mine, its in zip(self.copy.modules(), self.student.modules(), strict=True):
            mine.training = its.training
        return self.copy

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """See ``Spread``."""
        held = self.student.state_dict()
        with torch.no_grad():
            for name, tensor in held.items():
                tensor.copy_(_like(weights[name], tensor))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See ``Spread``."""
        found = optimizer.state_dict()
        states = found["state"].items()
        return {**found, "state": {k: {n: _full(v) for n, v in s.items()} for k, s in states}}

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """See ``Spread``."""
        held = [p for group in optimizer.param_groups for p in group["params"]]
        states = {
            number: {name: _like(value, held[number]) for name, value in each.items()}
            for number, each in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": states})


def _full(value: Any) -> Any:
    """A tensor whole, gathered where it lies in shards."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(value: Any, other: torch.Tensor) -> Any:
    """This process's shard of a whole tensor, where the other one of its shape lies in shards."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    alike = isinstance(value, torch.Tensor) and value.shape == other.shape and value.ndim > 0
    if not alike or not isinstance(other, DTensor):
        return value
    where: Any = other
    return distribute_tensor(value.to(other.device), where.device_mesh, where.placements)


def spread(accelerator: Accelerator, student: nn.Module, kind: str) -> Spread:
    """A network on the processes there are; ``kind``: "ddp" or "fsdp"."""
    alone = accelerator.num_processes == 1
    return Spread(accelerator, student) if alone or kind == "ddp" else Sharded(accelerator, student)


def leave() -> None:
    """End the group of processes, and the threads that it has in this one: before a program ends.

    A network that was wrapped lies in a cycle of references and holds the group. Its threads then
    outlive the interpreter, and one that lets go of a gradient late aborts the process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
        time.sleep(0.05)  # where PyTorch's caches of shards hold it still: time to let go
