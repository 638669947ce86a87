"""The views of a run's results: tables for the terminal, report.md with its plots, and the comparison of runs."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

from secvec_jax.errors import UserError
from secvec_jax.evaluation.metrics import RATES, SAFETY, Curves, digits, in_order, percent, rules_note
from secvec_jax.evaluation.results import Results
from secvec_jax.evaluation.tables import MAX_COLUMNS, markdown_table, split_metrics, terminal_table, titled
from secvec_jax.files import atomic_file, resolved
from secvec_jax.printable import fenced, one_line, paragraph

Verdict = tuple[str, bool, str]  # claim, whether it holds, detail
_NamedRow = tuple[tuple[str, ...], dict]  # the texts of the columns that name a row, and the row

# What a terminal shows of a results.json, which somebody else may have written: rich takes a millisecond for each row,
# and square time for a long name.
_MAX_ROWS = 200
_MAX_METRICS = 60
_MAX_NAME = 300


@dataclasses.dataclass(frozen=True)
class TerminalTables:
    """Rows of results for rich's console: rates in percent with their 95% interval, losses without, ↑ or ↓ is better.

    A metric's n is in the header if all rows share it, else in each cell. There are as many tables as the console's
    width requires, of at most eight columns each. Cells are wrapped, between words, if the metrics of `SAFETY` do not
    fit side by side; those are split over several tables only on an even narrower console.
    """

    named: Sequence[_NamedRow]
    titles: Sequence[str]
    """of the columns that name a row"""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, table in enumerate(self._widest(console, options)):
            if number:
                yield ""
            yield table
        num_metrics = len(in_order([row for _, row in self.named]))
        for count, shown, kind in ((len(self.named), _MAX_ROWS, "rows"), (num_metrics, _MAX_METRICS, "metrics")):
            if count > shown:
                yield f"{count - shown:,} more {kind} are in results.json"

    def _widest(self, console: Console, options: ConsoleOptions) -> list[Table]:
        """The tables with as many columns each as the console takes."""
        unlimited = options.update(width=10_000)
        rooms = range(MAX_COLUMNS - len(self.titles), 0, -1)
        candidates = {room: self._tables(room, options.max_width // 2) for room in rooms}
        sizes = {room: [Measurement.get(console, unlimited, table) for table in candidates[room]] for room in rooms}
        unwrapped = [room for room in rooms if max(size.maximum for size in sizes[room]) <= options.max_width]
        unbroken = [room for room in rooms if max(size.minimum for size in sizes[room]) <= options.max_width]
        together = [room for fitting in (unwrapped, unbroken) for room in fitting if room >= len(SAFETY)]
        return candidates[next(iter([*together, *unbroken]), 1)]

    def _tables(self, room: int, names_width: int) -> list[Table]:
        """The tables with at most `room` columns of metrics each; the names take at most `names_width` characters."""
        tables = []
        named = [(tuple(one_line(name, _MAX_NAME) for name in names), row) for names, row in self.named[:_MAX_ROWS]]
        for columns, body in _parts(named, room, RATES, _MAX_METRICS):
            titles = (one_line(column.title, _MAX_NAME) for column in columns)
            header = [*self.titles, *(f"{title}\n{column.n}".rstrip() for title, column in zip(titles, columns))]
            tables.append(terminal_table(header, body, len(self.titles), names_width))
        return tables


def table(results: Results) -> TerminalTables:
    """Return the tables of a run's results for the terminal."""
    return TerminalTables([((row["name"],), row) for row in results.rows], ["model"])


def compare(folders: Iterable[str | Path]) -> TerminalTables:
    """Return tables of the rows of several runs, with the run in the first column.

    Only each folder's results.json is read. Runs whose folders have the same name are shown by their paths.

    Raises:
        UserError: no folder is given, or a results.json is missing or malformed.
    """
    paths = [resolved(folder) for folder in folders]
    if not paths:
        raise UserError("nothing to compare: pass one or more folders of finished runs")
    names = [path.name for path in paths]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    runs = [Results.load(path) for path in paths]
    rows = [((label, row["name"]), row) for label, run in zip(labels, runs, strict=True) for row in run.rows]
    return TerminalTables(rows, ["run", "model"])


def scores_table(rows: Sequence[dict]) -> str:
    """Return the rows' metrics in Markdown, each with its n and interval, in tables of at most eight columns."""
    named = [((row["name"],), row) for row in rows]
    tables = []
    for columns, body in _parts(named, MAX_COLUMNS - 1):
        header = ["model", *(f"{column.title} ({column.n})" if column.n else column.title for column in columns)]
        tables.append(markdown_table(header, body))
    return "\n\n".join(tables)


