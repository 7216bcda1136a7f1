"""Measure an encoder as the MSF paper does (sections 3.2 and 3.3), and set the paper's rows beside it.

Needs: pip install 'msf_core[examples]'

    python examples/imagenet_eval.py knn runs/digits                         a run of imagenet_train.py, on its data
    python examples/imagenet_eval.py linear runs/folder --data IMAGENET      the linear protocol
    python examples/imagenet_eval.py knn resnet50 --weights IMAGENET1K_V2 --data IMAGENET
    python examples/imagenet_eval.py transfer runs/folder --data SETS        the ten transfer sets that are in SETS
    python examples/imagenet_eval.py export runs/folder --to detectron2      the backbone for another library
    torchrun --nproc-per-node=8 examples/imagenet_eval.py linear runs/folder --data IMAGENET     on 8 GPUs

Each writes a JSON record of the whole protocol, beside the encoder or to --out.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from evaluating.commands import COMMANDS, Evaluation, Subject
from evaluating.export import LAYOUTS
from evaluating.paper import TABLE_2, TABLE_3, TRANSFER, Rows, beside
from evaluating.transfer import SETS, STRENGTHS
from training.bad_images import ACTIONS, LIST, write_list
from training.ranks import joined, shared
from training.report import environment
from training.settings import DATASETS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, function) in COMMANDS.items():
        add_common(commands.add_parser(name, help=function.__doc__, formatter_class=parser.formatter_class))
    commands.choices["knn"].add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the features that are kept"
    )
    for name in ("linear", "few-labels"):
        sub = commands.choices[name]
        sub.add_argument("--lr", type=positive, default=0.01, help="learning rate")
        sub.add_argument("--sweep", type=positive, nargs="*", default=[], help="learning rates to try too")
        sub.add_argument("--epochs", type=whole, default=40, help="to train for")
        sub.add_argument("--cache", action="store_true", help="extract features once, without augmentation")
    commands.choices["linear"].add_argument(
        "--solver", choices=("sgd", "logistic"), default="sgd", help="the paper's SGD, or logistic regression"
    )
    sub = commands.choices["few-labels"]
    sub.add_argument("--percent", type=positive, nargs="+", default=[1.0, 10.0], help="of each class's labels")
    sub.add_argument("--per-class", type=whole, nargs="+", default=[], help="labels of each class instead")
    sub.add_argument("--list", nargs="+", default=[], help="files that list images instead, as SimCLR's 1percent.txt")
    sub.add_argument("--classifier", choices=("linear", "nn"), default="linear", help="nn: 1-NN, mean of 10 draws")
    sub = commands.choices["transfer"]
    names = [one.name for one in SETS]
    sub.add_argument("--sets", nargs="+", choices=names, default=names, metavar="SET", help=", ".join(names))
    sub.add_argument("--strengths", type=positive, nargs="+", default=list(STRENGTHS), help="C to choose from")
    sub.add_argument("--download", action="store_true", help="let torchvision download what is not there")
    sub = commands.choices["export"]
    sub.add_argument("--to", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="libraries")
    sub.add_argument("--folder", default="", help="where to; default: beside the encoder, or here")
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all commands have."""
    add = parser.add_argument
    add("encoder", help="a run's folder, checkpoint.pt, backbone.safetensors, or a model of torchvision or timm")
    add("--arch", default="", help="of a safetensors file that does not say")
    add("--weights", default="", help='of a model by name, as IMAGENET1K_V2 (timm: "pretrained"); without: random')
    add("--dataset", choices=DATASETS, default="", help="default: the run's, or folder")
    add("--data", default="", help="ImageFolder tree with train/ and val/, or the folder of the transfer sets")
    add("--val-split", type=float, help="fraction of --data to test on, if it has no val/; default: the run's, or 0")
    add("--image-size", type=whole, default=0, help="default: the run's, or 224")
    add("--batch-size", type=whole, default=256, help="images at a time over all ranks, in training too")
    add("--workers", type=int, default=-1, help="processes that read images, a rank; -1: the cores divided by ranks")
    add("--on-bad-image", choices=ACTIONS, default="error", help="skip: evaluate without images that cannot be read")
    add("--device", default="auto", help="auto: the GPU if there is one")
    add("--seed", type=int, default=0, help="of order, views and draws")
    add("--timeout", type=whole, default=1800, help="seconds that ranks wait for one another")
    add("--out", default="", help="file of the record; default: eval_COMMAND.json beside the encoder, or here")


def whole(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive(text: str) -> float:
    """Parse a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = build_parser()
    flags = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        with joined(flags.device, flags.timeout) as (ranks, device):
            with shared(ranks):
                prepare, measure = COMMANDS[flags.command]
                if flags.command == "transfer" and not flags.data:
                    raise ValueError("transfer needs --data DIR, the folder with the data sets")
                subject = prepare(flags, ranks, device)
                path = Path(flags.out) if flags.out else default_record(subject)
                path.parent.mkdir(parents=True, exist_ok=True)
            protocol, row = measure(subject)
            found = subject.bad.of_all(ranks)
            if ranks.rank == 0:
                if found:
                    protocol["unreadable images"] = len(found)
                    write_list(path.parent / LIST, found)
                    print(f"{len(found):,} images could not be read: {path.parent / LIST} names them")
                report(subject, protocol, row, path, time.perf_counter() - started)
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        if int(os.environ.get("RANK", 0)) and str(error).startswith("rank "):
            return 2  # the rank that it befell says it, and so does rank 0
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


def default_record(subject: Subject) -> Path:
    """Return where the record goes."""
    name = f"eval_{subject.flags.command}"
    if subject.encoder.folder is not None:
        return subject.encoder.folder / f"{name}.json"
    return Path(f"{name}_{subject.encoder.arch}.json")


def report(subject: Subject, protocol: dict[str, Any], row: dict[str, float], path: Path, seconds: float) -> None:
    """Print the table and write the record."""
    flags = subject.flags
    record = {"command": flags.command, "encoder": {"arch": subject.encoder.arch, **subject.encoder.source}}
    where = "transfer sets"
    if isinstance(subject, Evaluation):
        where = subject.dataset
        record["data"] = {
            "dataset": subject.dataset,
            "path": "" if subject.dataset == "digits" else subject.data,
            "training_images": subject.source.size("train"),
            "test_images": subject.source.size("val"),
            "classes": subject.classes,
        }
    record |= {
        "protocol": protocol,
        "results": row,
        "ranks": subject.ranks.size,
        "seconds": round(seconds, 1),
        **environment(subject.device),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    if row:
        percent: Rows = {f"{Path(flags.encoder).name} on {where}": {name: 100 * value for name, value in row.items()}}
        paper, headings = BESIDE[flags.command]
        print("\n" + beside(percent, paper, {name: headings.get(name, name) for name in [*row, *headings]}))
    for name, why in protocol.get("not on disk", {}).items():
        print(f"not measured: {name}: {why}")
    print(f"\n{path}: the record, with the whole protocol")


BESIDE: dict[str, tuple[Rows, dict[str, str]]] = {
    "knn": (TABLE_2, {"nn1": "1-NN", "nn20": "20-NN"}),
    "linear": (TABLE_2, {"linear": "linear"}),
    "few-labels": (TABLE_3, {}),
    "transfer": (TRANSFER, {"mean": "mean of all ten"}),
}


if __name__ == "__main__":
    sys.exit(main())
