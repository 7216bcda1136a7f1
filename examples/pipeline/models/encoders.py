"""The encoder to evaluate: from a run of the trainer, an exported backbone, torchvision or timm."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from msf_core.distributed import Ranks
from pipeline.models.backbones import DigitsResNet, build_backbone, count_features, remove_classifier, stem_of
from pipeline.models.checkpoint import load_checkpoint


@dataclass
class LoadedEncoder:
    """A backbone without classifier, and where it comes from."""

    backbone: nn.Module
    arch: str
    source: dict[str, Any]  # for the record
    trained_on: dict[str, Any] = field(default_factory=dict)  # "dataset", "data", "image_size", "val_split"
    folder: Path | None = None  # folder of the run, or the file

    @property
    def gray(self) -> bool:
        """Whether its images have one channel."""
        return isinstance(self.backbone, DigitsResNet) and self.backbone.channels == 1


def load_encoder(name: str, ranks: Ranks, arch: str = "", weights: str = "", image_size: int = 0) -> LoadedEncoder:
    """Return the encoder called ``name``.

    Args:
        name: a run's folder, its checkpoint.pt, a backbone.safetensors, or a model of torchvision or timm.
        ranks: the ranks that load it.
        arch: architecture of a safetensors file that does not contain it.
        weights: weights of a named model: a name such as "IMAGENET1K_V2" for torchvision, "pretrained" for timm.
            Without weights, the model is randomly initialized.
        image_size: size of the images that it is tried on; 0 is the size that it was trained with, or 224.

    Raises:
        ValueError: there is no such encoder, its file is damaged, or its weights do not fit.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if path.suffix not in (".safetensors", ".pt"):
        if path.exists():
            raise ValueError(f"{path} is neither a checkpoint (.pt) nor an exported backbone (.safetensors)")
        if arch:
            raise ValueError(f"--arch is for a safetensors file without an architecture, got the model name {name}")
        return _by_name(name, weights, image_size or 224)
    if weights:
        raise ValueError(f"--weights is for a model of torchvision or timm by name, but {path} has weights of its own")
    if path.suffix == ".safetensors":
        return _from_file(path, arch, image_size)
    if arch:
        raise ValueError(f"--arch is for a safetensors file without an architecture, but {path} contains one")
    return _from_checkpoint(path, ranks, image_size)


def _from_checkpoint(path: Path, ranks: Ranks, image_size: int) -> LoadedEncoder:
    state = load_checkpoint(path, {"settings", "online", "step"}, ranks)
    settings = state["settings"]
    stem = stem_of(settings.get("stem", "imagenet"), settings["arch"], settings["image_size"])
    prefix = "backbone."
    tensors = {key.removeprefix(prefix): value for key, value in state["online"].items() if key.startswith(prefix)}
    backbone = _built(settings["arch"], image_size or settings["image_size"], stem, tensors)
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
    if arch and facts.get("arch", arch) != arch:
        raise ValueError(f"--arch {arch}: {path} says that it belongs to {facts['arch']}")
    arch = arch or facts.get("arch", "")
    if not arch:
        raise ValueError(f"{path} does not say which model it belongs to: give --arch")
    trained_on = {key: facts[key] for key in ("dataset",) if key in facts}
    if facts.get("image_size", "").isdecimal():
        trained_on["image_size"] = int(facts["image_size"])
    size = image_size or trained_on.get("image_size", 224)
    backbone = _built(arch, size, facts.get("stem", "imagenet"), tensors)
    classifier = getattr(backbone, "classifier_shapes", {})
    _load(backbone, {key: value for key, value in tensors.items() if key not in classifier}, path)
    return LoadedEncoder(backbone, arch, {"file": str(path), "metadata": facts}, trained_on, path.parent)


def _by_name(name: str, weights: str, image_size: int) -> LoadedEncoder:
    of_torchvision = name in torchvision.models.list_models(module=torchvision.models)
    known = ["pretrained"]
    if of_torchvision:
        known = list(torchvision.models.get_model_weights(name).__members__)
    elif name == "digits":
        known = []
    else:
        import timm  # the import takes seconds, and most runs do not need it

        if not timm.is_model(name):
            raise ValueError(f"no run, file or model {name!r}: give a run's folder, or a model of torchvision or timm")
    source = {"model": name, "weights": weights or "none: random initialization"}
    if not weights:
        return LoadedEncoder(_built(name, image_size), name, source)
    if weights not in known:
        raise ValueError(f"--weights: {name} has no weights {weights!r}, only {', '.join(known) or 'random ones'}")
    try:
        if of_torchvision:
            backbone = torchvision.models.get_model(name, weights=weights)
            remove_classifier(backbone, name)
        else:
            backbone = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # a failed download, a full disk: each library raises its own kinds
        raise ValueError(f"--weights {weights} of {name} could not be loaded: {error}") from error
    count_features(backbone, name, (3, image_size, image_size), in_training=False)
    return LoadedEncoder(backbone, name, source)


def _built(arch: str, image_size: int, stem: str = "imagenet", tensors: dict[str, Tensor] | None = None) -> nn.Module:
    """Return a randomly initialized backbone for as many image channels as these weights have."""
    channels = 3
    if arch == "digits":
        first = (tensors or {}).get("stem.0.weight")
        channels = 1 if first is None or first.ndim < 2 else first.shape[1]
    torch.manual_seed(0)
    return build_backbone(arch, (channels, image_size, image_size), stem)[0]


def _load(backbone: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load the weights; raise ValueError if names or shapes differ from the backbone's, or values are not finite."""
    wanted = {name: list(tensor.shape) for name, tensor in backbone.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if odd:
        there, here = found.get(odd[0], "missing"), wanted.get(odd[0], "missing")
        raise ValueError(
            f"the weights in {path} do not fit the model; number of tensors that differ: {len(odd)}, "
            f"such as {odd[0]}: {there} in the file, {here} in the model"
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"the weights in {path} cannot be used: {name} has values that are infinite or NaN")
    backbone.load_state_dict(tensors, strict=True)
