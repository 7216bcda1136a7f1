"""The method for solo-learn, on solo-learn's base class if it can be imported, and on `Hooks` without solo-learn.

solo-learn is only on GitHub (PyPI has 1.0.2 from 2021, for torch 1.9.1). Tests named "in_solo_learn" need a clone::

    git clone https://github.com/vturrisi/solo-learn
    pip install einops wandb
    PYTHONPATH=solo-learn pytest tests/integrations/test_solo_learn_msf.py

Run on 2026-11-25 on a CPU, with an unmodified clone (main at commit 9187ea3, version 1.0.6), Python 3.11, PyTorch
2.14.1 and Lightning 2.6.6: these tests, and the clone's main_pretrain.py on a folder of 147 images with a ResNet-18:

- 3 epochs, as the example's first lines say;
- 3 epochs with small crops, ``symmetric`` and ``exclude_same_id``, bfloat16 and accumulation 2, the last epoch also
  resumed from the checkpoint of the second;
- the same on two processes (DDP, gloo), 2 epochs.
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

from msf_core import neighbor_purity, reference

omegaconf = pytest.importorskip("omegaconf", reason="solo-learn's configs are omegaconf's, which is not installed")
OmegaConf = omegaconf.OmegaConf

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "integrations" / "solo_learn_msf.py"
BATCH, CLASSES, DIM = 8, 5, 16
OVERRIDDEN = (
    "forward",
    "multicrop_forward",
    "momentum_forward",
    "on_train_start",
    "training_step",
    "add_and_assert_specific_cfg",
)
EVERYTHING = {
    "data": {"num_small_crops": 2},
    "method_kwargs": {"symmetric": True, "exclude_same_id": True, "queue_size": 40},
}


class Hooks(nn.Module):
    """A few lines that call a method as solo-learn does. This is not solo-learn.

    Names, signatures and order of the hooks are those of BaseMethod and BaseMomentumMethod in solo/methods/base.py of
    github.com/vturrisi/solo-learn (1.0.6, commit 9187ea3). Backbone, optimizer and logging are not.
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

    def multicrop_forward(self, X):
        return {"feats": self.backbone(X)}

    @torch.no_grad()
    def momentum_forward(self, X):
        return {"feats": self.momentum_backbone(X)}

    def on_train_start(self):
        self.last_step = 0

    def training_step(self, batch, batch_idx):
        _, X, targets = batch
        large = self.cfg.data.num_large_crops
        outs = [self(x) for x in X[:large]]  # through the online side first, with all that the method adds
        outs = {name: [out[name] for out in outs] for name in outs[0]}
        outs["loss"] = sum(F.cross_entropy(logits, targets, ignore_index=-1) for logits in outs["logits"]) / large
        for out in map(self.multicrop_forward, X[large:]):
            for name, value in out.items():
                outs[name] = [*outs[name], value]
        momentum_outs = [self.momentum_forward(x) for x in X[:large]]
        return outs | {f"momentum_{name}": [out[name] for out in momentum_outs] for name in momentum_outs[0]}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step > self.last_step:  # not within an accumulated step
            for online, momentum in self.momentum_pairs:
                for new, kept in zip(online.parameters(), momentum.parameters(), strict=True):
                    kept.data = self.tau * kept.data + (1 - self.tau) * new.data
        self.last_step = self.trainer.global_step

    def log_dict(self, metrics, on_epoch, sync_dist):
        self.logged |= {name: value.detach() for name, value in metrics.items()}  # like Lightning


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
        "data": {"dataset": "custom", "num_classes": CLASSES, "num_large_crops": 2, "num_small_crops": 0},
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


def batches(count, crops=2):
    generator = torch.Generator().manual_seed(0)
    for step in range(count):
        views = [torch.randn(BATCH, 3, 32, 32, generator=generator) for _ in range(crops)]
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        yield [torch.arange(BATCH) + step * BATCH, views, labels]


