"""The report of knn_cost.py in Markdown: tables of its records next to the paper's figures."""

from dataclasses import dataclass

from benchmarks.measuring.measure import Record, in_words


@dataclass(frozen=True)
class PaperRow:
    """One size of the paper's Table 1."""

    gflop_a_query: float
    percent_of_training_time: float


# Mean Shift for Self-Supervised Learning, ICCV 2021, arXiv 2105.07269, Table 1: D = 512, batch 256, k = 5.
PAPER_TABLE_1 = {1_024_000: PaperRow(1.05, 6.78), 128_000: PaperRow(0.13, 0.72)}
PAPER_DIM = 512
SIZES = ("rows", "dim", "batch", "k")
HEADER = (
    "N",
    "D",
    "batch",
    "k",
    "what",
    "time a batch (20–80 %)",
    "GFLOP a query: formula",
    "counted",
    "GFLOP/s",
    "of the product ceiling",
    "of the memory ceiling",
    "times the floor",
    "extra memory",
    "bytes of the bank",
    "of a ResNet50 step",
    "recall",
)


def write_report(records: list[Record], unmeasured: dict[str, str]) -> str:
    """Return the whole report in Markdown. A cell has a measured value, the paper's, or the reason why it has none."""
    parts = [
        "# Cost of the nearest neighbors",
        in_words(records[0].environment),
        _machine_lines(records, unmeasured),
        "## Searches at a glance",
        _glance(records),
        "## One step: push, search, loss, backward",
        _step_table(records, unmeasured),
        "## Searches in detail",
        _notes(records),
        _search_table(records, unmeasured),
        "## Not measured in this run",
        _unmeasured_lines(unmeasured),
    ]
    return "\n\n".join(parts) + "\n"


def format_seconds(seconds: float) -> str:
    """Return seconds in a suitable unit.

    >>> format_seconds(0.1715), format_seconds(2.5), format_seconds(44e-6)
    ('172 ms', '2.50 s', '44.0 µs')
    """
    unit, size = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)
    return f"{_three_digits(seconds / size)} {unit}"


def format_spread(record: Record) -> str:
    """Return the median of a record of seconds, with the 20 % and 80 % quantiles."""
    return f"{format_seconds(record.median)} ({format_seconds(record.q20)}–{format_seconds(record.q80)})"


def format_bytes(count: float) -> str:
    """Return bytes in MB (1e6) or GB (1e9).

    >>> format_bytes(262144000), format_bytes(2097152000), format_bytes(4.3e6)
    ('262 MB', '2.10 GB', '4.30 MB')
    """
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{_three_digits(count / size)} {unit}"


def host_hidden(record: Record) -> str:
    """Return the median of the GPU's time with the host hidden, or "—" if there is none."""
    hidden = record.derived.get("host_hidden")
    return "—" if hidden is None else format_seconds(hidden["median"])


def find_memory(records: list[Record], record: Record) -> Record | None:
    """Return the extra-memory record of the call that ``record`` timed."""
    what = "authors" if record.parameters["method"] == "authors" else record.name
    wanted = record.parameters | {"what": what}
    for other in records:
        if other.name == "extra_memory" and wanted.items() <= other.parameters.items():
            return other
    return None


def is_ours(record: Record) -> bool:
    """Return whether a record is of msf_core."""
    return record.name == "search" or (record.name == "step" and "loss" in record.derived and not is_authors(record))


def is_authors(record: Record) -> bool:
    """Return whether a record is of the authors' formulation."""
    return bool(record.parameters["method"] == "authors")


def label(record: Record) -> str:
    """Return the name of a method in tables and plots."""
    method = record.parameters["method"]
    return (
        "authors' step, with backward" if is_authors(record) else f"msf_core, {method}" if is_ours(record) else method
    )


def sizes_of(record: Record) -> tuple[int, ...]:
    """Return (N, D, batch, k)."""
    return tuple(record.parameters[name] for name in SIZES)


