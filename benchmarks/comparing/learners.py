"""The methods that `methods.py` compares, by name, in the order of the table."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.comparing.core import BYOL, CO2, ISD, MSF, BYOLAsym, DeepCluster, Method
from benchmarks.comparing.lightly_methods import DINO, NNCLR, BarlowTwins, MoCo, SimCLR, SimSiam, SwAV, VICReg
from benchmarks.comparing.recipe import Recipe


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    title: str
    build: Callable[[nn.Module, int, Recipe], Method]
    augmentation: str  # views of the target / of the online encoder


UNTRAINED, RAW_PIXELS = "untrained", "raw-pixels"
BASELINES = (UNTRAINED, RAW_PIXELS)  # rows that are not trained
METHODS = {
    "msf": Entry("MSF w/s", MSF, "w/s"),
    "msf-ss": Entry("MSF", MSF, "s/s"),
    "msf-ww": Entry("MSF w/w", MSF, "w/w"),
    "byol-asym": Entry("BYOL-asym", BYOLAsym, "s/s"),
    "byol-asym-ws": Entry("BYOL-asym w/s", BYOLAsym, "w/s"),
    "byol": Entry("BYOL", BYOL, "s/s"),
    "isd": Entry("ISD", ISD, "w/s"),
    "co2": Entry("CO2", CO2, "s/s"),
    "moco-v2": Entry("MoCo v2", MoCo, "s/s"),
    "simclr": Entry("SimCLR", SimCLR, "s/s"),
    "nnclr": Entry("NNCLR", NNCLR, "s/s"),
    "simsiam": Entry("SimSiam", SimSiam, "s/s"),
    "swav": Entry("SwAV", SwAV, "s/s"),
    "deepcluster-v2": Entry("DeepCluster-v2", DeepCluster, "s/s"),
    "barlow-twins": Entry("Barlow Twins", BarlowTwins, "s/s"),
    "vicreg": Entry("VICReg", VICReg, "s/s"),
    "dino": Entry("DINO", DINO, "s/s"),
    UNTRAINED: Entry("untrained", MSF, "w/s"),
    RAW_PIXELS: Entry("raw pixels", MSF, "w/s"),
}
