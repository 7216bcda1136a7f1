"""Exports a trained backbone in the layouts of other libraries, and verifies each file."""

import importlib.util
import json
import pickle
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from pipeline.models.backbones import export_backbone, save_tensors, small_stem
from pipeline.models.encoders import LoadedEncoder

Tensors = dict[str, Tensor]
TOLERANCE = 1e-4  # largest difference of features, relative to the largest feature


@dataclass(frozen=True)
class Exported:
    """A file or a folder of files, and how it was verified."""

    path: Path
    verified: str
    files: tuple[Path, ...] = ()  # the written files, after they were moved into place


@dataclass(frozen=True)
class Layout:
    """The form in which another library expects a backbone."""

    check: Callable[[LoadedEncoder], None]  # raises ValueError if the library has no such model
    write: Callable[[LoadedEncoder, Path, int], Exported]  # arguments: the folder, and the size of the images


def export_to(layout: str, encoder: LoadedEncoder, folder: Path, image_size: int) -> Exported:
    """Write the backbone in a layout of `LAYOUTS`, load it with that library if it is installed, and compare.

    The files are moved to their place only if all of this succeeds.

    Raises:
        ValueError: the library has no such model.
        RuntimeError: the written backbone gives different features, or its tensors differ from those of the library.
        OSError: the files could not be written.
    """
    LAYOUTS[layout].check(encoder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as draft:
        done = LAYOUTS[layout].write(encoder, Path(draft), image_size)
        drafts = sorted(done.path.iterdir()) if done.path.is_dir() else [done.path]
        finals = [folder / file.relative_to(draft) for file in drafts]
        for file, final in zip(drafts, finals, strict=True):
            final.parent.mkdir(exist_ok=True)
            file.replace(final)
    return Exported(folder / done.path.name, done.verified, tuple(finals))


def check_torchvision(encoder: LoadedEncoder) -> None:
    """Raise ValueError unless torchvision has the model."""
    import torchvision

    if encoder.arch not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"torchvision has no {encoder.arch!r}")


def to_torchvision(encoder: LoadedEncoder, folder: Path, image_size: int) -> Exported:
    """Write one file for ``load_state_dict(…, strict=True)``; the classifier is zeros."""
    import torchvision

    path = folder / f"{encoder.arch}-torchvision.safetensors"
    export_backbone(encoder.backbone, path, arch=encoder.arch, image_size=image_size)
    peer = torchvision.models.get_model(encoder.arch)
    small = has_small_stem(encoder)
    if small:
        small_stem(peer)
    peer.load_state_dict(load_file(path), strict=True)
    for name in getattr(encoder.backbone, "classifier_shapes", {}):
        if name.endswith("weight"):
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            peer.get_submodule(parent).set_submodule(child, nn.Identity())
    verified = compared(encoder.backbone, peer, image_size, "torchvision")
    return Exported(path, verified + (", into a model with the small stem: see the metadata" if small else ""))


def check_timm(encoder: LoadedEncoder) -> None:
    """Raise ValueError unless timm has a model of this name with these tensors."""
    import timm

    refuse_small_stem(encoder, "timm")
    if not timm.is_model(encoder.arch):
        raise ValueError(f"timm has no {encoder.arch!r}")
    peer = timm.create_model(encoder.arch, num_classes=0)
    try:
        check_list(tensors_of(encoder.backbone), {name: tuple(t.shape) for name, t in peer.state_dict().items()})
    except RuntimeError as error:
        raise ValueError(f"timm's {encoder.arch!r} has other tensors: {error}") from error


def to_timm(encoder: LoadedEncoder, folder: Path, image_size: int) -> Exported:
    """Write one file for ``timm.create_model(arch, num_classes=0, checkpoint_path=…)``."""
    import timm

    path = folder / f"{encoder.arch}-timm.safetensors"
    save_tensors(tensors_of(encoder.backbone), path, {"format": "pt", "arch": encoder.arch})
    peer = timm.create_model(encoder.arch, num_classes=0, checkpoint_path=str(path))
    return Exported(path, compared(encoder.backbone, peer, image_size, "timm"))


def check_transformers(encoder: LoadedEncoder) -> None:
    """Raise ValueError unless it is a ResNet of standard width without groups."""
    resnet_of(encoder, plain=True)