def timed_searches(records: list[Record]) -> dict[tuple[int, ...], list[Record]]:
    """Return the searches and the authors' steps, grouped by their sizes."""
    groups: dict[tuple[int, ...], list[Record]] = {}
    for record in records:
        if record.name in ("search", "peer", "authors"):
            groups.setdefault(sizes_of(record), []).append(record)
    return groups


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _timed_table(header: tuple[str, ...], rows: list[list[str]], hidden: list[str]) -> str:
    """Return a table; if any row has a GPU time with the host hidden, add a column for it after the time as called."""
    if all(cell == "—" for cell in hidden):
        return _table(header, rows)
    at = next(place for place, title in enumerate(header) if title.startswith("time"))
    rows = [[*row[: at + 1], cell, *row[at + 1 :]] for row, cell in zip(rows, hidden, strict=True)]
    return _table((*header[:at], f"{header[at]}, as called", "GPU time, host hidden", *header[at + 1 :]), rows)


def _machine_lines(records: list[Record], unmeasured: dict[str, str]) -> str:
    lines = []
    for record in records:
        if record.name in ("matmul_rate", "memory_rate"):
            what = record.parameters.get("product") or record.parameters["what"]
            kind = "Matrix products" if record.name == "matmul_rate" else "Memory"
            lines.append(
                f"- {kind}: {record.derived['best']:,.0f} {record.unit} at best, {record.median:,.0f} in the median "
                f"of {record.repeats} ({what})."
            )
        if record.name == "resnet50_step":
            images, batch = record.parameters["images"], record.derived["batch"]
            scaled = record.derived["seconds_an_image"] * batch
            scaled_text = "" if images == batch else f", scaled to {format_seconds(scaled)} for {batch}"
            lines.append(
                f"- ResNet50 training step (online forward and backward, target forward; 224 x 224, "
                f"{record.parameters['arithmetic']}): {format_spread(record)} measured with {images} "
                f"images{scaled_text}."
            )
    if "resnet50_step" in unmeasured:
        lines.append(f"- ResNet50 training step: unmeasured, {unmeasured['resnet50_step']}.")
    return "\n".join(lines)


def _glance(records: list[Record]) -> str:
    """Return a table with a line per problem, a column per method, and the ratio of "auto" to the fastest backend."""
    groups = timed_searches(records)
    methods = list(dict.fromkeys(label(r) for group in groups.values() for r in group if not is_authors(r)))
    rows = []
    for sizes, group in groups.items():
        times = {label(record): record.median for record in group}
        ours = [r.median for r in group if is_ours(r) and r.parameters["method"] != "auto"]
        auto = times.get("msf_core, auto")
        ratio = f"{auto / min(ours):.2f}" if auto and ours else "—"
        cells = [format_seconds(times[name]) if name in times else "—" for name in methods]
        rows.append([*(f"{size:,}" for size in sizes), *cells, ratio])
    header = ("N", "D", "batch", "k", *methods, "auto / fastest of ours")
    return "Medians. " + _first(records) + "\n\n" + _table(header, rows)


def _first(records: list[Record]) -> str:
    first = next(record for record in records if record.name == "search").parameters
    return f"Rows are {first['dtype']} on {first['device']}."


def _search_table(records: list[Record], unmeasured: dict[str, str]) -> str:
    rows, hidden = [], []
    for sizes, group in timed_searches(records).items():
        paper = PAPER_TABLE_1.get(sizes[0]) if sizes[1:] == (PAPER_DIM, 256, 5) else None
        if paper is not None:
            share = f"{paper.percent_of_training_time:.2f} %"
            gflop = f"{paper.gflop_a_query:.2f}"
            rows.append([*_size_cells(sizes), "the paper, Table 1", "—", gflop, *["—"] * 7, share, "—"])
            hidden.append("—")
        rows += [_search_row(record, records, unmeasured) for record in group]
        hidden += map(host_hidden, group)
    return _timed_table(HEADER, rows, hidden)


def _size_cells(sizes: tuple[int, ...]) -> list[str]:
    return [f"{size:,}" for size in sizes]


