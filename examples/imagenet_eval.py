"""Measure an encoder as the MSF paper does (sections 3.2 and 3.3); on ImageNet, with the paper's rows beside it.

Needs: pip install 'msf_core[examples]'

    python examples/imagenet_eval.py knn runs/digits                         a run of imagenet_train.py, on its data
    python examples/imagenet_eval.py linear runs/folder --data IMAGENET      the linear protocol
    python examples/imagenet_eval.py knn resnet50 --weights IMAGENET1K_V2 --data IMAGENET
    python examples/imagenet_eval.py transfer runs/folder --data SETS        the ten transfer sets that are in SETS
    python examples/imagenet_eval.py export runs/folder --to detectron2      the backbone for another library
    torchrun --nproc-per-node=8 examples/imagenet_eval.py linear runs/folder --data IMAGENET     on 8 GPUs

Each writes a JSON record of the whole protocol, beside the encoder or to --out.
"""

from evaluating import interrupts

if __name__ == "__main__":
    interrupts.leave_on_interrupt()

import argparse
import os
import sys
import time

from evaluating.arguments import PROGRAM, build_parser, check_flags
from evaluating.commands import COMMANDS, check_device
from evaluating.errors import Told, tell, telling_once
from evaluating.record import record_path, report
from training.bad_images import LIST, write_list
from training.flags import speaks
from training.ranks import joined, shared


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit status: 0, 2 after an error, 130 after Ctrl-C. Both are told in one line.

    Raises:
        SystemExit: by argparse, after --help or for a flag that it does not understand.
    """
    try:
        flags = build_parser((__doc__ or "").partition("\n\n")[0]).parse_args(arguments)
        evaluate(flags)
    except KeyboardInterrupt:
        if not int(os.environ.get("RANK", 0)):
            print(f"\n{PROGRAM}: {interrupts.LINE}", file=sys.stderr, flush=True)
        return interrupts.STATUS
    except Told:
        return 2
    except Exception as error:
        if speaks():
            tell(PROGRAM, error)
        return 2
    return 0


def evaluate(flags: argparse.Namespace) -> None:
    """Do what the flags say.

    Raises:
        Exception: whatever befalls this rank or another one, or `Told` if it has been printed.
    """
    started = time.perf_counter()
    check_flags(flags)
    check_device(flags.device)
    with joined(flags.device, flags.timeout) as (ranks, device), telling_once(PROGRAM, ranks):
        prepare, measure = COMMANDS[flags.command]
        with shared(ranks):
            if ranks.rank == 0:
                record_path(flags)  # before what takes long
            subject = prepare(flags, ranks, device)
            path = record_path(flags, subject) if ranks.rank == 0 else None
        protocol, row = measure(subject)
        found = subject.bad.of_all(ranks)
        if path is not None:
            if found:
                protocol["unreadable images"] = len(found)
                write_list(path.parent / LIST, found)
                print(f"{len(found):,} images could not be read: {path.parent / LIST} names them")
            report(subject, protocol, row, path, time.perf_counter() - started)


if __name__ == "__main__":
    interrupts.run_script(main)