def fit(model, data):
    """Step as Lightning does: loss, backward, optimizer, and then the end of the batch."""
    optimizer = torch.optim.SGD(model.learnable_params, lr=0.1)
    losses = []
    model.on_train_start()
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
    before = copy.deepcopy(model)  # a forward changes BatchNorm's statistics
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


def test_a_resumed_run_does_not_move_the_target_before_its_first_step(method):
    """The base class takes the first batch for a step, which is wrong when gradients are accumulated."""
    model = method(config())
    fit(model, batches(2))
    before = copy.deepcopy(model.state_dict())
    model.on_train_start()
    model.on_train_batch_end(None, None, 0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


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


@pytest.mark.parametrize("crops", [1, 3])
def test_another_number_of_large_crops_is_refused(method, crops):
    with pytest.raises(ValueError, match=f"two large crops, online and target, got {crops}"):
        method(config(data={"num_large_crops": crops}))


def test_ids_that_dali_does_not_give_are_refused(method):
    wanted = {"method_kwargs": {"exclude_same_id": True}, "data": {"format": "dali"}}
    for dali in ({}, {"dali": {"encode_indexes_into_labels": False}}):
        with pytest.raises(ValueError, match="encode_indexes_into_labels: True"):
            method(config(**wanted, **dali))
    assert method(config(**wanted, dali={"encode_indexes_into_labels": True})).criterion.exclude_same_id


def predicted(model, view):
    return model.predictor(model.projector(model.backbone(view)))


def test_every_small_crop_is_drawn_to_the_weak_view(method):
    model = method(config(data={"num_small_crops": 2}))
    first, second = batches(2, crops=4)
    fit(model, [first])
    before = copy.deepcopy(model)
    model.training_step(second, 1)
    strong, weak, *small = second[1]
    predictions = [before(view)["p"] for view in (strong, weak)]  # in the order of the forwards, for BatchNorm
    predictions += [predicted(before, view) for view in small]
    u = [before.momentum_forward(view)["z"] for view in (strong, weak)][1]
    rows = torch.cat([before.criterion.bank.rows[:BATCH], u])
    del predictions[1]  # the weak view is not an online view
    expected = torch.stack([reference.mean_shift_loss(p, u, rows, k=3) for p in predictions]).mean()
    torch.testing.assert_close(model.logged["train_msf_loss"].double(), expected, rtol=1e-5, atol=1e-6)
    assert len(model.criterion.bank) == 2 * BATCH, "one target an image"


def test_symmetric_has_two_targets_each_for_all_crops_but_itself(method):
    model = method(config(data={"num_small_crops": 1}, method_kwargs={"symmetric": True, "queue_size": 40}))
    first, second = batches(2, crops=3)
    fit(model, [first])
    before, found = copy.deepcopy(model), []
    model.criterion.register_forward_hook(lambda criterion, given, out: found.extend(out[1]))
    model.training_step(second, 1)
    *large, small = second[1]
    predictions = [*(before(view)["p"] for view in large), predicted(before, small)]
    targets = [before.momentum_forward(view)["z"] for view in large]
    rows = torch.cat([before.criterion.bank.rows[: 2 * BATCH], *targets])
    losses = []
    for i, j in ((1, 0), (2, 0), (0, 1), (2, 1)):
        for image in range(BATCH):
            others = torch.ones(len(rows), dtype=torch.bool)
            others[2 * BATCH + (1 - j) * BATCH + image] = False  # the other view of the same image
            v, u = (views[image : image + 1] for views in (predictions[i], targets[j]))
            losses.append(reference.mean_shift_loss(v, u, rows[others], k=3))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(model.logged["train_msf_loss"].double(), expected, rtol=1e-5, atol=1e-6)
    assert len(model.criterion.bank) == 32, "two targets an image"
    assert model.logged["train_neighbor_purity"] == neighbor_purity(found[0].label, second[2])
    assert neighbor_purity(found[1].label, second[2]) != neighbor_purity(found[0].label, second[2])
    assert model.criterion.steps == 2


@pytest.mark.parametrize("exclude", [False, True])
def test_older_views_of_an_image_are_no_neighbors_where_asked(method, exclude):
    model = method(config(method_kwargs={"exclude_same_id": exclude}))
    found = []
    model.criterion.register_forward_hook(lambda criterion, given, out: found.append(out[1].index[:, 1:]))
    (batch,) = batches(1)
    fit(model, [batch, batch])
    own = torch.arange(BATCH)[:, None]  # slots of the first pass are image numbers
    assert (found[1] % BATCH == own).any() != exclude
    ids = model.criterion.bank.ids
    assert ids is None if not exclude else torch.equal(ids[: 2 * BATCH], batch[0].repeat(2))


def solo_learn(monkeypatch):
    """Return MSF on solo-learn's own base class, and Lightning's Trainer."""
    base = pytest.importorskip(
        "solo.methods.base",
        reason="solo-learn cannot be imported: it is only on GitHub; see the first lines of this file",
        exc_type=ImportError,
    ).BaseMomentumMethod
    return example_on(base, monkeypatch), importlib.import_module("lightning.pytorch").Trainer


def parameters_of(function):
    return [(each.name, each.kind) for each in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_hooks_have_the_signatures_of_the_base_class(method, name):
    assert parameters_of(getattr(method, name)) == parameters_of(getattr(Hooks, name))


@pytest.mark.filterwarnings("ignore")  # Lightning's, about loggers, workers and steps
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["paper", "everything"])
def test_a_step_in_solo_learn(monkeypatch, tmp_path, options):
    method, trainer_class = solo_learn(monkeypatch)
    base = method.__mro__[1]
    for name in OVERRIDDEN:
        assert parameters_of(getattr(method, name)) == parameters_of(getattr(base, name))

    torch.manual_seed(0)
    model = method(config(**options))
    before = [[kept.clone() for kept in pair[1].parameters()] for pair in model.momentum_pairs]
    (batch,) = batches(1, crops=4 if options else 2)
    trainer = trainer_class(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(model, torch.utils.data.DataLoader([batch], batch_size=None))

    assert trainer.global_step == 1
    assert 0 < trainer.callback_metrics["train_msf_loss"] < 4
    targets = 2 if options else 1
    assert (len(model.criterion.bank), model.criterion.steps) == (targets * BATCH, 1)
    assert torch.equal(model.criterion.bank.labels[: targets * BATCH], batch[-1].repeat(targets))
    if options:
        assert torch.equal(model.criterion.bank.ids[: 2 * BATCH], batch[0].repeat(2))
    assert len(model.momentum_pairs) == 2
    for (online, momentum), old in zip(model.momentum_pairs, before, strict=True):
        for new, kept, was in zip(online.parameters(), momentum.parameters(), old, strict=True):
            assert kept.grad is None
            torch.testing.assert_close(kept, 0.99 * was + 0.01 * new)
        assert any(not torch.equal(new, was) for new, was in zip(online.parameters(), old, strict=True))

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(saved["criterion.bank.rows"], model.criterion.bank.rows)


@pytest.mark.filterwarnings("ignore")
def test_a_run_resumed_in_solo_learn_ends_with_the_bits_of_one_that_was_not_stopped(monkeypatch, tmp_path):
    method, trainer_class = solo_learn(monkeypatch)

    def run(seed, epochs, **resumed):
        torch.manual_seed(seed)
        model = method(config(**EVERYTHING))
        quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = trainer_class(max_epochs=epochs, accumulate_grad_batches=2, default_root_dir=tmp_path, **quiet)
        trainer.fit(model, torch.utils.data.DataLoader(list(batches(4, crops=4)), batch_size=None), **resumed)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    run(0, 1)
    resumed, whole = run(1, 2, ckpt_path=tmp_path / "1.ckpt", weights_only=False), run(0, 2)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert (whole.criterion.steps, int(whole.criterion.bank.pushed)) == (8, 8 * 2 * BATCH)
