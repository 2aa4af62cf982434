"""Surgery: a copy of a module in which named tensors and attributes are other ones.

The copy has the class of the original. Parameters keep their `requires_grad`, tied tensors stay
tied, and the layers of `torch.nn` get the attributes that belong to their new shapes. Nothing here
decides what to remove.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .attention import CutMultiheadAttention, without_nesting
from .forward import Forward, adopt

Attributes = Mapping[str, Mapping[str, Any]]


def share(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree that shares every parameter and buffer with the model."""
    result = _copy(model, {id(t): t for t in _tensors(model)})
    _keep_modes(model, result)
    _drop_caches(result)
    return result


def rebuild(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    attributes: Attributes,
    forwards: Mapping[str, Forward] | None = None,
    gone: Collection[str] = (),
) -> nn.Module:
    """Return a deep copy of `model` with `tensors` in place of those of the same name (any alias
    will do).

    `attributes` maps module path -> attribute -> new value, `forwards` module path -> forward. Of
    the tensors in `gone` (all their names) nothing is left.
    """
    memo: dict[int, Any] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        old = getattr(model.get_submodule(owner), leaf)
        if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        memo[id(old)] = tensor
    result = _copy(model, memo)
    _keep_modes(model, result)
    remove(result, gone, forwards or {})
    _settle(result, set(tensors), attributes, forwards or {})
    return result


def change(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    attributes: Attributes,
    forwards: Mapping[str, Forward],
    gone: Collection[str] = (),
) -> None:
    """Do in place what `rebuild` does in a copy: parameters and buffers stay the same objects.

    So whatever holds them (optimizers, ties, averages) goes on holding them. Gradients of what
    changes are dropped.
    """
    held = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in tensors.items():
        old = held[name]
        old.grad = None
        # A graph still held remembers a leaf's old shape; another type makes it forget.
        other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
        old.data = torch.empty(0, dtype=other, device=tensor.device)
        old.data = tensor
    remove(model, gone, forwards)
    _settle(model, set(tensors), attributes, forwards)


def remove(model: nn.Module, gone: Collection[str], forwards: Collection[str]) -> None:
    """Take tensors out of a model. A module that loses all of its own becomes an identity, which
    nothing calls; one that runs a forward as data, or holds one that does, stays what it is.
    """
    held = dict(model.named_modules(remove_duplicate=False)) if gone else {}
    for path in list(_emptied(held, set(gone), forwards)):
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Identity().train(held[path].training))
    left = dict(model.named_modules(remove_duplicate=False)) if gone else {}
    for name in gone:
        owner, _, leaf = name.rpartition(".")
        if owner in left and hasattr(left[owner], leaf):
            setattr(left[owner], leaf, None)


def _emptied(
    modules: Mapping[str, nn.Module], gone: set[str], forwards: Collection[str]
) -> Iterator[str]:
    """Name the outermost modules that lose all of their tensors."""
    last = "\n"
    for path, module in modules.items():
        if not path or path.startswith(f"{last}."):
            continue
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
        busy = any(f"{at}.".startswith(f"{path}.") for at in forwards)
        if names and not busy and all(f"{path}.{name}" in gone for name in names):
            yield path
            last = path


def _settle(
    model: nn.Module,
    changed: set[str],
    attributes: Attributes,
    forwards: Mapping[str, Forward],
) -> None:
    """Let modules follow their tensors' new shapes."""
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            setattr(module, name, value)
    touched = {name.rpartition(".")[0] for name in changed} | set(attributes)
    modes = [(part, part.training) for part in model.modules()]
    for part, _ in modes:
        part.training = False  # a computed weight may change its buffers when read in training
    for path, module in model.named_modules(remove_duplicate=False):
        if path in touched or isinstance(module, nn.MultiheadAttention):
            refresh(module)
    for part, training in modes:
        if isinstance(part, nn.TransformerEncoder):
            without_nesting(part)
        part.training = training
    _drop_caches(model)
    for path, forward in forwards.items():
        adopt(model.get_submodule(path), forward)


