"""Backbones by name, the paper's MLPs, and the export of a trained backbone."""

import contextlib
import copy
from difflib import get_close_matches
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

USUAL_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 384)  # usual image sizes, in pixels
SMALL_IMAGE = 64  # largest image size for which "auto" is the small stem, in pixels
_RESNETS = ("resnet", "resnext", "wide_resnet")


class DigitsResNet(nn.Module):
    """A residual network for small images, such as 16×16 digits: 96 features, 173 thousand parameters."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(
            BasicBlock(24, 24), BasicBlock(24, 48, 2, _shortcut(24, 48)), BasicBlock(48, 96, 2, _shortcut(48, 96))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, 96] of images [B, channels, H, W]."""
        maps: Tensor = self.blocks(self.stem(images))  # [B, 96, H/8, W/8]
        return maps.mean(dim=(2, 3))


class Encoder(nn.Module):
    """Backbone and projection MLP: images to embeddings [B, D]."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings [B, D]."""
        embeddings: Tensor = self.projector(self.backbone(images))
        return embeddings


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return the paper's projection and prediction head (section 3.1): linear, BatchNorm, ReLU, linear."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs)
    )


def build_backbone(arch: str, image_shape: tuple[int, int, int], stem: str = "imagenet") -> tuple[nn.Module, int]:
    """Return a randomly initialized backbone without its classifier, and its number of features.

    Args:
        arch: "digits", or the name of a classification model of torchvision or timm.
        image_shape: (channels, height, width) of its images; it is tried on a few images of this shape.
        stem: "imagenet" leaves the model as it is; "small" gives a ResNet of torchvision the `small_stem`.

    Raises:
        ValueError: there is no such model, it does not turn such images into one feature vector each, or a small stem
            is requested for a model other than torchvision's ResNets.
    """
    if arch == "digits":
        backbone: nn.Module = DigitsResNet(image_shape[0])
    elif arch in torchvision.models.list_models(module=torchvision.models):
        backbone = torchvision.models.get_model(arch, weights=None)
        remove_classifier(backbone, arch)
    else:
        backbone = _build_timm(arch)
    if stem == "small":
        if not isinstance(backbone, ResNet):
            raise ValueError(f"--stem small is for torchvision's ResNets, got {arch!r}")
        small_stem(backbone)
    backbone.stem_name = stem  # type: ignore[assignment]
    return backbone.train(), count_features(backbone, arch, image_shape)


def count_features(
    backbone: nn.Module, arch: str, image_shape: tuple[int, int, int], *, in_training: bool = True
) -> int:
    """Return the number of features per image, after trying the backbone on a few images.

    Args:
        backbone: maps images [B, C, H, W] to features [B, F].
        arch: its name, for the message.
        image_shape: (channels, height, width).
        in_training: try it in training mode too.

    Raises:
        ValueError: it does not turn such images into one feature vector each.
    """
    channels, height, width = image_shape
    outputs = []
    try:
        with torch.no_grad():
            outputs.append(copy.deepcopy(backbone).eval()(torch.zeros(2, *image_shape)))
            if in_training:
                outputs.append(copy.deepcopy(backbone).train()(torch.zeros(4, *image_shape)))
    except (RuntimeError, AssertionError, ValueError) as error:
        kind = "gray" if channels == 1 else "color"
        raise ValueError(
            f"--image-size {height}: {arch!r} does not take images of {width} x {height} pixels in {kind}: {error}"
        ) from error
    if any(not isinstance(output, Tensor) or output.ndim != 2 for output in outputs):
        raise ValueError(f"{arch!r} does not give one feature vector per image, so it cannot serve as a backbone")
    return int(outputs[0].shape[1])


def usual_size(arch: str, channels: int, stem: str = "imagenet") -> int:
    """Return the first of `USUAL_SIZES` that the model accepts, or 0 if it accepts none."""
    for size in USUAL_SIZES:
        with contextlib.suppress(ValueError):
            build_backbone(arch, (channels, size, size), stem)
            return size
    return 0


def stem_of(stem: str, arch: str, image_size: int) -> str:
    """Return the stem to use: "auto" means "small" for torchvision's ResNets on images of at most 64 pixels."""
    if stem != "auto":
        return stem
    resnet = arch in torchvision.models.list_models(module=torchvision.models) and arch.startswith(_RESNETS)
    return "small" if resnet and image_size <= SMALL_IMAGE else "imagenet"


def small_stem(model: ResNet) -> ResNet:
    """Give a ResNet the usual stem for small images (3×3 convolution of stride 1, no max-pool), and return it."""
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def export_backbone(backbone: nn.Module, path: Path, **facts: object) -> None:
    """Write the backbone as a safetensors file that loads with ``strict=True`` into the model of the same name.

    The file's metadata contains the ``facts``, and "stem", which is "small" after `small_stem`: the model that loads
    the file needs the same stem. torchvision's models have a classifier, which MSF does not train. It is written as
    zeros, and the metadata says so. timm's models must be created with ``num_classes=0``.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    classifier: dict[str, list[int]] = getattr(backbone, "classifier_shapes", {})
    tensors |= {name: torch.zeros(shape) for name, shape in classifier.items()}
    metadata = {
        "stem": str(getattr(backbone, "stem_name", "imagenet")),
        "classifier": f"untrained, zeros: {', '.join(classifier)}" if classifier else "none",
        **{name: str(fact) for name, fact in facts.items()},
    }
    save_tensors(tensors, path, metadata)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file completely or not at all, with the permissions of any new file.

    The file that safetensors' own `save_file` writes can be read only by its owner.

    Raises:
        OSError: the file could not be written; an earlier file is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(save(tensors, metadata))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _build_timm(arch: str) -> nn.Module:
    import timm  # the import takes seconds, and most runs do not need it

    known = timm.list_models()
    if arch not in known:
        near = get_close_matches(arch, ["digits", *torchvision.models.list_models(module=torchvision.models), *known])
        hint = f": did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
        raise ValueError(f"no model {arch!r} in torchvision or timm{hint}")
    return timm.create_model(arch, pretrained=False, num_classes=0)


def remove_classifier(model: nn.Module, arch: str) -> None:
    """Remove the last linear layer, and keep the shapes of its tensors as ``classifier_shapes``."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{arch!r} has no linear classifier to remove, so it cannot serve as a backbone")
    parent, _, child = linear[-1].rpartition(".")
    classifier = model.get_submodule(linear[-1])
    shapes = {f"{linear[-1]}.{name}": list(tensor.shape) for name, tensor in classifier.named_parameters()}
    model.get_submodule(parent).set_submodule(child, nn.Identity())
    model.classifier_shapes = shapes  # type: ignore[assignment]


def _shortcut(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
