"""The method for solo-learn, on the base class of an installed solo-learn, and on `Hooks` below, which needs none.

What was tried on 2026-11-24, with Python 3.11, PyTorch 2.15 and Lightning 2.6.6:

- ``pip install solo-learn`` finds no solution: PyPI has 1.0.2 of 2021 alone, which pins torch 1.9.1.
- Forced (``--no-deps`` for solo-learn 1.0.2, pytorch-lightning 1.9.5, lightning-bolts 0.7.0, einops and wandb, beside
  setuptools below 81) it imports. Its base class still takes keywords for a config, has older names for two hooks, and
  expects an argument that Lightning no longer gives. `renamed` translates these; its training_step, momentum update and
  optimizer are as they are, and `test_a_step_in_solo_learn` passed.
- 1.0.6, for which the example is written, is on GitHub only, out of reach of that machine. The test passed on a base
  class copied by hand from its solo/methods/base.py (commit c980e9e3f553; without schedulers, validation and backbones
  other than ResNet-18), under Lightning 2.6.6. It has not run on an unmodified 1.0.6.
"""

import copy
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from msf_core import reference

omegaconf = pytest.importorskip("omegaconf", reason="solo-learn's configs are omegaconf's, which is not installed")
OmegaConf = omegaconf.OmegaConf

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "integrations" / "solo_learn_msf.py"
BATCH, CLASSES, DIM = 8, 5, 16
OVERRIDDEN = ("forward", "momentum_forward", "training_step", "add_and_assert_specific_cfg")


class Hooks(nn.Module):
    """A few lines that call a method as solo-learn does. This is not solo-learn.

    Names, signatures and order of the hooks are those of BaseMethod and BaseMomentumMethod in solo/methods/base.py of
    github.com/vturrisi/solo-learn (1.0.6, commit c980e9e3f553). Backbone, optimizer and logging are not.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg = self.add_and_assert_specific_cfg(cfg)
        self.features_dim = 12
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, self.features_dim), nn.ReLU())
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.classifier = nn.Linear(self.features_dim, cfg.data.num_classes)
        self.tau = cfg.momentum.base_tau
        self.trainer = SimpleNamespace(global_step=0)
        self.last_step = 0
        self.logged = {}

    @staticmethod
    def add_and_assert_specific_cfg(cfg):
        cfg.momentum.base_tau = OmegaConf.select(cfg, "momentum.base_tau", default=0.99)
        cfg.momentum.final_tau = OmegaConf.select(cfg, "momentum.final_tau", default=1.0)
        return cfg

    @property
    def learnable_params(self):
        backbone = {"name": "backbone", "params": self.backbone.parameters()}
        return [backbone, {"name": "classifier", "params": self.classifier.parameters(), "lr": 0.1, "weight_decay": 0}]

    @property
    def momentum_pairs(self):
        return [(self.backbone, self.momentum_backbone)]

    def forward(self, X):
        feats = self.backbone(X)
        return {"logits": self.classifier(feats.detach()), "feats": feats}

    @torch.no_grad()
    def momentum_forward(self, X):
        return {"feats": self.momentum_backbone(X)}

    def training_step(self, batch, batch_idx):
        _, X, targets = batch
        outs = [self(x) for x in X]  # every crop through the online side first, with all that the method adds
        outs = {name: [out[name] for out in outs] for name in outs[0]}
        outs["loss"] = sum(F.cross_entropy(logits, targets, ignore_index=-1) for logits in outs["logits"]) / len(X)
        momentum_outs = [self.momentum_forward(x) for x in X]
        return outs | {f"momentum_{name}": [out[name] for out in momentum_outs] for name in momentum_outs[0]}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step > self.last_step:  # not within an accumulated step
            for online, momentum in self.momentum_pairs:
                for new, kept in zip(online.parameters(), momentum.parameters(), strict=True):
                    kept.data = self.tau * kept.data + (1 - self.tau) * new.data
        self.last_step = self.trainer.global_step

    def log_dict(self, metrics, on_epoch, sync_dist):
        self.logged |= {name: value.detach() for name, value in metrics.items()}  # as Lightning


def renamed(base):
    """Give the base class of solo-learn 1.0.2 the constructor and the hooks' names of 1.0.6."""

    class Renamed(base):
        def __init__(self, cfg):
            cfg = self.add_and_assert_specific_cfg(cfg)
            super().__init__(
                base_tau_momentum=cfg.momentum.base_tau,
                final_tau_momentum=cfg.momentum.final_tau,
                momentum_classifier=False,
                encoder=cfg.backbone.name,
                backbone_args={},
                exclude_bias_n_norm=False,
                lars=False,
                extra_optimizer_args={},
                accumulate_grad_batches=1,
                max_epochs=cfg.max_epochs,
                scheduler=cfg.scheduler.name,
                min_lr=0.0,
                warmup_start_lr=0.0,
                warmup_epochs=0,
                num_classes=cfg.data.num_classes,
                num_large_crops=cfg.data.num_large_crops,
                num_small_crops=cfg.data.num_small_crops,
                batch_size=cfg.optimizer.batch_size,
                optimizer=cfg.optimizer.name,
                lr=cfg.optimizer.lr,
                weight_decay=cfg.optimizer.weight_decay,
                classifier_lr=cfg.optimizer.classifier_lr,
            )

        @staticmethod
        def add_and_assert_specific_cfg(cfg):
            return Hooks.add_and_assert_specific_cfg(cfg)

        def base_forward(self, X):
            return self.forward(X)

        def forward(self, X):
            return super().base_forward(X)

        def base_momentum_forward(self, X):
            return self.momentum_forward(X)

        def momentum_forward(self, X):
            return super().base_momentum_forward(X)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx, 0)  # Lightning 1.9 gives no dataloader_idx

    return Renamed


