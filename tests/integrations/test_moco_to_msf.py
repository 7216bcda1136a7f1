"""examples/integrations/moco_to_msf.py: both loops train, and the one is the other with the named parts exchanged."""

import copy
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn", reason="the example's digits are scikit-learn's")

from integrations import moco_to_msf
from integrations.moco_to_msf import BATCH, accuracy, batches, make_encoder, moco, msf, strong, weak
from msf_core import EMATarget


def blobs(count: int) -> tuple[Tensor, Tensor]:
    """Images of a bright quarter each, and which one."""
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
    """Every batch of keys is in the queue that the batches after it are told apart from; the target follows by EMA."""
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
    """Cosine of two views of an image, less that of views of different ones, around the mean feature."""
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