def to_transformers(encoder: LoadedEncoder, folder: Path, image_size: int) -> Exported:
    """Write a folder for ``transformers.ResNetModel.from_pretrained(…)``."""
    model = resnet_of(encoder, plain=True)
    path = folder / f"{encoder.arch}-transformers"
    path.mkdir(parents=True, exist_ok=True)
    tensors = {transformers_name(name): tensor for name, tensor in tensors_of(model).items()}
    blocks, widths, bottleneck = shape_of(model)
    config = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": widths,
        "depths": blocks,
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,  # the stride is in the 3×3 convolution, as in torchvision
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(tensors, path / "model.safetensors", {"format": "pt"})
    check_list(tensors, expected_transformers(blocks, widths, bottleneck))
    if importlib.util.find_spec("transformers") is None:
        return Exported(path, "by the list of its tensors; transformers is not installed")
    from transformers import ResNetModel

    peer = ResNetModel.from_pretrained(path)
    return Exported(
        path, compared(model, lambda images: peer.eval()(images).pooler_output.flatten(1), image_size, "transformers")
    )


def check_detectron2(encoder: LoadedEncoder) -> None:
    """Raise ValueError unless it is a ResNet."""
    resnet_of(encoder, plain=False)


def to_detectron2(encoder: LoadedEncoder, folder: Path, image_size: int) -> Exported:
    """Write a pickle of NumPy arrays for ``MODEL.WEIGHTS``, like detectron2's converter for torchvision.

    It needs ``MODEL.RESNETS.STRIDE_IN_1X1 False``, ``INPUT.FORMAT RGB``, and ImageNet's mean and standard deviation,
    times 255, as ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD``.
    """
    model = resnet_of(encoder, plain=False)
    path = folder / f"{encoder.arch}-detectron2.pkl"
    tensors = {
        detectron2_name(name): tensor
        for name, tensor in tensors_of(model).items()
        if not name.endswith("num_batches_tracked")
    }
    check_list(tensors, expected_detectron2(*shape_of(model), inner_width=inner_width(model)))
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    with path.open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "msf_core", "matching_heuristics": True}, file)
    return Exported(path, "by the list of its tensors")


LAYOUTS = {
    "torchvision": Layout(check_torchvision, to_torchvision),
    "timm": Layout(check_timm, to_timm),
    "transformers": Layout(check_transformers, to_transformers),
    "detectron2": Layout(check_detectron2, to_detectron2),
}


def tensors_of(backbone: nn.Module) -> Tensors:
    """Return the state as contiguous tensors on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}


@torch.no_grad()
def compared(backbone: nn.Module, peer: Callable[[Tensor], Tensor], image_size: int, library: str) -> str:
    """Compare the features of a few images; return the result in words.

    Raises:
        RuntimeError: the features differ.
    """
    images = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    if isinstance(peer, nn.Module):
        peer.eval()
    ours, theirs = backbone.cpu().eval()(images), peer(images)
    difference = float((ours - theirs).abs().max() / ours.abs().max()) if ours.shape == theirs.shape else float("inf")
    if not difference < TOLERANCE:
        raise RuntimeError(f"the exported features in {library} differ by {difference:.1e}, relative to the largest")
    return f"by equal features in {library} (relative difference {difference:.0e})"


def check_list(tensors: Tensors, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise RuntimeError unless the tensors have the expected names and shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise RuntimeError(f"{len(odd)} tensors are not as expected, the first is {odd[0]}")


def resnet_of(encoder: LoadedEncoder, *, plain: bool) -> ResNet:
    """Return the backbone as torchvision's ResNet.

    Raises:
        ValueError: it is not one; or, with ``plain``, it has groups or another width.
    """
    model = encoder.backbone
    if not isinstance(model, ResNet):
        raise ValueError(f"this layout is for torchvision's ResNets, got {encoder.arch!r}")
    refuse_small_stem(encoder, "this layout")
    if plain and (model.groups != 1 or model.base_width != 64):
        raise ValueError(f"transformers' ResNet supports neither the groups nor the width of {encoder.arch!r}")
    return model


def has_small_stem(encoder: LoadedEncoder) -> bool:
    """Return whether the backbone has the stem for small images."""
    return getattr(encoder.backbone, "stem_name", "imagenet") == "small"


def refuse_small_stem(encoder: LoadedEncoder, layout: str) -> None:
    """Raise ValueError for a backbone that the library would build with another stem."""
    if has_small_stem(encoder):
        raise ValueError(f"{layout} has no {encoder.arch} with the stem for small images: export --to torchvision")


def shape_of(model: ResNet) -> tuple[list[int], list[int], bool]:
    """Return the numbers of blocks and output channels of the four stages, and whether the blocks are bottlenecks."""
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    bottleneck = isinstance(model.layer1[0], Bottleneck)
    last = "conv3" if bottleneck else "conv2"
    widths = [getattr(stage[0], last).out_channels for stage in stages]
    return [len(stage) for stage in stages], widths, bottleneck


def inner_width(model: ResNet) -> tuple[int, int]:
    """Return the number of channels within the blocks of the first stage, and the number of groups."""
    return model.layer1[0].conv1.out_channels, model.groups


_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(\w+)")


def transformers_name(name: str) -> str:
    """Translate the name of a torchvision tensor."""
    if match := _BLOCK.fullmatch(name):
        stage, block, part, number, kind = match.groups()
        what = "convolution" if part == "conv" or (part == "downsample." and number == "0") else "normalization"
        where = "shortcut" if part == "downsample." else f"layer.{int(number) - 1}"
        return f"encoder.stages.{int(stage) - 1}.layers.{block}.{where}.{what}.{kind}"
    part, _, kind = name.partition(".")
    return f"embedder.embedder.{ {'conv1': 'convolution', 'bn1': 'normalization'}[part] }.{kind}"


def detectron2_name(name: str) -> str:
    """Translate the name of a torchvision tensor, as detectron2's tools/convert-torchvision-to-d2.py does."""
    if match := _BLOCK.fullmatch(name):
        stage, block, part, number, kind = match.groups()
        where = {"conv": f"conv{number}", "bn": f"conv{number}.norm"}.get(
            part, "shortcut" if number == "0" else "shortcut.norm"
        )
        return f"res{int(stage) + 1}.{block}.{where}.{kind}"
    part, _, kind = name.partition(".")
    return f"stem.{ {'conv1': 'conv1', 'bn1': 'conv1.norm'}[part] }.{kind}"