def _search_row(record: Record, records: list[Record], unmeasured: dict[str, str]) -> list[str]:
    derived = record.derived
    counted = derived["gflop_a_query_counted"]
    return [
        *_size_cells(sizes_of(record)),
        label(record),
        format_spread(record),
        f"{derived['gflop_a_query_formula']:.3g}",
        f"{counted:.3g}" if is_ours(record) or is_authors(record) else "—",
        _three_digits(derived["gflop_a_second"]),
        f"{_three_digits(100 * derived['share_of_products'])} %",
        f"{_three_digits(100 * derived['share_of_memory'])} %",
        _three_digits(derived["times_the_floor"]),
        _memory_cell(record, records),
        format_bytes(derived["bank_bytes"]),
        _share_cell(derived, unmeasured),
        "—" if record.recall is None else f"{record.recall:.3f}",
    ]


def _step_table(records: list[Record], unmeasured: dict[str, str]) -> str:
    steps = [record for record in records if record.name == "step"]
    theirs = next(record for record in steps if is_authors(record))
    their_memory = find_memory(records, theirs)
    header = (
        "what",
        "time a step (20–80 %)",
        "faster than authors'",
        "auto is faster by",
        "extra memory",
        "less than authors'",
        "loss apart",
    )
    auto = next(record for record in steps if record.parameters["method"] == "auto")
    rows = []
    for record in steps:
        ours = find_memory(records, record)
        less = "—"
        if ours is not None and their_memory is not None and ours.median > 0:
            less = f"{their_memory.median / ours.median:.1f} x"
        whole = "loss" in record.derived
        name = label(record) if whole else f"{label(record)}{', k = 1' if 'lightly' in label(record) else ''}, no loss"
        rows.append(
            [
                name,
                format_spread(record),
                f"{theirs.median / record.median:.1f} x",
                f"{record.median / auto.median:.2f} x",
                _memory_cell(record, records) if whole else "—",
                less,
                f"{record.derived['most_apart_from_authors_loss']:.0e}" if whole else "—",
            ]
        )
    p = theirs.parameters
    title = (
        f"N = {p['rows']:,}, D = {p['dim']}, batch {p['batch']}, k = {p['k']}, {p['dtype']} rows; "
        f"{theirs.repeats} runs of each in turns, ratios of medians. The bare searches have no push, loss or "
        "backward; lightly's bank finds one neighbor, and updates itself."
    )
    return f"{title}\n\n{_timed_table(header, rows, [host_hidden(record) for record in steps])}"


def _unmeasured_lines(unmeasured: dict[str, str]) -> str:
    """Return one line per reason, with everything that it applies to."""
    by_reason: dict[str, list[str]] = {}
    for what, reason in unmeasured.items():
        by_reason.setdefault(_cell(reason), []).append(what)
    lines = []
    for reason, whats in by_reason.items():
        shown = (
            "; ".join(dict.fromkeys(what.split(" at N")[0] for what in whats)) if len(whats) > 3 else "; ".join(whats)
        )
        times = f" ({len(whats)} sizes)" if len(whats) > 3 else ""
        lines.append(f"- {shown}{times}: {reason}")
    return "\n".join(lines) or "Nothing was left out."


def _notes(records: list[Record]) -> str:
    return (
        f"{_first(records)} A multiply-add is two operations. The times of msf_core include normalizing and rounding "
        "the queries and fetching the neighbors' rows; those of other libraries do not (only lightly's bank fetches "
        "rows). The floor is the longer of two times: the products at the product ceiling, or reading every row once "
        "at the memory ceiling. The paper's shares are of the training time on its machines, ours of the ResNet50 step "
        "above. Extra memory is measured only at N = 1,024,000. Recall is relative to float64 brute force on eight "
        "queries; the authors' step and lightly's bank return no indices to compare."
    )


def _memory_cell(record: Record, records: list[Record]) -> str:
    found = find_memory(records, record)
    return "—" if found is None else format_bytes(found.median)


def _share_cell(derived: dict[str, float], unmeasured: dict[str, str]) -> str:
    if "share_of_resnet50_step" in derived:
        return f"{100 * derived['share_of_resnet50_step']:.2f} %"
    return f"unmeasured: {_cell(unmeasured.get('resnet50_step', 'no step'))}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