def _keep_modes(model: nn.Module, result: nn.Module) -> None:
    """Train or evaluate as the original does: a module that copies itself may forget it."""
    modes = {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
    for path, module in result.named_modules(remove_duplicate=False):
        module.training = modes.get(path, module.training)


def _drop_caches(model: nn.Module) -> None:
    """Let modules that keep what they computed for evaluation forget it, as they do in training."""
    for module in model.modules():
        if type(module).train is not nn.Module.train:
            modes = [(part, part.training) for part in module.modules()]
            module.train(True)
            for part, training in modes:
                part.training = training


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_MOST = frozenset(_PLAIN)  # a look at the type itself is quicker than one at what it is kind of


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return `copy.deepcopy(value, memo)`, several times faster for a tree of modules.

    What copies itself in a way of its own is left to `deepcopy`. `memo` is written to.
    """
    kind: Any = type(value)
    if kind in _MOST or isinstance(value, _PLAIN):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, torch.Tensor) and not value.is_leaf:
        value = value.detach()  # computed from parameters, and again in every forward
    if kind is dict or kind is OrderedDict:
        return kind([(_copy(key, memo), _copy(item, memo)) for key, item in value.items()])
    if kind is set and not value:  # of names of buffers: every module has one
        return memo.setdefault(id(value), set())
    if not isinstance(value, nn.Module) or _copies_itself(kind):
        return copy.deepcopy(value, memo)
    result: Any = object.__new__(kind)
    memo[id(value)] = result
    made = result.__dict__
    for name, item in vars(value).items():
        if name != "_compiled_call_impl":
            made[name] = item if type(item) in _MOST else _copy(item, memo)
    return result


@lru_cache(maxsize=1024)
def _copies_itself(kind: type) -> bool:
    """Say whether a class has a protocol of its own for copies."""
    names = {"__reduce_ex__", "__reduce__", "__getstate__", "__deepcopy__", "__copy__", "__slots__"}
    own = (base for base in kind.__mro__ if base not in (object, nn.Module))
    return any(names & set(vars(base)) for base in own)


def refresh(module: nn.Module) -> None:
    """Set the attributes of a `torch.nn` layer to those of its tensors' shapes."""
    for kind, update in _KNOWN:
        if isinstance(module, kind):
            update(module)
            return


def _weight(m: Any) -> torch.Tensor:
    """Return the weight, or what a hook computes it from in every forward."""
    held = [m._parameters.get(name) for name in ("weight_v", "weight_orig")]
    return next((x for x in held if x is not None and "weight" in vars(m)), m.weight)


def _linear(m: Any) -> None:
    m.out_features, m.in_features = _weight(m).shape


def _conv(m: Any) -> None:
    rows, columns = _weight(m).shape[:2]
    if m.transposed:
        m.in_channels, m.out_channels = rows, columns * m.groups
    else:
        m.out_channels, m.in_channels = rows, columns * m.groups


def _batch_norm(m: Any) -> None:
    found = next((t for t in (m.weight, m.running_mean) if t is not None), None)
    if found is not None:
        m.num_features = found.shape[0]


def _layer_norm(m: Any) -> None:
    if m.weight is not None:
        m.normalized_shape = tuple(m.weight.shape)


def _group_norm(m: Any) -> None:
    if m.weight is not None:
        m.num_channels = m.weight.shape[0]


def _embedding(m: Any) -> None:
    m.num_embeddings, m.embedding_dim = m.weight.shape


def _prelu(m: Any) -> None:
    m.num_parameters = m.weight.shape[0]


def _recurrent(m: Any) -> None:
    m.input_size, m.hidden_size = m.weight_ih_l0.shape[1], m.weight_hh_l0.shape[1]
    if m.proj_size:
        m.proj_size, m.hidden_size = m.weight_hr_l0.shape
    m._init_flat_weights()  # it holds its weights a second time


def _recurrent_cell(m: Any) -> None:
    m.input_size, m.hidden_size = m.weight_ih.shape[1], m.weight_hh.shape[1]


def _bilinear(m: Any) -> None:
    m.out_features, m.in1_features, m.in2_features = m.weight.shape


def _attention(m: Any) -> None:
    CutMultiheadAttention.adopt(m)


_KNOWN: tuple[tuple[Any, Callable[[Any], None]], ...] = (
    (nn.Linear, _linear),
    (nn.modules.conv._ConvNd, _conv),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _prelu),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
    (nn.Bilinear, _bilinear),
)