def expected_transformers(blocks: list[int], widths: list[int], bottleneck: bool) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of transformers' ResNetModel, as its source builds it."""
    expected: dict[str, tuple[int, ...]] = {}

    def add(prefix: str, outputs: int, inputs: int, side: int) -> None:
        expected[f"{prefix}.convolution.weight"] = (outputs, inputs, side, side)
        for name in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{prefix}.normalization.{name}"] = (outputs,)
        expected[f"{prefix}.normalization.num_batches_tracked"] = ()

    add("embedder.embedder", 64, 3, 7)
    inputs = 64
    for stage, (count, outputs) in enumerate(zip(blocks, widths, strict=True)):
        for block in range(count):
            prefix = f"encoder.stages.{stage}.layers.{block}"
            if bottleneck:
                inner = outputs // 4
                sizes = [(inner, inputs, 1), (inner, inner, 3), (outputs, inner, 1)]
            else:
                sizes = [(outputs, inputs, 3), (outputs, outputs, 3)]
            for place, size in enumerate(sizes):
                add(f"{prefix}.layer.{place}", *size)
            if block == 0 and (inputs != outputs or stage):
                add(f"{prefix}.shortcut", outputs, inputs, 1)
            inputs = outputs
    return expected


def expected_detectron2(
    blocks: list[int], widths: list[int], bottleneck: bool, inner_width: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of detectron2's ResNet, as its source builds it."""
    expected: dict[str, tuple[int, ...]] = {}

    def add(prefix: str, outputs: int, inputs: int, side: int) -> None:
        expected[f"{prefix}.weight"] = (outputs, inputs, side, side)
        for name in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{prefix}.norm.{name}"] = (outputs,)

    add("stem.conv1", 64, 3, 7)
    inputs, (inner, groups) = 64, inner_width
    for stage, (count, outputs) in enumerate(zip(blocks, widths, strict=True)):
        width = inner * 2**stage
        for block in range(count):
            prefix = f"res{stage + 2}.{block}"
            if bottleneck:
                sizes = [(width, inputs, 1), (width, width // groups, 3), (outputs, width, 1)]
            else:
                sizes = [(outputs, inputs, 3), (outputs, outputs, 3)]
            for place, size in enumerate(sizes):
                add(f"{prefix}.conv{place + 1}", *size)
            if block == 0 and (inputs != outputs or stage):
                add(f"{prefix}.shortcut", outputs, inputs, 1)
            inputs = outputs
    return expected
