"""The paper's results to print beside ours (Tables 1, 2 left and 3): ResNet50 trained on ImageNet, in percent."""

from typing import Any

Rows = dict[str, dict[str, float]]

TABLE_2: Rows = {
    "random init": {"linear": 5.1, "nn1": 1.5, "nn20": 2.0},
    "MoCo v2, 200 epochs": {"linear": 67.5, "nn1": 50.9, "nn20": 54.3},
    "BYOL-asym, 200 epochs": {"linear": 69.3, "nn1": 55.0, "nn20": 59.2},
    "MSF, 200 epochs": {"linear": 71.4, "nn1": 60.6, "nn20": 64.0},
    "MSF w/w, 200 epochs": {"linear": 66.3, "nn1": 54.6, "nn20": 57.4},
    "MSF w/s, 200 epochs": {"linear": 72.4, "nn1": 62.0, "nn20": 64.9},
    "MSF w/s (128K), 200 epochs": {"linear": 72.1, "nn1": 62.0, "nn20": 65.2},
    "supervised": {"linear": 76.2, "nn1": 71.4, "nn20": 74.8},
}
# top-1 and top-5 with 1 % and with 10 % of the labels
TABLE_3: Rows = {
    "MoCo v2, 200 epochs": {"top1 1%": 43.6, "top1 10%": 58.4, "top5 1%": 71.2, "top5 10%": 82.9},
    "BYOL-asym, 200 epochs": {"top1 1%": 47.9, "top1 10%": 61.3, "top5 1%": 74.6, "top5 10%": 84.7},
    "ISD, 200 epochs": {"top1 1%": 53.4, "top1 10%": 63.0, "top5 1%": 78.8, "top5 10%": 85.9},
    "MSF, 200 epochs": {"top1 1%": 53.5, "top1 10%": 65.2, "top5 1%": 78.1, "top5 10%": 86.4},
    "MSF w/s, 200 epochs": {"top1 1%": 55.5, "top1 10%": 66.5, "top5 1%": 79.9, "top5 10%": 87.6},
}
# mean over the ten transfer sets (Table 1)
TRANSFER: Rows = {"MSF w/s": {"mean": 75.5}, "MSF w/s (128K)": {"mean": 76.3}}


HEADINGS = {"nn1": "1-NN", "nn20": "20-NN", "mean": "mean of all ten"}
CLASSES, TEST_IMAGES = 1000, 50_000  # on ImageNet


def comparable(record: dict[str, Any]) -> Rows:
    """Return the paper's rows that a record can be compared with, if it is on ImageNet or all ten transfer sets."""
    command, protocol, data = record["command"], record["protocol"], record.get("data", {})
    if command == "transfer":
        return TRANSFER if "mean" in record["results"] else {}
    if (data.get("dataset"), data.get("classes"), data.get("test_images")) != ("folder", CLASSES, TEST_IMAGES):
        return {}
    if command == "linear" and "solver" in protocol:  # logistic regression; the paper trains by SGD
        return {}
    return {"knn": TABLE_2, "linear": TABLE_2, "few-labels": TABLE_3}.get(command, {})


def table(rows: Rows, columns: list[str]) -> str:
    """Return rows of percentages as a Markdown table; rows without any of the columns are left out."""
    rows = {name: row for name, row in rows.items() if row.keys() & set(columns)}
    width = max(map(len, rows))
    headings = [f"{HEADINGS.get(key, key):>5}" for key in columns]
    lines = [f"| {'top-1 %':{width}} | " + " | ".join(headings) + " |", "|" + " --- |" * (len(columns) + 1)]
    for name, row in rows.items():
        cells = [f"{row[key]:.1f}" if key in row else "–" for key in columns]
        padded = [f"{cell:>{len(heading)}}" for cell, heading in zip(cells, headings, strict=True)]
        lines.append(f"| {name:{width}} | " + " | ".join(padded) + " |")
    return "\n".join(lines)
