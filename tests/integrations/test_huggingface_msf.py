"""MSF on a model of transformers under accelerate: a run, its resumption, its backbone for from_pretrained."""

from pathlib import Path
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


def run(example: Any, *arguments: str) -> float:
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