def example_on(base, monkeypatch):
    """Import the example as a part of solo-learn whose BaseMomentumMethod is ``base``."""
    for name in ("solo", "solo.methods", "solo.methods.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["solo.methods.base"].BaseMomentumMethod = base
    spec = importlib.util.spec_from_file_location("solo_methods_msf", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MSF


@pytest.fixture
def method(monkeypatch):
    torch.manual_seed(0)
    return example_on(Hooks, monkeypatch)


def config(**changes):
    cfg = {
        "method": "msf",
        "backbone": {"name": "resnet18"},
        "data": {"dataset": "made", "num_classes": CLASSES, "num_large_crops": 2, "num_small_crops": 0},
        "momentum": {},
        "optimizer": {"name": "sgd", "batch_size": BATCH, "lr": 0.1, "classifier_lr": 0.1, "weight_decay": 0.0},
        "scheduler": {"name": "none"},
        "max_epochs": 1,
        "method_kwargs": {
            "proj_hidden_dim": 24,
            "proj_output_dim": DIM,
            "pred_hidden_dim": 24,
            "queue_size": 20,
            "k": 3,
        },
    }
    return OmegaConf.merge(OmegaConf.create(cfg), OmegaConf.create(changes))


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for step in range(count):
        views = [torch.randn(BATCH, 3, 32, 32, generator=generator) for _ in range(2)]
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        yield [torch.arange(BATCH) + step * BATCH, views, labels]


def fit(model, data):
    """Step as Lightning does: loss, backward, optimizer, and then the end of the batch."""
    optimizer = torch.optim.SGD(model.learnable_params, lr=0.1)
    losses = []
    for index, batch in enumerate(data):
        loss = model.training_step(batch, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.trainer.global_step += 1
        model.on_train_batch_end(loss, batch, index)
        losses.append(loss.item())
    return losses


def test_the_loss_is_the_papers_of_strong_online_and_weak_target(method):
    model = method(config())
    fit(model, batches(1))
    [_, (online_view, target_view), labels] = batch = list(batches(2))[1]
    before = copy.deepcopy(model)  # BatchNorm moves in a forward
    loss = model.training_step(batch, 1)

    out = [before(view) for view in (online_view, target_view)]
    u = [before.momentum_forward(view)["z"] for view in (online_view, target_view)][1]
    rows = torch.cat([before.criterion.bank.rows[:BATCH], u])
    expected = reference.mean_shift_loss(out[0]["p"], u, rows, k=3)
    on_labels = sum(F.cross_entropy(view["logits"], labels) for view in out) / 2
    torch.testing.assert_close(loss.double(), expected + on_labels.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.logged["train_msf_loss"].double(), expected, rtol=1e-5, atol=1e-6)
    assert 0 <= model.logged["train_neighbor_purity"] <= 1
    assert 0 < model.logged["train_spread"] < 1.5


def test_the_bank_holds_the_newest_targets_and_their_labels(method):
    model = method(config())
    fit(model, batches(3))  # 24 rows for 20 places
    bank = model.criterion.bank
    assert (len(bank), int(bank.pushed)) == (20, 24)
    kept = torch.cat([labels for _, _, labels in batches(3)])[-20:]
    assert torch.equal(bank.labels[(torch.arange(20) + 4) % 20], kept)
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(20))


def test_only_the_student_learns_by_gradient(method):
    model = method(config())
    (batch,) = batches(1)
    model.training_step(batch, 0).backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in model.named_parameters() if "momentum" not in name} == learned
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in learned)

    listed = [parameter for group in model.learnable_params for parameter in group["params"]]
    assert len(listed) == len(learned)
    assert {id(parameter) for parameter in listed} == {id(model.get_parameter(name)) for name in learned}
    assert [group["name"] for group in model.learnable_params] == ["backbone", "classifier", "projector", "predictor"]


