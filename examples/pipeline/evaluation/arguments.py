"""The flags of examples/imagenet_eval.py, and the checks of their combinations."""

import argparse
from collections.abc import Callable

from pipeline.data.bad_images import ACTIONS
from pipeline.data.opening import DATASETS
from pipeline.evaluation.commands import COMMANDS
from pipeline.evaluation.transfer import SETS, STRENGTHS
from pipeline.models.export import LAYOUTS
from pipeline.running.flags import Parser, finite, whole

PROGRAM = "imagenet_eval.py"
EXAMPLES = {
    "knn": """
  python examples/imagenet_eval.py knn runs/digits                 a run of imagenet_train.py, on its own images
  python examples/imagenet_eval.py knn resnet50 --weights IMAGENET1K_V2 --data IMAGENET""",
    "linear": """
  python examples/imagenet_eval.py linear runs/folder --data IMAGENET --sweep 0.1 1
  torchrun --nproc-per-node=8 examples/imagenet_eval.py linear runs/folder --data IMAGENET         on 8 GPUs""",
    "few-labels": """
  python examples/imagenet_eval.py few-labels runs/folder --percent 1 10
  python examples/imagenet_eval.py few-labels runs/folder --list 1percent.txt
  python examples/imagenet_eval.py few-labels runs/digits --classifier nn --per-class 1 10""",
    "transfer": """
  python examples/imagenet_eval.py transfer runs/folder --data SETS                 the data sets that are in SETS
  python examples/imagenet_eval.py transfer runs/folder --data SETS --sets DTD CIFAR10 --download""",
    "export": """
  python examples/imagenet_eval.py export runs/folder --to transformers detectron2 --folder weights""",
}
SGD = {"lr": 0.01, "sweep": [], "epochs": 40, "cache": False}  # defaults of the flags that only SGD uses
_MOST_SEED = 2**63 - 1


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows the defaults that are numbers or nonempty strings."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_number = isinstance(action.default, int | float) and not isinstance(action.default, bool)
        if is_number or (isinstance(action.default, str) and action.default):
            return super()._get_help_string(action)
        return action.help


def build_parser(description: str) -> Parser:
    """Return the parser of the flags."""
    parser = Parser(PROGRAM, description=description, formatter_class=Help, epilog=_examples(EXAMPLES.values()))
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND", description="COMMAND --help lists its flags"
    )
    for name, (_, function) in COMMANDS.items():
        summary = function.__doc__ or ""
        sub = commands.add_parser(
            name, help=summary, description=summary, formatter_class=Help, epilog=_examples([EXAMPLES[name]])
        )
        _add_encoder(sub)
        if name != "export":
            _add_images(sub, name)
        _ADD[name](sub.add_argument_group("measurement" if name != "export" else "output"))
        _add_machine(sub, name)
    return parser


def check_flags(flags: argparse.Namespace) -> None:
    """Raise ValueError if flags do not fit together."""
    given = [f"--{name}" for name, default in SGD.items() if getattr(flags, name, default) != default]
    if flags.command == "linear" and flags.solver == "logistic" and given:
        raise ValueError(f"--solver logistic cannot use {', '.join(given)}, which belong to --solver sgd")
    if flags.command == "few-labels" and flags.classifier == "nn":
        if not flags.per_class:
            raise ValueError("--classifier nn needs --per-class")
        if given:
            raise ValueError(f"--classifier nn cannot use {', '.join(given)}, which belong to --classifier linear")
    if flags.command == "transfer" and not flags.data:
        raise ValueError("transfer needs --data DIR, the folder with the data sets")


def _examples(texts: object) -> str:
    return "examples:" + "".join(texts)  # type: ignore[arg-type]


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("encoder").add_argument
    add("encoder", help="a run's folder, checkpoint.pt or backbone.safetensors, or a torchvision or timm model name")
    add("--arch", default="", help="architecture of a safetensors file that does not contain it")
    add(
        "--weights",
        default="",
        help='weights of a named model, such as IMAGENET1K_V2 (timm: "pretrained"); default: random',
    )
    add("--image-size", type=whole(8, 4096), metavar="PIXELS", help="default: that of the run, or 224")


