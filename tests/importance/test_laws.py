"""What every importance of the shelf promises, on channels of every kind."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cpd
from cpd.errors import InputError, MissingGradient, UnknownName
from cpd.importance import collect, resolve, score
from cpd.importance._members import covered
from cpd.importance.hutchinson import Hutchinson
from importance.networks import NETWORKS, collected, combed, images, loss, network
from importance.specs import VARIANTS

WEIGHTS = ("bn_scale", "fpgm", "lamp", "magnitude", "random")  # nothing flows


def called(spec: Any) -> str:
    return spec if isinstance(spec, str) else next(iter(spec))


def sensible(spec: Any) -> str:
    return str(spec).replace("'", "").replace(" ", "")


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("spec", VARIANTS, ids=sensible)
def test_every_channel_of_every_kind_gets_a_number_of_its_own(spec: Any, kind: str) -> None:
    model = network(kind)
    groups = combed(kind)
    found = collected(spec, model, groups, [images(4), images(3)])
    assert set(found) == {group.name for group in groups}
    for group in groups:
        scores = found[group.name]
        assert scores.dtype == torch.float64
        assert scores.shape == (group.size,)
        assert scores.isfinite().all()
        held = torch.stack([covered(m, group.size) for m in group.members])
        mine = scores[held.any(0)]
        if sensible(spec) != "{activation:{statistic:active}}":  # may be 1 everywhere
            assert len(mine.unique()) == len(mine), group.name
        if called(spec) != "hutchinson":
            assert (mine > 0).all() or called(spec) == "activation"


def exchanged(groups: cpd.Groups, seed: int) -> dict[str, torch.Tensor]:
    """Another order of each group's channels that leaves the network the same: order[c] is the
    channel that comes to stand at c.

    Channels change places within their cluster (a layer, one head's queries and keys, one head's
    values, one group of a convolution), and blocks (heads, groups) with all that is in them.
    """
    units, generator = groups.units, np.random.default_rng(seed)

    def inside(block: int) -> Any:
        return np.array([c for c in units.closure([block]).tolist() if c not in units.below])

    moved = np.arange(units.count)
    for cluster in (c for group in groups for family in group.families for c in family.clusters):
        new, step = generator.permutation(cluster), np.arange(units.count)
        step[new] = np.roll(new, 1)  # none stays
        for place, block in zip(new.tolist(), np.roll(new, 1).tolist(), strict=True):
            if block in units.below:
                step[inside(place)] = inside(block)
        moved = moved[step]
    return {
        group.name: torch.from_numpy(np.searchsorted(group.classes, moved[group.classes]))
        for group in groups
    }


def permuted(model: nn.Module, groups: cpd.Groups, orders: dict[str, torch.Tensor]) -> nn.Module:
    """The same network with the channels of each group in another order.

    Where a tensor holds a channel several times (gates; queries and keys), the first of one comes
    to stand where the first of the other was. Along two axes (channels within groups of a
    convolution) whole rows are another member's, and columns change places within each row.
    """
    turned = copy.deepcopy(model)
    tensors = {**dict(turned.named_parameters()), **dict(turned.named_buffers())}
    for group in groups:
        for member in group.members:
            tensor, channel = tensors[member.tensor], torch.from_numpy(member.channel)
            wanted = torch.where(channel >= 0, orders[group.name][channel], channel)
            axes = [axis for axis, length in enumerate(channel.shape) if length > 1]
            if len(axes) == 1:
                index = torch.empty(channel.numel(), dtype=torch.int64)
                new, old = (x.reshape(-1).argsort(stable=True) for x in (wanted, channel))
                index[new] = old
                value = tensor.detach().index_select(axes[0], index)
            else:
                assert axes == [0, 1]
                column = torch.zeros(group.size, dtype=torch.int64)
                column[channel] = torch.arange(channel.shape[1]).view(-1, *channel.shape[2:])
                value = tensor.detach().gather(1, column[wanted].expand_as(tensor))
            with torch.no_grad():
                tensor.copy_(value)
    return turned


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_channel_that_may_change_places_does(kind: str) -> None:
    """The network stays the same; its heads, dims, gates and groups stand elsewhere."""
    model, groups = network(kind), combed(kind)
    orders = exchanged(groups, seed=2)
    turned = permuted(model, groups, orders)
    torch.testing.assert_close(turned(images()), model(images()))
    for group in groups:
        assert (orders[group.name] != torch.arange(group.size)).sum() > group.size / 2, group.name
    same = dict(model.named_parameters())
    mine = {member.tensor for group in groups for member in group.members} & set(same)
    assert all(not torch.equal(x, same[n]) for n, x in turned.named_parameters() if n in mine)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("spec", [s for s in VARIANTS if called(s) != "random"], ids=sensible)
def test_scores_follow_their_channels(
    spec: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels in another order have the same scores in that order; probes are turned alike."""
    model, groups = network(kind), combed(kind)
    orders, signs = exchanged(groups, seed=2), network(kind, seed=5)
    found = []
    for net, drawn in ((model, signs), (permuted(model, groups, orders), None)):
        held = dict((drawn or permuted(signs, groups, orders)).named_parameters())
        probe = {name: value.detach().sign() for name, value in held.items()}
        mine = staticmethod(lambda x, _, probe=probe: [probe[n] for n in x])
        monkeypatch.setattr(Hutchinson, "signs", mine)
        found.append(collected(spec, net, groups, [images()]))
    before, after = found
    for name, order in orders.items():
        torch.testing.assert_close(after[name], before[name][order], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("spec", [s for s in VARIANTS if called(s) not in WEIGHTS], ids=sensible)
def test_a_batch_may_come_in_parts(spec: Any, kind: str) -> None:
    """Of a loss that sums over samples, the parts of a batch give the scores of the whole."""
    model = network(kind)
    groups = combed(kind)
    whole = collected(spec, model, groups, [images()])
    importance = resolve(spec)
    importance.start(model, groups)
    for first, last in ((0, 4), (4, 6)):
        importance.whole = last == 6
        value = loss(model, images(), slice(first, last))
        if isinstance(importance, Hutchinson):
            importance._taken = 0  # the same signs for each part
            importance.before_backward(value)
        value.backward()
        importance.observe()
    for name, scores in importance.scores().items():
        torch.testing.assert_close(scores, whole[name], rtol=1e-9, atol=1e-12)
    importance.close()


ADDED = ("fisher", "hessian", "hutchinson", "obd", "taylor", *WEIGHTS)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(
    "spec", [s for s in VARIANTS if called(s) in ADDED and called(s) != "random"], ids=sensible
)
def test_batches_add_up(spec: Any, kind: str) -> None:
    model = network(kind)
    groups = combed(kind)
    batches = [images(4), images(3, seed=5)]
    both = collected(spec, model, groups, batches)
    importance = resolve(spec)
    total: dict[str, Any] = {}
    for number, batch in enumerate(batches):
        if isinstance(importance, Hutchinson):
            importance.seed = number  # the signs of this batch among both
        for name, scores in collect(importance, model, groups, [batch], loss).items():
            total[name] = total.get(name, 0) + scores
    for name, scores in both.items():
        torch.testing.assert_close(scores, total[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", VARIANTS, ids=sensible)
def test_nothing_is_left_behind(spec: Any) -> None:
    """Parameters, gradients, buffers, modes, hooks and the random state are as before."""
    model = network("residual").train()
    model.bn1.eval()
    groups = combed("residual")
    loss(model, images()).backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    found = collected(spec, model, groups, [images(4)])
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for parameter, (same, value) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is same
        assert torch.equal(same, value)
    assert modes == [module.training for module in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.cuda.flash_sdp_enabled()
    again = collected(spec, model, groups, [images(4)])
    assert all(torch.equal(scores, again[name]) for name, scores in found.items())


@pytest.mark.parametrize("spec", VARIANTS, ids=sensible)
def test_sums_go_through_a_checkpoint(spec: Any) -> None:
    model = network("tokens")
    groups = combed("tokens")
    importances = [resolve(spec) for _ in range(2)]
    for importance in importances:
        importance.start(model, groups)

    def seen(number: int, watching: list[Any]) -> None:
        model.zero_grad()
        value = loss(model, images(seed=number))
        for importance in watching:
            if isinstance(importance, Hutchinson):
                importance._taken = number
                importance.before_backward(value)
        value.backward()
        for importance in watching:
            importance.observe()

    seen(1, importances[:1])
    importances[1].load_state(importances[0].state())
    seen(2, importances)
    first, second = (importance.scores() for importance in importances)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-12, atol=0)
    importances[0].reset()
    assert importances[0].scores() == {}
    for importance in importances:
        importance.close()


@pytest.mark.parametrize("spec", [s for s in VARIANTS if called(s) not in WEIGHTS], ids=sensible)
def test_what_is_missing_is_named(spec: Any) -> None:
    model = network("tokens")
    groups = combed("tokens")
    missing = InputError if called(spec) in ("activation", "variance", "wanda") else MissingGradient
    text = {"hutchinson": "the loss before its backward"}.get(called(spec), "of group 'patch'")
    with pytest.raises(missing, match=text):
        score(spec, model, groups)


def test_evaluations_in_between_do_not_count() -> None:
    """Only the pass that is observed does: neither one without gradients, nor one before it."""
    model = network("residual")
    groups = combed("residual")
    for spec in ("activation", "fisher", "kfac"):
        importance = resolve(spec)
        importance.start(model, groups)
        loss(model, images(seed=7)).backward()
        model.zero_grad()
        value = loss(model, images())
        value.backward()
        importance.observe()
        with torch.no_grad():
            model(images(seed=8))
        found, wanted = importance.scores(), collected(spec, model, groups, [images()])
        importance.close()
        assert all(torch.allclose(found[name], wanted[name], rtol=1e-12) for name in wanted)


def test_options_are_checked() -> None:
    for spec in (
        {"taylor": {"aggregate": "median"}},
        {"magnitude": {"members": "both"}},
        {"magnitude": {"normalise": "median"}},
        {"activation": {"statistic": "median"}},
        {"variance": {"aggregate": "median"}},
        {"hutchinson": {"kind": "lanczos"}},
        {"hessian": {"fixed": True}},
    ):
        with pytest.raises(UnknownName, match="Valid names"):
            resolve(spec)
    with pytest.raises(InputError, match="at least 1, got 0"):
        resolve({"hutchinson": {"probes": 0}})


def test_no_batch_is_met() -> None:
    model = network("residual")
    with pytest.raises(InputError, match="no batch to collect"):
        collect("fisher", model, combed("residual"), [], loss)


def test_the_loss_says_whose_gradients_count() -> None:
    """That of the task, of a teacher, or both: gradients of the sum are the sum."""
    model, teacher = network("tokens"), network("tokens", seed=4)
    groups = combed("tokens")

    def distilled(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (net(x) - teacher(x)).square().sum()

    def both(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return loss(net, x) + distilled(net, x)

    mine = {"taylor": {"multivariable": True, "aggregate": "first"}}
    found = [collect(mine, model, groups, [images()], f) for f in (loss, distilled, both)]
    for group in groups:
        task, taught, total = (scores[group.name] for scores in found)
        apart = torch.stack([task + taught, (task - taught).abs()])
        assert (apart - total).abs().amin(0).max() < 1e-9 * total.max()
        assert not torch.allclose(task, total)
