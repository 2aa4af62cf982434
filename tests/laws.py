"""What the tests of the core share: random weights, random plans, cutting is zeroing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

import cpd
from cpd.groups import Groups
from cpd.labels import axis_size
from cpd.plan import Plan
from cpd.planning import alive_of

TIGHT = 1e-9


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode, every tensor random: no zero scale hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.6
                )
        for name, tensor in model.named_buffers():
            if name.endswith("running_var"):
                tensor.abs_().add_(0.3)
    return model


def wide(value: Any) -> Any:
    """Floating point inputs in float64."""
    return torch.utils._pytree.tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, value
    )


def random_scores(groups: Groups, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=generator, dtype=torch.float64) for g in groups}


def random_plans(groups: Groups, count: int = 4, seed: int = 0, **options: Any) -> Iterator[Plan]:
    """Admissible plans: random scores, all rankings and strategies, few units gone to all."""
    rankings, strategies = ("global", "uniform", "isomorphic"), ("oneshot", "greedy")
    for k in range(count):
        share = (0.75, 0.01, 0.5, 0.3)[k % 4]
        yield cpd.choose(
            groups, random_scores(groups, seed + k), {"params": share}, ranking=rankings[k % 3],
            strategy=strategies[k % 2], min_keep=0.0, unreachable="closest", **options,
        )  # fmt: skip


def flat(out: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]


def run(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    if isinstance(inputs, tuple):
        args = inputs
    with torch.no_grad():
        return flat(model(*args, **kwargs))


def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """A full-size copy in which all that the plan removes is zero, by no code of the library."""
    twin = copy.deepcopy(model)
    tensors = {
        **dict(twin.named_buffers(remove_duplicate=False)),
        **dict(twin.named_parameters(remove_duplicate=False)),
    }
    with torch.no_grad():
        for name, mask in plan.masks().items():
            tensors[name].mul_(mask)
    return twin


def difference(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest wanted value; inf where shapes differ."""
    got, wanted = [x.detach() for x in got], [x.detach() for x in wanted]
    assert len(got) == len(wanted)
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel():
            scale = b.abs().max().clamp_min(1e-30) if b.is_floating_point() else 1
            worst = max(worst, float((a - b).abs().max() / scale))
    return worst


def removed(plan: Plan) -> int:
    """How many entries a plan removes."""
    return sum(int((~mask).sum()) for mask in plan.masks().values())


def prove(
    model: nn.Module,
    inputs: Any,
    *,
    exact: bool,
    count: int = 4,
    seed: int = 0,
    comb_options: dict[str, Any] | None = None,
    each: Callable[[Plan, nn.Module], None] | None = None,
) -> tuple[Groups, int]:
    """Prove cut == zeroed (exact), or cut == the masked reference, on random plans of a model.

    Returns the groups and how many entries all plans removed together.
    """
    groups = cpd.comb(model, inputs, exact=exact, **(comb_options or {}))
    total = 0
    for plan in random_plans(groups, count, seed):
        total += removed(plan)
        small = cpd.cut(model, plan, verify=False)
        if exact:
            worst = difference(run(small, inputs), run(zeroed(model, plan), inputs))
            assert worst <= TIGHT, f"cut differs from zeroed by {worst:.1e}\n{groups}\n{plan}"
        proof = cpd.verify(model, small, plan, inputs)
        assert proof, f"{proof}\n{groups}\n{plan}"
        assert proof.max_error <= TIGHT
        if each is not None:
            each(plan, small)
    return groups, total


class CutGraph(fx.Interpreter):
    """The traced graph on cut tensors, every literal size that a rule recorded in its new size.

    This is what the rules promise, whatever the Python code of the network can follow.
    """

    def __init__(self, groups: Groups, plan: Plan, small: nn.Module) -> None:
        super().__init__(nn.Module(), graph=groups.trace.graph)
        self.of_ids = alive_of(groups, plan)[groups.units.label]
        self.trace = groups.trace
        self.steps = {step.node: step for step in groups.steps}
        self.held = {
            **dict(small.named_buffers(remove_duplicate=False)),
            **dict(small.named_parameters(remove_duplicate=False)),
        }

    def outputs(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        left, values = iter(inputs), []
        for node in self.trace.graph.nodes:
            if node.op != "placeholder":
                break
            if node.name in self.trace.tensors:
                values.append(self.held[self.trace.tensors[node.name]].detach())
            elif node.name in self.trace.constants:
                values.append(self.trace.constants[node.name])
            else:
                values.append(next(left))
        with torch.no_grad():
            return flat(self.run(*values, enable_io_processing=False))

    def run_node(self, n: fx.Node) -> Any:
        step = self.steps.get(n)
        if step is None or not step.sizes:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        names = [argument.name for argument in n.target._schema.arguments]
        changed = {**dict(zip(names, args, strict=False)), **kwargs}
        for size in step.sizes:
            new = axis_size(size.labels, size.axis, self.of_ids)
            if size.index is None:
                changed[size.arg] = new
            else:
                entries = list(changed[size.arg])
                entries[size.index] = new
                changed[size.arg] = entries
        plain = [changed.pop(name) for name in names[: len(args)]]
        return n.target(*plain, **changed)