def test_labels_teach_the_classifier_alone(method):
    _, views, labels = next(batches(1))
    gradients = []
    for wanted in (labels, (labels + 1) % CLASSES):
        torch.manual_seed(1)
        model = method(config())
        model.training_step([None, views, wanted], 0).backward()
        gradients.append([module.weight.grad for module in (model.backbone[1], model.projector[0], model.classifier)])
    for one, other in zip(*(step[:2] for step in gradients), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(gradients[0][2], gradients[1][2])


def test_the_momentum_side_follows_once_a_step(method):
    model = method(config())
    before = [[kept.clone() for kept in pair[1].parameters()] for pair in model.momentum_pairs]
    fit(model, batches(1))
    assert len(model.momentum_pairs) == 2
    for (online, momentum), old in zip(model.momentum_pairs, before, strict=True):
        for new, kept, was in zip(online.parameters(), momentum.parameters(), old, strict=True):
            torch.testing.assert_close(kept, 0.99 * was + 0.01 * new)
            assert not torch.equal(kept, new)


def test_a_fresh_momentum_side_is_the_online_side(method):
    model = method(config())
    for online, momentum in model.momentum_pairs:
        for new, kept in zip(online.parameters(), momentum.parameters(), strict=True):
            assert torch.equal(new, kept)
            assert new.data_ptr() != kept.data_ptr()
            assert (new.requires_grad, kept.requires_grad) == (True, False)


def test_what_is_no_training_step_leaves_the_bank_as_it_was(method):
    model = method(config()).eval()
    model.momentum_projector.requires_grad_(True)  # it is the forward that must give no gradient
    X = next(batches(1))[1][0]
    out, momentum_out = model(X), model.momentum_forward(X)
    assert {name: list(value.shape) for name, value in out.items()} == {
        "logits": [BATCH, CLASSES],
        "feats": [BATCH, 12],
        "z": [BATCH, DIM],
        "p": [BATCH, DIM],
    }
    assert out["p"].requires_grad
    assert not momentum_out["z"].requires_grad
    assert len(model.criterion.bank) == 0


def test_a_resumed_run_goes_on_exactly(method):
    data = list(batches(4))
    model = method(config())
    fit(model, data[:2])
    resumed = method(config())
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    assert fit(model, data[2:]) == fit(resumed, data[2:])


def test_what_main_pretrain_does_to_a_model_leaves_the_bank_whole(method):
    model = method(config())
    fit(model, batches(1))
    rows = model.criterion.bank.rows.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.set_(parameter.contiguous())
    model = model.to(memory_format=torch.channels_last)
    assert torch.equal(model.criterion.bank.rows, rows)
    assert len(model.criterion.bank) == BATCH


def test_defaults_are_the_papers(method):
    sizes = {"proj_hidden_dim": 8, "proj_output_dim": 4, "pred_hidden_dim": 8}
    cfg = config()
    cfg.method_kwargs = sizes
    model = method(cfg)
    assert (model.criterion.k, model.criterion.bank.size, model.criterion.bank.dim) == (5, 128_000, 4)
    assert (model.cfg.momentum.base_tau, model.cfg.momentum.final_tau) == (0.99, 0.99)
    rising = method(config(momentum={"base_tau": 0.9, "final_tau": 1.0}))
    assert (rising.cfg.momentum.base_tau, rising.cfg.momentum.final_tau) == (0.9, 1.0)


@pytest.mark.parametrize("name", ["proj_hidden_dim", "proj_output_dim", "pred_hidden_dim"])
def test_a_missing_size_is_named(method, name):
    cfg = config()
    del cfg.method_kwargs[name]
    with pytest.raises(ValueError, match=f"method_kwargs.{name}"):
        method(cfg)


@pytest.mark.parametrize("crops", [{"num_small_crops": 4}, {"num_large_crops": 1}])
def test_other_crops_are_refused(method, crops):
    with pytest.raises(ValueError, match="two large crops"):
        method(config(data=crops))


def solo_learn(monkeypatch):
    """Return MSF on the base class of the solo-learn that is installed, and the Trainer that goes with it."""
    base = pytest.importorskip(
        "solo.methods.base",
        reason="no solo-learn that can be imported: PyPI's is 1.0.2 for torch 1.9.1, 1.0.6 is on GitHub only",
        exc_type=ImportError,
    ).BaseMomentumMethod
    current = hasattr(base, "add_and_assert_specific_cfg")
    lightning = importlib.import_module("lightning.pytorch" if current else "pytorch_lightning")
    return example_on(base if current else renamed(base), monkeypatch), lightning.Trainer


def parameters_of(function):
    return [(each.name, each.kind) for each in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_hooks_have_the_signatures_of_the_base_class(method, name):
    assert parameters_of(getattr(method, name)) == parameters_of(getattr(Hooks, name))


@pytest.mark.filterwarnings("ignore")  # of Lightning, on loggers, workers and steps
def test_a_step_in_solo_learn(monkeypatch, tmp_path):
    method, trainer_class = solo_learn(monkeypatch)
    base = method.__mro__[1]
    for name in OVERRIDDEN:
        assert parameters_of(getattr(method, name)) == parameters_of(getattr(base, name))

    torch.manual_seed(0)
    model = method(config())
    before = [[kept.clone() for kept in pair[1].parameters()] for pair in model.momentum_pairs]
    (batch,) = batches(1)
    trainer = trainer_class(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(model, torch.utils.data.DataLoader([batch], batch_size=None))

    assert trainer.global_step == 1
    assert 0 < trainer.callback_metrics["train_msf_loss"] < 4
    assert (len(model.criterion.bank), model.criterion.steps) == (BATCH, 1)
    assert torch.equal(model.criterion.bank.labels[:BATCH], batch[-1])
    assert len(model.momentum_pairs) == 2
    for (online, momentum), old in zip(model.momentum_pairs, before, strict=True):
        for new, kept, was in zip(online.parameters(), momentum.parameters(), old, strict=True):
            assert kept.grad is None
            torch.testing.assert_close(kept, 0.99 * was + 0.01 * new)
        assert any(not torch.equal(new, was) for new, was in zip(online.parameters(), old, strict=True))

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(saved["criterion.bank.rows"], model.criterion.bank.rows)
