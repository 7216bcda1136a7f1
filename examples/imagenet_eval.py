"""Evaluate an encoder by the protocols of the MSF paper (sections 3.2 and 3.3).

Needs, in a clone: pip install -e '.[examples]'

    python examples/imagenet_eval.py knn runs/digits                         a run of imagenet_train.py, on its data
    python examples/imagenet_eval.py linear runs/folder --data IMAGENET      the linear protocol
    python examples/imagenet_eval.py knn resnet50 --weights IMAGENET1K_V2 --data IMAGENET
    python examples/imagenet_eval.py transfer runs/folder --data SETS        the transfer data sets found in SETS
    python examples/imagenet_eval.py export runs/folder --to detectron2      the backbone for another library
    torchrun --nproc-per-node=8 examples/imagenet_eval.py linear runs/folder --data IMAGENET     on 8 GPUs

Each command prints a table. For ImageNet and the transfer sets, the table also shows the paper's results. Each command
writes a JSON record with every setting of the protocol, next to the encoder or to --out.
"""

from pipeline.running import interrupts

if __name__ == "__main__":
    interrupts.leave_on_interrupt()

import time
from contextlib import ExitStack

from pipeline.data.bad_images import LIST, write_list
from pipeline.evaluation.arguments import PROGRAM, build_parser, check_flags
from pipeline.evaluation.commands import COMMANDS
from pipeline.evaluation.record import record_path, report
from pipeline.running.ending import status_of, telling
from pipeline.running.ranks import joined, shared


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit status: 0, 2 after an error, 1 if a rank was lost, 130 after Ctrl-C.

    Args:
        arguments: the flags; None takes them from the command line.
    """
    return status_of(PROGRAM, lambda: evaluate(arguments))


def evaluate(arguments: list[str] | None) -> int:
    """Run the script with the given flags, and return 0.

    Raises:
        SystemExit: after --help, and after an error, which has been printed.
        LostRank: if a rank does not answer.
    """
    started = time.perf_counter()
    flags = build_parser((__doc__ or "").partition("\n\n")[0]).parse_args(arguments)
    with ExitStack() as stack:
        with telling(PROGRAM):
            check_flags(flags)
            ranks, device = stack.enter_context(joined(flags.device, flags.timeout))
        stack.enter_context(telling(PROGRAM, ranks))
        prepare, measure = COMMANDS[flags.command]
        with shared(ranks):
            if ranks.rank == 0:
                record_path(flags)  # fail early
            subject = prepare(flags, ranks, device)
            path = record_path(flags, subject) if ranks.rank == 0 else None
        protocol, row = measure(subject)
        found = subject.unreadable()
        if path is not None:
            if found:
                protocol["unreadable images"] = len(found)
                write_list(path.parent / LIST, found)
                print(f"{len(found):,} images could not be read: see {path.parent / LIST}")
            report(subject, protocol, row, path, time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    interrupts.run_script(main)
