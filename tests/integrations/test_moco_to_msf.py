"""examples/integrations/moco_to_msf.py: both loops train, and they differ only in the named parts."""

import copy
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18
from torchvision.transforms import v2

from msf_core import EMATarget, reference

pytest.importorskip("sklearn", reason="the example's digits are scikit-learn's")

from integrations import moco_to_msf
from integrations.moco_to_msf import BATCH, MSF, WeakAndStrong, accuracy, batches, make_encoder, moco, msf, strong, weak


def blobs(count: int) -> tuple[Tensor, Tensor]:
    """Return images with one bright quarter each, and which quarter it is."""
    labels = torch.arange(count) % 4
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(count)) - 1
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 1.5
    return images, labels


@pytest.mark.parametrize("method", [moco, msf])
def test_training_makes_views_of_an_image_alike(method: Callable[[Tensor, int], nn.Module]) -> None:
    images, _ = blobs(128)
    torch.manual_seed(0)
    start = make_encoder()[0]
    torch.manual_seed(0)
    backbone = method(images, 8)
    assert similarity_of_views(backbone, images) > similarity_of_views(start, images) + 0.05


def test_a_step_of_msf_is_that_of_the_paper(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online encoders see strong views, and targets weak ones."""
    seen = []
    make = moco_to_msf.make_encoder

    def watched_encoder() -> nn.Sequential:
        encoder = make()
        encoder.register_forward_pre_hook(lambda _, given: seen.append((True, given[0].unique())))
        return encoder

    def watched_target(online: nn.Module, momentum: float) -> EMATarget:
        target = EMATarget(online, momentum)
        target.register_forward_pre_hook(lambda _, given: seen.append((False, given[0].unique())))
        return target

    monkeypatch.setattr(moco_to_msf, "make_encoder", watched_encoder)
    monkeypatch.setattr(moco_to_msf, "EMATarget", watched_target)
    monkeypatch.setattr(moco_to_msf, "weak", lambda images: torch.full_like(images, 1.0))
    monkeypatch.setattr(moco_to_msf, "strong", lambda images: torch.full_like(images, 2.0))
    backbone = msf(blobs(2 * BATCH)[0], 3)
    watch.is_mean_shift(k=5, momentum=moco_to_msf.MOMENTUM, steps=6)
    assert [(online, view.tolist()) for online, view in seen] == [(True, [2.0]), (False, [1.0])] * 6
    assert len(watch.losses[0][0].bank) == 6 * BATCH
    assert {id(p) for p in backbone.parameters()} < {id(p) for _, online in watch.updates for p in online.parameters()}


def test_a_step_of_moco_is_that_of_moco(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch of keys is in the queue of negatives for later batches; the target follows by EMA."""
    logits, keys, encoders = [], [], []

    def watched_copy(module: nn.Module) -> nn.Module:
        target = copy.deepcopy(module)
        encoders.append((module, target))
        target.register_forward_hook(lambda _, given, u: keys.append(nn.functional.normalize(u, dim=1)))
        return target

    def cross_entropy(given: Tensor, labels: Tensor) -> Tensor:
        online, target = encoders[0]
        state = [[parameter.detach().clone() for parameter in module.parameters()] for module in (online, target)]
        logits.append((given.detach(), state))
        return nn.functional.nll_loss(given.log_softmax(dim=1), labels)

    monkeypatch.setattr(moco_to_msf, "copy", SimpleNamespace(deepcopy=watched_copy))
    monkeypatch.setattr(moco_to_msf.F, "cross_entropy", cross_entropy)
    moco(blobs(3 * BATCH)[0], 1)
    for step, (given, (online, target)) in enumerate(logits):
        assert given.shape == (BATCH, 1 + moco_to_msf.BANK_SIZE)
        if step:
            _, (_, before) = logits[step - 1]
            for f, g, old in zip(target, online, before, strict=True):
                torch.testing.assert_close(f, moco_to_msf.MOMENTUM * old + (1 - moco_to_msf.MOMENTUM) * g)
    # A query of the third batch times the keys of both batches before it, wherever they lie in the queue.
    (third, _), old_keys = logits[2], torch.cat(keys[:2])
    changed = third[:, 1 : 1 + 2 * BATCH] * 0.2
    q = torch.linalg.lstsq(old_keys, changed.T).solution.T
    torch.testing.assert_close(q @ old_keys.T, changed, rtol=0, atol=1e-3)


def similarity_of_views(backbone: nn.Module, images: Tensor) -> float:
    """Mean cosine of two views of an image minus that of views of different images, of centered features."""
    torch.manual_seed(5)
    with torch.no_grad():
        first, second = (backbone.eval()(strong(images)) for _ in range(2))
    first, second = (nn.functional.normalize(view - view.mean(dim=0), dim=1) for view in (first, second))
    same = first @ second.T
    return float(same.diagonal().mean() - same.mean())


def test_the_two_have_the_same_shape() -> None:
    assert inspect.signature(moco) == inspect.signature(msf)
    lengths = [len(inspect.getsource(method).splitlines()) for method in (moco, msf)]
    assert lengths[1] <= lengths[0]
    assert moco_to_msf.BANK_SIZE % BATCH == 0  # MoCo's queue needs that


def test_batches_are_whole_and_every_epoch_is_a_new_order() -> None:
    images = torch.arange(2 * BATCH + 5.0)
    seen = list(batches(images, epochs=2))
    assert [len(batch) for batch in seen] == [BATCH] * 4
    for epoch in (seen[:2], seen[2:]):
        assert len(torch.cat(epoch).unique()) == 2 * BATCH
    assert not torch.equal(seen[0], seen[2])


def test_views_differ_and_the_weak_one_less() -> None:
    images, _ = blobs(64)
    for view in (weak, strong):
        assert view(images).shape == images.shape
        assert not torch.equal(view(images), view(images))
    assert (weak(images) - images).abs().mean() < 0.7 * (strong(images) - images).abs().mean()
    assert torch.allclose(weak(images, amount=0.0), images, atol=1e-5)


def test_accuracy_is_of_the_nearest_with_all_labels_and_with_the_first_of_each_class() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.2], [0.0, 1.1]])
    labels = torch.tensor([0, 1, 0, 1])
    test, test_labels = torch.tensor([[-1.0, 0.3], [2.0, 0.1], [0.1, 3.0]]), torch.tensor([0, 0, 1])
    all_labels, one_label = accuracy(nn.Identity(), train, labels, test, test_labels)
    assert all_labels == 1.0
    assert one_label == pytest.approx(2 / 3)  # [-1, 0.3] is nearer to [0, 1] than to [1, 0]


