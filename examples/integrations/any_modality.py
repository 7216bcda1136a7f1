"""MSF on rows of a table, without images and without designed augmentations.

    pip install -e '.[examples]'                       (in a clone)
    python examples/integrations/any_modality.py

Methods like BYOL depend on strong augmentation. In the paper, MSF is better than others if both views are weakly
augmented ("w/w"), which the authors expect to help with other kinds of data. This script tests this on data without
known strong augmentations: the measured columns of scikit-learn's wine (178 × 13, 3 classes) and breast cancer (569 ×
30, 2 classes). It compares k = 5 with k = 1, which is BYOL, and needs msf_core, torch, scikit-learn and numpy.

Every setting was chosen once, before the first run, and is the same for both k:

- Views: noise of 0.1 standard deviations on every feature, and each feature missing (set to its mean) with probability
  0.1, for the target and the online view alike.
- Bank: half as many rows as the training set. (The paper's bank holds 10 to 80 % of the images.) If the bank were
  larger than the training set, a row's neighbors would be its own older embeddings, which is k = 1 again.
- EMA momentum 0.97, SGD momentum 0.9 and weight decay 1e-4, as for the digits in imagenet_train.py; batches of 32, the
  paper's learning rate 0.05 with cosine decay to 0, and 500 steps, which are at least 40 epochs.

All encoders are evaluated in the same way. The seed determines the split (70 % for training, stratified) and everything
random. The features are scaled by the mean and standard deviation of the training rows. Training uses only these rows
and no labels. Each test row then gets the label of the training row with the nearest backbone features (by cosine,
without projection): among all training rows ("1-NN"), or among 1 or 5 of each class, averaged over 20 draws that are
the same for all encoders. "untrained" is the same encoder with its initial weights, and with BatchNorm's statistics
from the training rows.
"""

import argparse
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import msf_core
from msf_core import EMATarget, MeanShiftLoss, MemoryBank, knn_classify

DATA = {"wine": load_wine, "breast cancer": load_breast_cancer}
NOISE, MISSING = 0.1, 0.1
STEPS, BATCH, LR, MOMENTUM = 500, 32, 0.05, 0.97
WIDTH, FEATURES, DIM = 128, 64, 32  # hidden layers, the encoder's features, the embedding
SHOTS, DRAWS = (1, 5), 20
COLUMNS = ("1-NN", *(f"{shots} label{'s' * (shots > 1)} per class" for shots in SHOTS))


def mlp(width_in: int, width_out: int) -> nn.Sequential:
    """One hidden layer with BatchNorm, as of the paper's projection and prediction heads."""
    return nn.Sequential(nn.Linear(width_in, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, width_out))