def _add_images(parser: argparse.ArgumentParser, command: str) -> None:
    add = parser.add_argument_group("images").add_argument
    if command == "transfer":
        add("--data", default="", metavar="DIR", help="folder of the data sets")
    else:
        add("--dataset", choices=DATASETS, default="", help="default: that of the run, or folder")
        add("--data", default="", metavar="DIR", help="folder with train/ and val/, each with one folder per class")
        add(
            "--val-split",
            type=finite(above=0, below=1),
            metavar="FRACTION",
            help="fraction of --data to hold out for testing, if it has no val/; default: that of the run, or none",
        )
    add("--on-bad-image", choices=ACTIONS, default="error", help="skip: evaluate without images that cannot be read")
    add("--batch-size", type=whole(), default=256, metavar="N", help="images per step over all ranks, also in training")
    add("--seed", type=whole(0, _MOST_SEED), default=0, metavar="N", help="seed of the order, views and random subsets")


def _add_machine(parser: argparse.ArgumentParser, command: str) -> None:
    add = parser.add_argument_group("machine and record").add_argument
    if command != "export":
        help_ = "worker processes per rank that read images; -1: the machine's cores divided by its ranks"
        add("--workers", type=whole(-1, 4096), default=-1, metavar="N", help=help_)
    add("--device", default="auto", help="auto: the GPU if there is one")
    add("--timeout", type=whole(), default=1800, metavar="SECONDS", help="how long ranks wait for each other")
    out = f"file of the record; default: eval_{command}.json next to the encoder, or ./eval_{command}_MODEL.json"
    add("--out", default="", metavar="FILE", help=out)


def _add_knn(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="dtype of the stored features"
    )


def _add_sgd(group: argparse._ArgumentGroup) -> None:
    rate = finite(above=0)
    group.add_argument("--lr", type=rate, default=SGD["lr"], metavar="RATE", help="learning rate")
    group.add_argument("--sweep", type=rate, nargs="+", default=SGD["sweep"], metavar="RATE", help="more rates to try")
    group.add_argument("--epochs", type=whole(), default=SGD["epochs"], metavar="N", help="epochs of training")
    group.add_argument("--cache", action="store_true", help="extract features once, without augmentation")


def _add_linear(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--solver", choices=("sgd", "logistic"), default="sgd", help="the paper's SGD, or logistic regression"
    )
    _add_sgd(group)


def _add_few_labels(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--percent",
        type=finite(above=0, most=100),
        nargs="+",
        default=[1.0, 10.0],
        metavar="P",
        help="percent of each class's labels; default: 1 and 10",
    )
    which.add_argument(
        "--per-class", type=whole(), nargs="+", default=[], metavar="N", help="number of labels per class instead"
    )
    which.add_argument(
        "--list",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files that list images instead, one per line: class/image.jpg, or only the name as in SimCLR's files",
    )
    group.add_argument(
        "--classifier", choices=("linear", "nn"), default="linear", help="nn: 1-NN, mean of 10 draws, with --per-class"
    )
    _add_sgd(group)


def _add_transfer(group: argparse._ArgumentGroup) -> None:
    names = [one.name for one in SETS]
    group.add_argument(
        "--sets", nargs="+", choices=names, default=names, metavar="SET", help=f"{', '.join(names)}; default: all"
    )
    strengths = ", ".join(f"{strength:g}" for strength in STRENGTHS)
    group.add_argument(
        "--strengths",
        type=finite(above=0),
        nargs="+",
        default=list(STRENGTHS),
        metavar="C",
        help=f"values of C, the inverse regularization strength, to choose from; default: {strengths}",
    )
    group.add_argument("--download", action="store_true", help="let torchvision download missing data sets")


def _add_export(group: argparse._ArgumentGroup) -> None:
    names = list(LAYOUTS)
    group.add_argument(
        "--to",
        nargs="+",
        choices=names,
        default=[],
        metavar="LIBRARY",
        help=f"{', '.join(names)}; default: all that have this model",
    )
    group.add_argument("--folder", default="", metavar="DIR", help="output folder; default: the encoder's, or .")


_ADD: dict[str, Callable[[argparse._ArgumentGroup], None]] = {
    "knn": _add_knn,
    "linear": _add_linear,
    "few-labels": _add_few_labels,
    "transfer": _add_transfer,
    "export": _add_export,
}
