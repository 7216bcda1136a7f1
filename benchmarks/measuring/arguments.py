"""Command-line arguments that the benchmarks share."""

import argparse

import torch


def positive(text: str) -> int:
    """Convert an argument to an int of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def settle_device_and_folder(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set ``args.device`` if it is not given; reject an unavailable device, and an --out that is a file."""
    has_cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if has_cuda else "cpu")
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: that is a file, not a folder")