def weak_view(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows [B, F] with a little noise and with some features missing, that is, at their mean of 0."""
    noisy = rows + NOISE * torch.randn(rows.shape, generator=generator)
    return noisy * (torch.rand(rows.shape, generator=generator) >= MISSING)


def train(rows: Tensor, k: int, steps: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """Return the backbone at its first weights and after training on rows [n, F], without a label."""
    torch.manual_seed(seed)  # the first weights, the same for every k
    generator = torch.Generator().manual_seed(seed)  # batches and views, the same for every k
    backbone = nn.Sequential(mlp(rows.shape[1], FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU())
    encoder, predictor = nn.Sequential(backbone, mlp(FEATURES, DIM)), mlp(DIM, DIM)
    target = EMATarget(encoder, momentum=MOMENTUM)
    untrained = EMATarget(backbone).module  # a copy that nothing updates
    criterion = MeanShiftLoss(MemoryBank(size=len(rows) // 2, dim=DIM), k=k)
    parameters = [*encoder.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order: list[Tensor] = []
    for _ in range(steps):
        if not order:  # a new epoch, of whole batches
            order = list(rows[torch.randperm(len(rows), generator=generator)].split(BATCH))[: len(rows) // BATCH]
        batch = order.pop()
        u = target(weak_view(batch, generator))
        loss = criterion(predictor(encoder(weak_view(batch, generator))), u)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        target.update(encoder)
    return untrained, backbone


@torch.no_grad()
def features_of(backbone: nn.Module, fitted: Tensor, rows: Tensor) -> Tensor:
    """Return features [n, FEATURES], with BatchNorm's statistics from the rows that the encoder was fitted on."""
    update_bn([fitted], backbone)
    return backbone.eval()(rows)


def judge(known: Tensor, known_labels: Tensor, asked: Tensor, labels: Tensor, seed: int) -> list[float]:
    """Return the accuracies in percent of COLUMNS: by the nearest of all training rows, and of a few drawn ones."""

    def accuracy(chosen: Tensor) -> float:
        found = knn_classify(asked, known[chosen], known_labels[chosen], k=1)
        return 100 * (found == labels).float().mean().item()

    generator = torch.Generator().manual_seed(seed)
    scores = [accuracy(torch.arange(len(known_labels)))]
    for shots in SHOTS:
        draws = []
        for _ in range(DRAWS):
            shuffled = torch.randperm(len(known_labels), generator=generator)
            classes = [shuffled[known_labels[shuffled] == c][:shots] for c in known_labels.unique()]
            draws.append(accuracy(torch.cat(classes)))
        scores.append(mean(draws))
    return scores


def measure(name: str, seed: int, steps: int) -> dict[str, list[float]]:
    """Return the scores of every encoder on one split of one table."""
    data = DATA[name]()
    split = train_test_split(data.data, data.target, test_size=0.3, stratify=data.target, random_state=seed)
    scaler = StandardScaler().fit(split[0])
    rows, test_rows = (torch.from_numpy(scaler.transform(part)).float() for part in split[:2])
    labels, test_labels = (torch.from_numpy(part.astype(np.int64)) for part in split[2:])
    untrained, byol = train(rows, 1, steps, seed)
    _, msf = train(rows, 5, steps, seed)
    scores = {"raw features": judge(rows, labels, test_rows, test_labels, seed)}
    for encoder, backbone in (("untrained", untrained), ("k = 1 (BYOL)", byol), ("k = 5 (MSF)", msf)):
        known, asked = (features_of(backbone, rows, part) for part in (rows, test_rows))
        scores[encoder] = judge(known, labels, asked, test_labels, seed)
    return scores


def table(record: dict[str, Any]) -> str:
    """Lay a record out: mean ± deviation over the seeds in percent, and what k = 5 has over k = 1, seed by seed."""
    values = {name: np.array(scores) for name, scores in record["values"].items()}  # name -> [seeds, columns]
    values["k = 5 less k = 1"] = values["k = 5 (MSF)"] - values["k = 1 (BYOL)"]
    lines = [f"| {record['data']}, {record['seeds']} seeds | {' | '.join(COLUMNS)} |", "| --- " * 4 + "|"]
    for name, scores in values.items():
        sign = "+" if name == "k = 5 less k = 1" else ""
        cells = (f"{mean(column):{sign}.1f} ± {stdev(column):.1f}" for column in scores.T.tolist())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write the records if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0; at least 2")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jsonl", type=Path, help="write one record a table here")
    flags = parser.parse_args(arguments)
    if flags.seeds < 2 or flags.steps < 1:
        parser.error(f"--seeds must be at least 2 and --steps at least 1, got {flags.seeds} and {flags.steps}")
    if flags.jsonl:
        flags.jsonl.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for name in DATA:
        runs = [measure(name, seed, flags.steps) for seed in range(flags.seeds)]
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        versions |= {"scikit-learn": sklearn.__version__, "msf_core": msf_core.__version__}
        records.append(
            {
                "data": name,
                "seeds": flags.seeds,
                "steps": flags.steps,
                "columns": COLUMNS,
                "unit": "percent",
                "values": {encoder: [run[encoder] for run in runs] for encoder in runs[0]},
                "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
                "versions": versions,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )
        print(table(records[-1]), end="\n\n", flush=True)
    if flags.jsonl:
        flags.jsonl.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
