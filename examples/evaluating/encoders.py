"""The encoder to evaluate: of a run of the trainer, of an exported backbone, or a model of torchvision or timm."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from msf_core.distributed import Ranks
from training.checkpoint import load_checkpoint
from training.models import build_backbone, remove_classifier, stem_of


@dataclass
class LoadedEncoder:
    """A backbone without classifier, and where it is from."""

    backbone: nn.Module
    arch: str
    source: dict[str, Any]  # for the record
    trained_on: dict[str, Any] = field(default_factory=dict)  # "dataset", "data", "image_size", "val_split"
    folder: Path | None = None  # of the run or the file


def load_encoder(name: str, ranks: Ranks, arch: str = "", weights: str = "", image_size: int = 0) -> LoadedEncoder:
    """Return the encoder called ``name``.

    Args:
        name: a run's folder, its checkpoint.pt, a backbone.safetensors, or a model of torchvision or timm.
        ranks: who loads it.
        arch: of a safetensors file that does not say.
        weights: of a model by name: those of torchvision by their names ("IMAGENET1K_V2"), "pretrained" of timm.
            Without, the model is at random.
        image_size: on which it is tried; 0 is what it was trained with, or 224.

    Raises:
        ValueError: no such thing, or a damaged one, or weights that do not fit.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if path.suffix == ".safetensors":
        return _from_file(path, arch, image_size)
    if path.suffix == ".pt":
        return _from_checkpoint(path, ranks, image_size)
    if path.exists():
        raise ValueError(f"{path} is neither a checkpoint (.pt) nor an exported backbone (.safetensors)")
    return _by_name(name, weights, image_size or 224)


def _from_checkpoint(path: Path, ranks: Ranks, image_size: int) -> LoadedEncoder:
    state = load_checkpoint(path, {"settings", "online", "step"}, ranks)
    settings = state["settings"]
    stem = stem_of(settings.get("stem", "imagenet"), settings["arch"], settings["image_size"])
    backbone = _built(settings["arch"], image_size or settings["image_size"], stem)
    prefix = "backbone."
    tensors = {key.removeprefix(prefix): value for key, value in state["online"].items() if key.startswith(prefix)}
    _load(backbone, tensors, path)
    source = {"checkpoint": str(path), "step": state["step"], "settings": settings}
    trained_on = {key: settings[key] for key in ("dataset", "data", "image_size", "val_split") if key in settings}
    return LoadedEncoder(backbone, settings["arch"], source, trained_on, path.parent)


def _from_file(path: Path, arch: str, image_size: int) -> LoadedEncoder:
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    arch = arch or facts.get("arch", "")
    if not arch:
        raise ValueError(f"{path} does not say which model it is of: give --arch")
    backbone = _built(arch, image_size or int(facts.get("image_size", 224)), facts.get("stem", "imagenet"))
    classifier = getattr(backbone, "classifier_shapes", {})
    _load(backbone, {key: value for key, value in tensors.items() if key not in classifier}, path)
    trained_on = {key: facts[key] for key in ("dataset",) if key in facts}
    if "image_size" in facts:
        trained_on["image_size"] = int(facts["image_size"])
    return LoadedEncoder(backbone, arch, {"file": str(path), "metadata": facts}, trained_on, path.parent)


def _by_name(name: str, weights: str, image_size: int) -> LoadedEncoder:
    source = {"model": name, "weights": weights or "none: random initialization"}
    if not weights:
        return LoadedEncoder(_built(name, image_size), name, source)
    try:
        if name in torchvision.models.list_models(module=torchvision.models):
            backbone = torchvision.models.get_model(name, weights=weights)
            remove_classifier(backbone, name)
        else:
            import timm

            if not timm.is_model(name):
                raise ValueError(f"no run, file or model {name!r}")
            backbone = timm.create_model(name, pretrained=True, num_classes=0)
    except (KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"{name} with weights {weights!r} could not be loaded: {error}") from error
    return LoadedEncoder(backbone, name, source)


def _built(arch: str, image_size: int, stem: str = "imagenet") -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(arch, (1 if arch == "digits" else 3, image_size, image_size), stem)[0]


def _load(backbone: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        backbone.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit: {error}") from error
