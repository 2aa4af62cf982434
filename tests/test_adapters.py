"""The same plan in every training loop, from the same seed and order of data."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from torch import nn

import cpd
from cpd import errors
from cpd.losses import resolve
from examples import common, plain

pytest.importorskip("accelerate")
pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("lightning")

LOOPS = {
    "with_accelerate": {},
    "with_timm": {"timm_recipe": False},
    "with_transformers": {},
    "with_lightning": {},
}


@pytest.fixture(scope="module")
def wanted():
    return plain.main()


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries about themselves
        yield


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_makes_the_plan_of_a_plain_one(name, wanted, quiet):
    small, plan = importlib.import_module(f"examples.{name}").main(**LOOPS[name])
    assert plan.to_json() == wanted[1].to_json()
    for one, two in zip(small.parameters(), wanted[0].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_the_examples_train(wanted, quiet):
    from examples import with_timm

    assert common.accuracy(wanted[0]) > 0.6  # a short run; processors round in ways of their own
    assert common.accuracy(with_timm.main()[0]) > 0.5  # the average of a short run


def trainer(model, pruner, folder, kind=None, **more):
    from transformers import Trainer

    from cpd.adapters.transformers import PruneCallback
    from examples.with_transformers import arguments

    callback = PruneCallback(pruner)
    settings = more.pop("settings", {})
    made = (kind or Trainer)(
        model=model,
        args=arguments(str(folder), max_steps=36, **settings),
        train_dataset=common.Ordered(),
        optimizers=(common.optimizer_of(model), None),
        callbacks=[callback],
        **more,
    )
    return made, callback


SHORT = {**common.PRUNING, "interval": 8}


@pytest.mark.parametrize("cut_every", [0, 1])
def test_a_trainer_goes_on_from_its_checkpoint(cut_every, tmp_path, quiet):
    found = []
    settings = {"save_strategy": "steps", "save_steps": 12, "max_grad_norm": 1.0}
    for folder in (None, tmp_path / "checkpoint-12"):
        model = common.network()
        pruner = cpd.Pruner(model, common.EXAMPLE, **SHORT, cut_every=cut_every)
        made, callback = trainer(model, pruner, tmp_path, settings=settings)
        if folder is not None:
            callback.resume(folder)
            assert pruner.steps == 12
        made.train(resume_from_checkpoint=None if folder is None else str(folder))
        found.append((pruner.plan.to_json(), pruner.finish().state_dict()))
    assert found[0][0] == found[1][0]
    for name, tensor in found[0][1].items():
        assert torch.equal(tensor, found[1][1][name]), name
    with pytest.raises(errors.ArtefactError, match="cannot read"):
        callback.resume(tmp_path)


def test_accumulated_batches_of_a_trainer(tmp_path, quiet):
    plans = []
    for parts in (1, 2):
        model = common.network()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train = lambda mode=True, module=module: module
                module.training = False  # statistics of a part are not those of the batch
        pruner = cpd.Pruner(model, common.EXAMPLE, **{**SHORT, "importance": "taylor"})
        settings = {
            "per_device_train_batch_size": common.BATCH // parts,
            "gradient_accumulation_steps": parts,
        }
        made, _ = trainer(model, pruner, tmp_path, settings=settings)
        made.train()
        assert pruner.steps == 36
        plans.append({w.group: w.after for w in pruner.plan.widths})
    assert plans[0] == plans[1]


def test_a_trainer_distills(tmp_path, quiet):
    from cpd.adapters.transformers import DistillTrainer

    teacher = common.network()
    losses = {"kd": {"weight": 2.0}, "inside": {"loss": "at", "at": "inside"}}
    model = common.network()
    pruner = cpd.Pruner(model, common.EXAMPLE, **SHORT)
    made, _ = trainer(
        model, pruner, tmp_path, DistillTrainer, teacher=teacher, losses=losses, task_weight=0.5
    )
    batch = next(iter(common.loader()))
    with torch.no_grad():
        loss = made.compute_loss(model.train(), dict(batch))
        outputs, taught = model(**batch), teacher(**batch)
        kd = sum(resolve("kd")(outputs["logits"], taught["logits"]).values())
        plain_loss = made.compute_loss(model.eval(), dict(batch))
    assert float(loss) > 0.5 * float(outputs["loss"]) + 2 * float(kd) - 1e-6
    assert float(plain_loss) == pytest.approx(float(model(**batch)["loss"]), rel=1e-5)
    made.train()
    assert pruner.finished
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    learns = {"losses": "mgd", "teacher": teacher}
    with pytest.raises(errors.InputError, match=r"learn or remember \(mgd\)"):
        trainer(model, pruner, tmp_path, DistillTrainer, **learns)


def test_a_trainer_that_smooths_labels_shows_them_to_losses(tmp_path, quiet):
    from transformers import ViTConfig, ViTForImageClassification

    from cpd.adapters.transformers import DistillTrainer
    from examples.with_transformers import arguments

    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 16, "patch_size": 8}
    config = ViTConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, num_channels=1, num_labels=10
    )
    model, teacher = ViTForImageClassification(config), ViTForImageClassification(config)
    made = DistillTrainer(
        model=model,
        teacher=teacher,
        losses="dkd",
        args=arguments(tmp_path, max_steps=2, label_smoothing_factor=0.1),
        train_dataset=common.Ordered(),
        optimizers=(common.optimizer_of(model), None),
    )
    made.train()
    assert made.state.global_step == 2
    assert made.state.log_history[-1]["train_loss"] > 0


def test_a_network_of_transformers_is_pruned_and_distilled(tmp_path, quiet):
    from transformers import ViTConfig, ViTForImageClassification

    from cpd.adapters.transformers import DistillTrainer

    sizes = {"hidden_size": 32, "intermediate_size": 64, "image_size": 16, "patch_size": 4}
    config = ViTConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, num_channels=1, num_labels=10
    )
    torch.manual_seed(0)
    teacher = ViTForImageClassification(config)
    model = ViTForImageClassification(config)
    model.load_state_dict(teacher.state_dict())
    pruner = cpd.Pruner(model, common.EXAMPLE, **{**SHORT, "target": "macs=0.6"}, cut_every=2)
    made, _ = trainer(model, pruner, tmp_path, DistillTrainer, teacher=teacher)
    made.train()
    small = pruner.finish()
    assert small is model
    assert sum(w.after < w.before for w in pruner.plan.widths) > 1
    assert cpd.costs.params(small) < 0.8 * cpd.costs.params(teacher)


# --- Lightning


def lit(pruner, folder, *, parts=1, callbacks=(), **more):
    from lightning.pytorch import Trainer

    from cpd.adapters.lightning import PruneCallback

    return Trainer(
        max_steps=36,
        accelerator="cpu",
        accumulate_grad_batches=parts,
        callbacks=[PruneCallback(pruner), *callbacks],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )


def test_of_several_optimizers_of_lightning_the_first_counts(tmp_path, quiet):
    from lightning.pytorch import LightningModule

    class Two(LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.other = common.network(), nn.Linear(3, 1)
            self.automatic_optimization = False

        def training_step(self, batch, _):
            losses = self.net(**batch)["loss"], self.other(torch.ones(2, 3)).square().mean()
            for optimizer, loss in zip(self.optimizers(), losses, strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(each.parameters(), lr=0.01) for each in (self.net, self.other)]

    module, seen = Two(), []
    pruner = cpd.Pruner(module.net, common.EXAMPLE, importance="taylor", target="macs=0.5")
    observe = pruner.observe
    pruner.observe = lambda **more: (seen.append(more), observe(**more))
    lit(pruner, tmp_path).fit(module, common.loader())
    assert len(seen) == pruner.steps == 18  # Lightning counts the steps of both


SHORT_TIMES = {"interval": 9, "events": 1}


class Placed:
    """Batches that know where they are: Lightning keeps the place of a loader that tells it."""

    def __init__(self):
        self.batches, self.at = list(common.loader()), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_trainer_of_lightning_goes_on_from_its_checkpoint(tmp_path, quiet):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from examples.with_lightning import Module

    found = []
    for folder in (None, tmp_path / "at-12.ckpt"):
        module = Module()
        pruner = cpd.Pruner(module.net, common.EXAMPLE, **SHORT)
        named = {"filename": "at-{step}", "auto_insert_metric_name": False}
        keeper = ModelCheckpoint(tmp_path, every_n_train_steps=12, save_top_k=-1, **named)
        made = lit(pruner, tmp_path, callbacks=[keeper] if folder is None else [])
        made.fit(module, Placed(), ckpt_path=None if folder is None else str(folder))
        assert pruner.steps == 36
        found.append((pruner.plan.to_json(), pruner.finish().state_dict()))
    assert found[0][0] == found[1][0]
    for name, tensor in found[0][1].items():
        assert torch.equal(tensor, found[1][1][name]), name


@pytest.mark.parametrize("importance", ["taylor", "fisher"])
def test_accumulated_batches_of_lightning(importance, tmp_path, quiet):
    from torch.utils.data import DataLoader

    from examples.with_lightning import Module

    plans = []
    for parts in (1, 2):
        module = Module()
        for each in module.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.train = lambda mode=True, each=each: each
                each.training = False  # statistics of a part are not those of the batch
        pruner = cpd.Pruner(module.net, common.EXAMPLE, **{**SHORT, "importance": importance})
        loader = DataLoader(common.Ordered(), common.BATCH // parts)
        lit(pruner, tmp_path, parts=parts).fit(module, loader)
        assert pruner.steps == 36
        plans.append({w.group: w.after for w in pruner.plan.widths})
    assert plans[0] == plans[1]


@pytest.mark.parametrize("importance", ["hessian", "fisher"])
def test_lightning_leaves_out_what_its_scaler_will(importance, quiet):
    """16-mixed: gradients are unscaled when they are shown, before an overflow is left out."""
    from types import SimpleNamespace

    from cpd.adapters.lightning import PruneCallback

    scores = []
    for scale in (None, 2.0**9):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
        x = torch.randn(4, 3, dtype=torch.float64)
        pruner = cpd.Pruner(model, x, target="macs=0.5", importance=importance, **SHORT_TIMES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = SimpleNamespace(scaler=scaler)
        trainer = SimpleNamespace(precision_plugin=plugin, optimizers=[optimizer])
        callback = PruneCallback(pruner)
        for factor in (1.0, float("inf"), 2.0):
            if scaler is None and factor == float("inf"):
                continue
            model.zero_grad()
            loss = model(x).square().mean() * factor
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)
            callback.on_before_optimizer_step(trainer, model, optimizer)
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
        scores.append(pruner.rounds.importance.scores())
    for name, wanted in scores[0].items():
        torch.testing.assert_close(scores[1][name], wanted, rtol=1e-12, atol=0)


def test_lightning_trains_on_what_is_cut(tmp_path, quiet):
    """In float64: rounding of float32 grows until a ReLU turns the other way."""
    from examples.with_lightning import Module

    found = []
    example = {name: value.double() for name, value in common.EXAMPLE.items()}
    for every in (0, 1):
        module = Module().double()
        pruner = cpd.Pruner(module.net, example, **SHORT, cut_every=every)
        lit(pruner, tmp_path, precision="64-true").fit(module, common.loader())
        found.append((pruner.plan.to_json(), pruner.finish(), module))
    assert found[0][0] == found[1][0]
    assert found[1][1] is found[1][2].net
    for one, two in zip(found[0][1].parameters(), found[1][1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