def test_the_example_prints_an_accuracy_for_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moco_to_msf.py", "--epochs", "1"])
    moco_to_msf.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[:15].strip() for line in lines] == ["raw pixels", "untrained", "MoCo", "MSF, k = 5"]
    for line in lines:
        nn1, one_label = (float(number) for number in line[15:].split())
        assert 0.9 < nn1 <= 1
        assert 0.3 < one_label < nn1


RANKS, STEPS, SMALL = 2, 4, {"dim": 8, "K": 20, "m": 0.9, "k": 3, "hidden": 16}


def views_of(step: int) -> tuple[Tensor, Tensor]:
    """The strong and the weak views of a step, of all ranks."""
    generator = torch.Generator().manual_seed(step)
    weak_views = torch.randn(RANKS * 4, 3, 32, 32, generator=generator)
    return weak_views + 0.1 * torch.randn(weak_views.shape, generator=generator), weak_views


def train_in_ddp(rank: int, folder: str) -> None:
    """Train on one rank like main_moco.py, and keep what the tests compare."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model = DistributedDataParallel(MSF(resnet18, **SMALL))
    inner, kept = model.module, []
    inner.encoder_k.register_forward_hook(lambda module, given, out: kept.append({"weak": given[0], "u": out}))
    inner.encoder_q.register_forward_hook(lambda module, given, out: kept[-1].update(strong=given[0]))
    inner.predictor.register_forward_hook(lambda module, given, out: kept[-1].update(v=out.detach()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(STEPS):
        im_q, im_k = (view.chunk(RANKS)[rank] for view in views_of(step))
        before = inner.encoder_q.fc[3].weight.detach().clone()
        loss = model(im_q=im_q, im_k=im_k)
        kept[-1] |= {"loss": loss.detach(), "online": before}
        kept[-1]["target"] = inner.encoder_k.module.fc[3].weight.clone()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save({"steps": kept, "state": model.state_dict()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks kept; from a fresh process, which is safe to fork."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def test_in_ddp_the_target_is_updated_within_the_forward_and_the_ranks_agree(ranks: list[dict[str, Any]]) -> None:
    one, other = (kept["state"] for kept in ranks)
    statistics = ("running_mean", "running_var")  # of BatchNorm: each rank's own until DDP's next forward
    for name, tensor in one.items():
        assert name.endswith(statistics) or torch.equal(tensor, other[name]), name
    expected = ranks[0]["steps"][0]["online"]  # the first update moves nothing
    for step in ranks[0]["steps"]:
        expected = 0.9 * expected + 0.1 * step["online"]
        torch.testing.assert_close(step["target"], expected)
    assert one["module.criterion._extra_state"] == one["module.encoder_k._extra_state"] == STEPS
    assert "module.encoder_q.conv1.weight" in one  # what main_lincls.py looks for


def test_in_ddp_the_loss_is_the_papers_on_the_bank_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    pushed = torch.empty(0, SMALL["dim"])
    for step, both in enumerate(zip(*(kept["steps"] for kept in ranks), strict=True)):
        for place, images in (("strong", views_of(step)[0]), ("weak", views_of(step)[1])):
            assert torch.equal(torch.cat([kept[place] for kept in both]), images)
        pushed = torch.cat([pushed, *(kept["u"] for kept in both)])
        for kept in both:
            expected = reference.mean_shift_loss(kept["v"], kept["u"], pushed[-SMALL["K"] :], k=3)
            torch.testing.assert_close(kept["loss"].double(), expected, rtol=1e-5, atol=1e-6)
    assert ranks[0]["state"]["module.criterion.bank.pushed"] == len(pushed) > SMALL["K"]


def test_in_eval_mode_a_forward_changes_nothing() -> None:
    model = MSF(resnet18, **SMALL).eval()
    nn.init.zeros_(model.encoder_q.fc[3].weight)
    before = copy.deepcopy(model.state_dict())
    model(*views_of(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_defaults_are_the_papers() -> None:
    model = MSF(resnet18)
    assert (model.criterion.k, model.criterion.bank.size, model.encoder_k.momentum) == (5, 128_000, 0.99)
    shapes = [module.weight.shape for head in (model.encoder_q.fc, model.predictor) for module in head[::3]]
    assert shapes == [(4096, 512), (512, 4096), (4096, 512), (512, 4096)]


def test_views_come_strong_first() -> None:
    views = WeakAndStrong(strong=v2.Grayscale(), weak=v2.Identity())(torch.rand(3, 4, 4))
    assert [len(view) for view in views] == [1, 3]


if __name__ == "__main__":
    torch.multiprocessing.start_processes(train_in_ddp, (sys.argv[1],), RANKS, start_method="fork")
