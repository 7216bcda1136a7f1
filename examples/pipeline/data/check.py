"""Checks every image file before a run."""

from msf_core.distributed import Ranks
from pipeline.data.bad_images import BadImages
from pipeline.data.photos import Photos
from pipeline.data.scanning import printable
from pipeline.data.source import DataSource
from pipeline.running.progress import progress_bar
from pipeline.running.ranks import shared


def check_images(source: DataSource, ranks: Ranks) -> int:
    """Read all images, each rank its part, and print those that cannot be read; return 1 if there are any, else 0."""
    leads = ranks.rank == 0
    if not isinstance(source, Photos):
        if leads:
            print("these images are not read from image files: there is nothing to check")
        return 0
    if leads:
        print(*source.found.lines, sep="\n")  # they list the files that are left out, which are not checked
    summary = []
    status = 0
    for split in ("train", "val") if source.has_val else ("train",):
        bad, size = BadImages("skip"), source.size(split)
        with shared(ranks), progress_bar(f"reading {split}", "image", size, ranks) as bar:
            for count in source.check(split, list(range(ranks.rank, size, ranks.size)), bad):
                bar.update(min(count * ranks.size, size - bar.n))
        found = bad.of_all(ranks)
        if leads:
            for path, reason in sorted(found.items()):
                print(f"{printable(path)}: {reason}")
        summary.append(f"{len(found):,} of {size:,} images in {split}")
        status |= bool(found)
    if leads:
        print(f"{' and '.join(summary)} cannot be read")
    return status
