"""The report of knn_cost.py: Markdown from its records, and the paper's figures to stand beside them."""

from dataclasses import dataclass

from benchmarks.measure import Record


@dataclass(frozen=True)
class PaperRow:
    """One size of the paper's Table 1."""

    gflop_a_query: float
    percent_of_training_time: float


# Mean Shift for Self-Supervised Learning, ICCV 2021, arXiv 2105.07269, Table 1: D = 512, batch 256, k = 5.
PAPER_TABLE_1 = {1_024_000: PaperRow(1.05, 6.78), 128_000: PaperRow(0.13, 0.72)}
PAPER_DIM = 512
HEADER = (
    "bank",
    "what",
    "time a batch (20–80 %)",
    "GFLOP a query: formula",
    "counted",
    "GFLOP/s",
    "of the product rate",
    "extra memory",
    "bytes of the bank",
    "of a ResNet50 step",
    "recall",
)


def write_report(records: list[Record], unmeasured: dict[str, str]) -> str:
    """Return the whole report in Markdown. Every cell is measured here, from the paper, or says why it is not."""
    environment = records[0].environment
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in environment["versions"].items())
    parts = [
        "# Cost of the nearest neighbours",
        f"{environment['device']}, {environment['threads']} threads; {environment['date']}; {versions}.",
        _machine_lines(records, unmeasured),
        "## Table 1: the search of one batch",
        _search_table(records, unmeasured),
        _notes(records),
        "## One step: push, search, loss, backward",
        _step_table(records, unmeasured),
    ]
    return "\n\n".join(parts) + "\n"


def format_seconds(seconds: float) -> str:
    """Return seconds in the unit that reads best.

    >>> format_seconds(0.1715), format_seconds(2.5), format_seconds(44e-6)
    ('172 ms', '2.50 s', '44.0 µs')
    """
    unit, size = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)
    return f"{_three_digits(seconds / size)} {unit}"


def format_bytes(count: float) -> str:
    """Return bytes in MB or GB, of 1e6 and 1e9.

    >>> format_bytes(262144000), format_bytes(2097152000), format_bytes(4.3e6)
    ('262 MB', '2.10 GB', '4.30 MB')
    """
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{_three_digits(count / size)} {unit}"


def find_memory(records: list[Record], record: Record) -> Record | None:
    """Return the extra-memory record of what ``record`` has timed."""
    method, rows = record.parameters["method"], record.parameters["rows"]
    what = "authors" if method == "authors" else record.name
    for other in records:
        wanted = {"what": what, "method": method, "rows": rows}
        if other.name == "extra_memory" and wanted.items() <= other.parameters.items():
            return other
    return None


def method_label(method: str) -> str:
    """Return how a method is named in table and plot."""
    return "authors' step, with backward" if method == "authors" else f"msf_core, {method}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine_lines(records: list[Record], unmeasured: dict[str, str]) -> str:
    lines = []
    for record in records:
        if record.name == "matmul_rate":
            lines.append(
                f"- Matrix products: {record.derived['best']:.0f} GFLOP/s at best, {record.median:.0f} in the median "
                f"of {record.repeats} ({record.parameters['product']})."
            )
        if record.name == "resnet50_step":
            images, batch = record.parameters["images"], record.derived["batch"]
            scaled = (
                ""
                if images == batch
                else f", scaled to {format_seconds(record.derived['seconds_a_batch'])} for {batch}"
            )
            lines.append(
                f"- ResNet50 training step (online forward and backward, target forward; 224 x 224, "
                f"{record.parameters['arithmetic']}): {format_seconds(record.median)} "
                f"({_spread(record)}) measured with {images} images{scaled}."
            )
    if "resnet50_step" in unmeasured:
        lines.append(f"- ResNet50 training step: unmeasured, {unmeasured['resnet50_step']}.")
    return "\n".join(lines)


