"""Verify: proof that the cut network computes what the masked original does."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from .comb import comb
from .cut import cut_tensor
from .errors import InputError
from .groups import Groups
from .plan import Plan
from .planning import alive_of
from .precision import widened
from .reference import Reference, first_difference
from .surgery import rebuild
from .trace import Inputs, named_tensors, quiet_state, split_inputs

LIMITS = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Proof:
    """The result of `verify`: true where the largest relative difference is within the limit.

    `mode`: "exact" (against the zeroed network itself) or "masked statistics" (against the zeroed
    graph with statistics over kept channels). `checks`: what was compared -> largest difference,
    relative to the largest reference value of that output.
    """

    max_error: float
    limit: float
    mode: str
    where: str
    checks: dict[str, float]

    def __bool__(self) -> bool:
        return self.max_error <= self.limit  # NaN is false

    def __str__(self) -> str:
        word = "verified" if self else "NOT verified"
        lines = [
            f"{word} ({self.mode}): largest relative difference {self.max_error:.2e} "
            f"(limit {self.limit:.0e})"
        ]
        lines += [f"  {name}: {value:.2e}" for name, value in self.checks.items()]
        if not self:
            lines.append(f"  first difference: {self.where}")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    dtype: torch.dtype | None = torch.float64,
) -> Proof:
    """Compare a cut network with the original in which everything removed is zero.

    Both run in evaluation mode, in `dtype` where it is given and they can (copies; nothing given in
    changes). With a plan made with `exact=True` the reference is the zeroed model itself; otherwise
    its graph with statistics over kept channels. Without `example_inputs` random ones of the traced
    shapes are made.

    Raises:
        PlanMismatch: the plan was made for another model.
        InputError: the plan holds no input shapes, and no inputs were given.
    """
    plan.check(model)
    differ = {name for name, _ in named_tensors(small)} ^ (set(plan.shapes) - plan.gone)
    if differ:
        text = f"the cut network has other tensors than the plan: {min(differ)!r} is in one only"
        return Proof(float("nan"), _limit(got_dtype=dtype), "run", text, {})
    args, kwargs = inputs_like(plan) if example_inputs is None else split_inputs(example_inputs)
    big = _as_type(model, dtype)
    cut_net = _as_type(small, dtype, _exactly_rescaled(small, big, plan))
    args, kwargs = _inputs_as(args, dtype), _inputs_as(kwargs, dtype)
    try:
        got = _run(cut_net, args, kwargs)
    except Exception as error:  # noqa: BLE001 - a forward that fails is the finding
        if dtype is not None and not _bears(big, args, kwargs):
            return verify(model, small, plan, example_inputs, dtype=None)
        text = f"the cut network does not run: {type(error).__name__}: {error}"
        return Proof(float("nan"), _limit(got_dtype=dtype), "run", text, {})
    groups = _groups_for(big, plan, args, kwargs)
    zeroed = _zeroed(big, plan)
    exact = bool(plan.options.get("exact"))
    reference = _reference(groups, plan, zeroed)
    wanted = _run(zeroed, args, kwargs) if exact else reference.outputs(args, kwargs)
    pairs = zip_longest(got, wanted, fillvalue=torch.empty(0))
    checks = {f"output {k}": _difference(a, b) for k, (a, b) in enumerate(pairs)}
    checks.update(_fused_as_well(zeroed, cut_net, got, args, kwargs))
    checks.update(_one_sample((big, zeroed), cut_net, got, args, kwargs))
    checks.update(_sizes_agree(cut_net, plan))
    checks.update(_weights_agree(small, model, plan))
    checks.update(_not_in_vain(big, cut_net, plan, args, kwargs))
    limit = _limit(got[0].dtype if got else dtype)
    worst = max((nan_last(value) for value in checks.values()), default=0.0)
    where = ""
    if not worst <= limit:
        name = max(checks, key=lambda key: nan_last(checks[key]))
        scaled = {tensor.rpartition(".")[0] for tensor in plan.rescale}
        path = first_difference(reference, cut_net, (args, kwargs), limit, scaled)
        where = f"{name}, first at module {path!r}" if path else name
    return Proof(worst, limit, "exact" if exact else "masked statistics", where, checks)


def nan_last(value: float) -> float:
    """Count what is not a number as the largest difference."""
    return float("inf") if value != value else value


def _limit(got_dtype: torch.dtype | None) -> float:
    return LIMITS.get(got_dtype or torch.float32, 2e-4)


def inputs_like(plan: Plan) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs for the model of a plan: the traced ones, or random ones of their shapes and
    types.
    """
    if plan.groups is not None:
        return plan.groups.trace.args, plan.groups.trace.kwargs
    generator = torch.Generator().manual_seed(0)
    args = tuple(_made(item, generator) for item in plan.inputs.get("args", ()))
    kwargs = {key: _made(item, generator) for key, item in plan.inputs.get("kwargs", {}).items()}
    return args, kwargs


