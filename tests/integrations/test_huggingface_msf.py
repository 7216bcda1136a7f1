"""MSF on a transformers model under accelerate: a run, resuming it, and its backbone for from_pretrained."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from integrations import huggingface_msf

    few = tuple(part[:200] for part in huggingface_msf.digits())
    monkeypatch.setattr(huggingface_msf, "digits", lambda: few)
    return huggingface_msf


def run(example: Any, *arguments: str) -> tuple[float, float]:
    return example.train(example.parse(["--batch-size", "32", *arguments]))


def state_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    state: dict[str, Any] = dict(load_file(folder / "state" / "model.safetensors"))
    for number in (0, 1):  # target and criterion, in the order of their registration
        saved = torch.load(folder / "state" / f"custom_checkpoint_{number}.pkl", weights_only=False)
        state |= {f"{number}.{name}": value for name, value in saved.items()}
    momenta = torch.load(folder / "state" / "optimizer.bin", weights_only=False)["state"]
    return state | {f"momentum of {name}": value["momentum_buffer"] for name, value in momenta.items()}


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(example: Any, tmp_path: Path) -> None:
    run(example, "--epochs", "2", "--out", str(tmp_path / "whole"))
    run(example, "--epochs", "1", "--out", str(tmp_path / "first"))
    resumed = ["--resume", str(tmp_path / "first" / "state"), "--first-epoch", "1", "--seed", "0"]
    run(example, "--epochs", "2", *resumed, "--out", str(tmp_path / "second"))
    whole, second, first = (state_of(tmp_path / name) for name in ("whole", "second", "first"))
    assert whole.keys() == second.keys()
    assert int(whole["1.bank.pushed"]) == 2 * (200 // 32) * 32
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
    moved = [name for name, value in whole.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert any(not torch.equal(whole[name], first[name]) for name in moved)
    assert not torch.equal(whole["1.bank.rows"], first["1.bank.rows"])


def test_several_processes_resume_to_the_bit_too(tmp_path: Path) -> None:
    """Under torchrun, in the same processes for all three runs: importing for each would take most of a minute."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(__file__, str(tmp_path)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after: 1-NN") == 3  # one process prints
    whole, second = (state_of(tmp_path / name) for name in ("whole", "second"))
    assert int(whole["1.bank.pushed"]) == 2 * (390 // 128) * 128
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name


def run_the_script_thrice(folder: Path) -> None:
    """What each process does, with 520 digits.

    Another run comes before the first one is resumed, so that nothing of the first one can be left in the process.
    """
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    datasets.load_digits = lambda return_X_y: (images[:520], labels[:520])
    script = Path(__file__).parents[2] / "examples" / "integrations" / "huggingface_msf.py"
    resumed = ["--resume", str(folder / "first" / "state"), "--first-epoch", "1"]
    for name, epochs, more in (("first", 1, []), ("whole", 2, []), ("second", 2, resumed)):
        arguments = ["--batch-size", "64", "--epochs", str(epochs), "--out", str(folder / name), *more]
        made = runpy.run_path(str(script))
        made["train"](made["parse"](arguments))
    made["PartialState"]().destroy_process_group()


if __name__ == "__main__":
    run_the_script_thrice(Path(sys.argv[1]))


def test_fewer_images_than_a_batch_are_an_error(example: Any) -> None:
    with pytest.raises(SystemExit, match="200 images are less than a batch of 256"):
        run(example, "--epochs", "1", "--batch-size", "256")


def test_the_accuracies_are_of_all_labels_and_of_one_a_class(example: Any) -> None:
    """Each class lies in two places, and one label per class cannot tell both."""

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, images: torch.Tensor) -> Any:
            return SimpleNamespace(pooler_output=images * self.scale)

    places = torch.arange(40) % 4
    images, labels = torch.eye(4)[places], places // 2
    assert example.accuracies(Flat(), (images, labels, images, labels))[0] == 1.0
    assert 0.5 <= example.accuracies(Flat(), (images, labels, images, labels))[1] <= 0.85


def test_a_step_is_that_of_the_paper(example: Any, watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = example.Online.forward

    def watched_forward(online: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        seen.append((online.training, images.unique().tolist()))
        return forward(online, images)

    monkeypatch.setattr(example.Online, "forward", watched_forward)
    monkeypatch.setattr(example, "WEAK", lambda image: torch.full_like(image, 1.0))
    monkeypatch.setattr(example, "STRONG", lambda image: torch.full_like(image, 2.0))
    run(example, "--epochs", "1")
    watch.is_mean_shift(k=5, momentum=0.97, steps=6)
    assert all(images.unique().tolist() == [1.0] for images, _ in watch.targets)
    assert seen == [(True, [2.0])] * 6
    assert all(target.module.training for target, _ in watch.updates)
    assert (watch.losses[0][0].bank.labels[: 6 * 32] >= 0).all()


def test_views_of_an_epoch_are_new_ones(example: Any, watch: Any) -> None:
    run(example, "--epochs", "2", "--batch-size", "200")
    (first, _), (second, _) = watch.targets
    assert not torch.equal(first.sum(dim=(1, 2, 3)).sort().values, second.sum(dim=(1, 2, 3)).sort().values)


def test_the_target_follows_steps_of_the_optimizer_alone(example: Any, tmp_path: Path) -> None:
    run(example, "--epochs", "1", "--accumulate", "3", "--out", str(tmp_path))
    target = torch.load(tmp_path / "state" / "custom_checkpoint_0.pkl", weights_only=False)
    assert int(target["_extra_state"]) == 2  # of 6 batches
    criterion = torch.load(tmp_path / "state" / "custom_checkpoint_1.pkl", weights_only=False)
    assert int(criterion["bank.pushed"]) == 6 * 32


def test_the_backbone_loads_by_from_pretrained_and_trains_on(example: Any, tmp_path: Path) -> None:
    run(example, "--epochs", "1", "--out", str(tmp_path / "one"))
    folder = str(tmp_path / "one" / "backbone")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    saved = state_of(tmp_path / "one")
    assert torch.equal(
        model.state_dict()["embedder.embedder.convolution.weight"],
        saved["encoder.0.model.embedder.embedder.convolution.weight"],
    )
    accuracy = run(example, "--epochs", "0", "--model", folder)
    untrained = run(example, "--epochs", "0")
    assert accuracy != untrained