def _search_table(records: list[Record], unmeasured: dict[str, str]) -> str:
    timed = [record for record in records if record.name in ("search", "authors")]
    rows = []
    for size in dict.fromkeys(record.parameters["rows"] for record in timed):
        paper = PAPER_TABLE_1.get(size) if timed[0].parameters["dim"] == PAPER_DIM else None
        if paper is not None:
            share = f"{paper.percent_of_training_time:.2f} %"
            rows.append([f"{size:,}", "paper, Table 1", "—", f"{paper.gflop_a_query:.2f}", *["—"] * 5, share, "—"])
        rows += [_search_row(record, records, unmeasured) for record in timed if record.parameters["rows"] == size]
        for key, reason in unmeasured.items():
            method, _, at = key.rpartition(" ")
            if at == str(size) and not method.startswith("memory"):
                rows.append(
                    [f"{size:,}", method_label(method), f"unmeasured: {_cell(reason)}", *["—"] * (len(HEADER) - 3)]
                )
    return _table(HEADER, rows)


def _search_row(record: Record, records: list[Record], unmeasured: dict[str, str]) -> list[str]:
    derived = record.derived
    return [
        f"{record.parameters['rows']:,}",
        method_label(record.parameters["method"]),
        f"{format_seconds(record.median)} ({_spread(record)})",
        f"{derived['gflop_a_query_formula']:.3g}",
        f"{derived['gflop_a_query_counted']:.3g}",
        _three_digits(derived["gflop_a_second"]),
        f"{_three_digits(100 * derived['share_of_matmul_rate'])} %",
        _memory_cell(record, records, unmeasured),
        format_bytes(derived["bank_bytes"]),
        _share_cell(derived, unmeasured),
        "—" if record.recall is None else f"{record.recall:.3f}",
    ]


def _step_table(records: list[Record], unmeasured: dict[str, str]) -> str:
    steps = [record for record in records if record.name == "step"]
    theirs = next(record for record in steps if record.parameters["method"] == "authors")
    their_memory = find_memory(records, theirs)
    header = (
        "what",
        "time a step (20–80 %)",
        "faster than authors'",
        "extra memory",
        "less than authors'",
        "loss apart",
    )
    rows = []
    for record in steps:
        ours = find_memory(records, record)
        less = "—"
        if ours is not None and their_memory is not None and ours.median > 0:
            less = f"{their_memory.median / ours.median:.1f} x"
        rows.append(
            [
                method_label(record.parameters["method"]),
                f"{format_seconds(record.median)} ({_spread(record)})",
                f"{theirs.median / record.median:.1f} x",
                _memory_cell(record, records, unmeasured),
                less,
                f"{record.derived['most_apart_from_authors_loss']:.0e}",
            ]
        )
    p = theirs.parameters
    title = (
        f"N = {p['rows']:,}, D = {p['dim']}, batch {p['batch']}, k = {p['k']}, {p['dtype']} rows; "
        f"{theirs.repeats} runs of each in turns, ratios of medians."
    )
    return f"{title}\n\n{_table(header, rows)}"


def _notes(records: list[Record]) -> str:
    first = next(record for record in records if record.name == "search").parameters
    return (
        f"D = {first['dim']}, batch {first['batch']}, k = {first['k']}, {first['dtype']} rows. A multiply-add is two "
        "operations. The paper's share is of the training time on its machines; here of the ResNet50 step above. "
        "Recall: against float64 brute force on eight queries; the authors' step returns no neighbours to judge."
    )


def _memory_cell(record: Record, records: list[Record], unmeasured: dict[str, str]) -> str:
    found = find_memory(records, record)
    if found is not None:
        return format_bytes(found.median)
    key = f"memory {record.parameters['method']} {record.parameters['rows']}"
    return f"unmeasured: {_cell(unmeasured.get(key, 'not asked for'))}"


def _share_cell(derived: dict[str, float], unmeasured: dict[str, str]) -> str:
    if "share_of_resnet50_step" in derived:
        return f"{100 * derived['share_of_resnet50_step']:.2f} %"
    return f"unmeasured: {_cell(unmeasured.get('resnet50_step', 'no step'))}"


def _spread(record: Record) -> str:
    return f"{format_seconds(record.q20)}–{format_seconds(record.q80)}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