def _made(item: Any, generator: torch.Generator) -> Any:
    if not isinstance(item, dict):
        return item
    if "shape" not in item:
        raise InputError(f"the plan's inputs hold a {item.get('type')}; give example_inputs")
    kind = getattr(torch, item["dtype"])
    if kind.is_floating_point:
        return torch.randn(item["shape"], generator=generator).to(kind)
    return torch.ones(item["shape"], dtype=kind)


def _as_type(
    model: nn.Module, dtype: torch.dtype | None, instead: dict[str, torch.Tensor] | None = None
) -> nn.Module:
    tensors = {}
    for name, tensor in named_tensors(model):
        wide = tensor.is_floating_point() and dtype is not None
        tensors[name] = tensor.detach().to(dtype) if wide else tensor.detach().clone()
    return rebuild(model, {**tensors, **(instead or {})}, {}).eval()


def _exactly_rescaled(small: nn.Module, big: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """Return rescaled weights as they are before rounding to the network's type.

    The factor that pins an attention's scale is irrational, so these weights are right to one
    rounding. Where they are, the proof goes on with the unrounded ones, so that its limit need not
    allow for it.
    """
    held, full, exact = dict(named_tensors(small)), dict(named_tensors(big)), {}
    for name in plan.rescale:
        wanted, given = cut_tensor(full[name], plan, name), held[name].detach()
        if given.shape == wanted.shape and given.is_floating_point():
            rounding = 2 * torch.finfo(given.dtype).eps * wanted.abs()
            if ((given.to(wanted.dtype) - wanted).abs() <= rounding).all():
                exact[name] = wanted
    return exact


def _inputs_as(values: Any, dtype: torch.dtype | None) -> Any:
    def one(x: Any) -> Any:
        wide = isinstance(x, torch.Tensor) and x.is_floating_point() and dtype is not None
        return x.to(dtype) if wide else x

    return torch.utils._pytree.tree_map(one, values)


def _bears(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether the original runs in this type: some operators know few."""
    try:
        _run(model, args, kwargs)
    except (RuntimeError, TypeError):  # operators say so in these ways
        return False
    return True


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, fused: bool = False
) -> list[torch.Tensor]:
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    with torch.no_grad(), quiet_state(fused=fused), widened(kind):
        out = model(*args, **kwargs)
    return [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]


def _groups_for(
    model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Groups:
    """Return the groups the plan was chosen from, or those of the same shapes combed anew."""
    found = plan.groups
    if found is not None and _shapes((args, kwargs)) == _shapes(
        (found.trace.args, found.trace.kwargs)
    ):
        return found
    keys = ("exact", "unknown", "keep_class", "depth")
    options = {key: plan.options[key] for key in keys if key in plan.options}
    return comb(model, kwargs or args, **options)


def _shapes(values: Any) -> list[Any]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [(tuple(x.shape), x.is_meta) if isinstance(x, torch.Tensor) else x for x in leaves]


def _zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    state = dict(named_tensors(model))
    tensors = {
        name: state[name].detach() * mask.to(state[name].device)
        for name, mask in plan.masks().items()
        if name == plan.aliases[name]
    }
    return rebuild(model, tensors, {}).eval()


def _reference(groups: Groups, plan: Plan, zeroed: nn.Module) -> Reference:
    of_ids = alive_of(groups, plan)[groups.units.label]
    return Reference(groups, of_ids, {name: t.detach() for name, t in named_tensors(zeroed)})


def _one_sample(
    originals: tuple[nn.Module, ...],
    small: nn.Module,
    got: list[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, float]:
    """Another batch size: the first sample alone comes out as in the batch, as the original's."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    sizes = {x.shape[0] for x in leaves if isinstance(x, torch.Tensor) and x.ndim}
    if len(sizes) != 1 or sizes == {1} or any(x.ndim == 0 or x.shape[0] not in sizes for x in got):
        return {}

    def first(x: Any) -> Any:
        return x[:1] if isinstance(x, torch.Tensor) and x.ndim else x

    one_args, one_kwargs = torch.utils._pytree.tree_map(first, (args, kwargs))
    for original in originals:
        try:
            whole, alone = _run(original, args, kwargs), _run(original, one_args, one_kwargs)
        except (RuntimeError, ValueError, AssertionError, IndexError):
            return {}  # the original takes this batch size only
        pairs = zip(alone, whole, strict=True)
        if any(_difference(a, b[:1]) > _limit(a.dtype) for a, b in pairs):
            return {}  # the original's samples depend on each other
    try:
        result = _run(small, one_args, one_kwargs)
    except Exception as error:  # noqa: BLE001 - a forward that fails is the finding
        return {f"batch of 1: {type(error).__name__}: {error}"[:200]: float("nan")}
    pairs = zip(result, got, strict=True)
    return {"batch of 1": max(_difference(a, b[:1]) for a, b in pairs)}


def _fused_as_well(
    zeroed: nn.Module,
    small: nn.Module,
    got: list[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, float]:
    """With PyTorch's fused paths for attention, where the caller has them on, nothing changes.

    Where they change the original's outputs (what is padded becomes zero) these are left out.
    """
    kinds = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
    held = any(isinstance(module, kinds) for module in small.modules())
    if not held or not torch.backends.mha.get_fastpath_enabled():
        return {}
    try:
        plain, fast = (_run(zeroed, args, kwargs, fused=fused) for fused in (False, True))
    except Exception:  # noqa: BLE001 - whatever it is, the original does so too
        return {}  # its fused path does not take this type
    name = "with fused attention"
    try:
        mine = _run(small, args, kwargs, fused=True)
    except Exception as error:  # noqa: BLE001 - a forward that fails is the finding
        return {f"{name}: {type(error).__name__}: {error}"[:200]: float("nan")}
    if _shapes(got) != _shapes(plain):
        return {}  # found already
    if _shapes(mine) != _shapes(got):
        return {name: float("inf")}
    places = [_alike(a, b) for a, b in zip(plain, fast, strict=True)]
    pairs = zip(mine, got, places, strict=True)
    return {name: max((_difference(a[at], b[at]) for a, b, at in pairs), default=0.0)}


def _alike(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mark the vectors of the last axis that are the same in both: all, where nothing differs."""
    if _difference(a, b) <= _limit(a.dtype):
        return torch.tensor(True)
    if not a.is_floating_point() or a.ndim == 0:
        return torch.tensor(False)
    return ((a - b).abs() <= _limit(a.dtype) * a.abs().max()).all(-1)


def _weights_agree(small: nn.Module, model: nn.Module, plan: Plan) -> dict[str, float]:
    """Every tensor is what the plan keeps of the original's, to a rounding where rescaled."""
    held, full = dict(named_tensors(small)), dict(named_tensors(model))
    worst = {"weights": 0.0}
    for name in (x for x in dict.fromkeys(plan.aliases.values()) if x not in plan.gone):
        wanted, given = cut_tensor(full[name], plan, name), held[name].detach()
        slack = 0.0
        if name in plan.rescale:
            slack = 2 * torch.finfo(given.dtype).eps
        same = given.shape == wanted.shape and torch.equal(given, wanted)
        difference = 0.0 if same else _difference(given, wanted)
        if not difference <= max(slack, next(iter(worst.values()))):
            worst = {f"weights of {name}": difference}
    return worst


def _not_in_vain(
    big: nn.Module, small: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, float]:
    """Prove once more with all-zero weights made random: behind them everything is equal."""
    generator = torch.Generator().manual_seed(0)
    live = {}
    for name, parameter in big.named_parameters():
        if not name.endswith("bias") and parameter.numel() > 1 and not parameter.detach().any():
            made = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
            live[name] = (made / max(parameter[0].numel(), 1) ** 0.5).to(parameter)
    if not live:
        return {}
    whole = rebuild(big, live, {}).eval()
    part = {name: cut_tensor(live[name], plan, name) for name in live if name not in plan.gone}
    groups = _groups_for(whole, plan, args, kwargs)
    got = _run(rebuild(small, part, {}).eval(), args, kwargs)
    zeroed = _zeroed(whole, plan)
    wanted = _reference(groups, plan, zeroed).outputs(args, kwargs)
    pairs = zip(got, wanted, strict=True)
    return {f"with {len(live)} zero weights made random": max(_difference(a, b) for a, b in pairs)}


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    if not got.is_floating_point():
        return float((got != wanted).any())
    if not wanted.numel():
        return 0.0
    scale = wanted.abs().max().clamp_min(1e-30)
    return float(((got - wanted).abs().max() / scale).double())


def _sizes_agree(small: nn.Module, plan: Plan) -> dict[str, float]:
    """Parameters after cutting are as many as predicted."""
    counted = sum(p.numel() for p in small.parameters())
    predicted = plan.costs.get("params", (0, counted))[1]
    return (
        {}
        if counted == predicted
        else {f"{counted} parameters, {predicted} predicted": float("inf")}
    )
