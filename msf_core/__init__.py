"""Mean Shift for self-supervised learning (MSF, ICCV 2021), as parts that plug into any PyTorch training loop."""

from msf_core import schedules
from msf_core.ema import EMATarget
from msf_core.loss import MeanShiftLoss, mean_shift_loss
from msf_core.memory_bank import MemoryBank
from msf_core.metrics import effective_rank, embedding_spread, knn_classify, neighbor_purity
from msf_core.rows import Neighbors
from msf_core.search import available_backends

__all__ = [
    "EMATarget",
    "MeanShiftLoss",
    "MemoryBank",
    "Neighbors",
    "available_backends",
    "effective_rank",
    "embedding_spread",
    "knn_classify",
    "mean_shift_loss",
    "neighbor_purity",
    "schedules",
]
__version__ = "0.3.0"