class _Column(NamedTuple):
    title: str
    n: str  # "n=64" if all rows share it, else ""
    cells: list[str]


def _parts(
    named: Sequence[_NamedRow], room: int, intervals: Collection[str] | None = None, most: int | None = None
) -> list[tuple[list[_Column], list[list[str]]]]:
    """The columns and the body of each table, of at most `room` metrics.

    intervals: the metrics to show with their interval; None: all. most: the number of metrics to show; None: all.
    Rows without any metric of a part are left out of it.
    """
    rows = [row for _, row in named]
    parts = []
    several = split_metrics(in_order(rows)[:most], room) or [[]]
    for metrics in several:
        columns = [_column(metric, rows, intervals is None or metric in intervals) for metric in metrics]
        body = [
            [*labels, *(column.cells[index] for column in columns)]
            for index, (labels, row) in enumerate(named)
            if len(several) == 1 or any(metric in row["metrics"] for metric in metrics)
        ]
        parts.append((columns, body))
    return parts


def _column(metric: str, rows: Sequence[dict], with_interval: bool) -> _Column:
    scores = [row["metrics"].get(metric) for row in rows]
    sizes = {score["n"] for score in scores if score}
    shared = f"n={sizes.pop()}" if len(sizes) == 1 else ""
    return _Column(titled(metric), shared, [_cell(metric, score, with_interval, not shared) for score in scores])


def _cell(metric: str, score: dict | None, with_interval: bool, with_n: bool) -> str:
    if score is None or score["value"] is None:
        return "-"
    number, sign = (percent, "%") if metric in RATES else (digits, "")
    text = number(score["value"]) + sign
    if with_interval and score["n"] > 1 and None not in score["ci95"]:
        text += " [{}, {}]".format(*map(number, score["ci95"]))
    return f"{text} n={score['n']}" if with_n else text


# ---------------------------------------------------------------------------------------------- the report


def markdown(
    results: Results,
    verdicts: Sequence[Verdict] = (),
    images: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the text of report.md: command, scores with n and interval, verdicts, notes, images, time, environment.

    `verdicts` are (claim, whether it holds, detail); `images` are paths relative to the report; `notes` are paragraphs
    on what the numbers do and do not show.
    """
    seconds = [[stage, _seconds(spent)] for stage, spent in results.seconds.items()]
    total = sum(spent for spent in results.seconds.values() if spent is not None)
    parts = [
        "# Report",
        fenced(results.command, "bash"),
        "## Scores",
        scores_table(results.rows),
        f"Brackets are 95% intervals; n is the number of prompts or examples. {rules_note(results.rows)}".rstrip(),
    ]
    if verdicts:
        claims = [(paragraph(f"{claim}: {detail}"), holds) for claim, holds, detail in verdicts]
        lines = [f"- [{'x' if holds else ' '}] {claim}" for claim, holds in claims]
        parts += ["## Claims", "\n".join(lines)]
    if notes:
        parts += ["## Notes", *map(paragraph, notes)]
    if images:
        parts += ["## Plots", *(f"![{Path(image).stem}]({image})" for image in images)]
    if seconds:
        parts += ["## Time", markdown_table(["stage", "seconds"], [*seconds, ["total", _seconds(total)]])]
    if results.environment:
        parts += ["## Environment", environment_table(results)]
    return "\n\n".join(parts) + "\n"


def write(
    folder: str | Path,
    results: Results,
    verdicts: Sequence[Verdict] = (),
    curves: Curves | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write report.md and its plots into `folder` and return the report's path.

    scores.png is drawn if a row has a rate, losses.png if `curves` have a positive loss:
    `{row name: {"harmful": [(step, loss), ...], "benign": [...]}}`. results.json is written by `Results.save`.

    Raises:
        UserError: the results do not have the form of results.json.
    """
    folder = Path(folder)
    results = results.as_stored()
    from secvec_jax.evaluation.plots import colors_of, plot_losses, plot_scores, png

    colors = colors_of([*(row["name"] for row in results.rows), *(curves or {})])
    plots = {
        "scores.png": plot_scores(results.rows, colors),
        "losses.png": plot_losses(curves or {}, colors),
    }
    drawn = {name: figure for name, figure in plots.items() if figure is not None}
    for name, figure in drawn.items():
        _write(folder / name, png(figure))
    return _write(folder / "report.md", markdown(results, verdicts, list(drawn), notes).encode())


def environment_table(results: Results) -> str:
    """Return the versions and devices in Markdown."""
    facts = [[name, _fact(value)] for name, value in results.environment.items()]
    return markdown_table(["what", "value"], facts, left=2)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _fact(value) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _write(path: Path, contents: bytes) -> Path:
    with atomic_file(path) as staging:
        staging.write_bytes(contents)
    return path
