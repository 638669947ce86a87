"""The report of a grid: its tables as its file lists them, the papers' tables below them, plots, and results.json."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from secvec_jax.checks import checked
from secvec_jax.defenses.registry import DEFENSES
from secvec_jax.errors import UserError
from secvec_jax.evaluation import published
from secvec_jax.evaluation.intervals import Score
from secvec_jax.evaluation.metrics import RULED
from secvec_jax.evaluation.pivot import RULES_FIELD, differences, summarize
from secvec_jax.evaluation.plots import colors_of, plot_pareto, plot_sweep, png
from secvec_jax.evaluation.records import Record
from secvec_jax.evaluation.results import Results, environment_facts
from secvec_jax.evaluation.summary import LEGEND, Summary
from secvec_jax.evaluation.tables import MAX_COLUMNS, label, show
from secvec_jax.files import atomic_file
from secvec_jax.grid import gap_report
from secvec_jax.grid.cells import Cell, cell_name
from secvec_jax.printable import code, markdown


@checked
@dataclasses.dataclass(frozen=True)
class Layout:
    """A table of the report."""

    name: str = ""
    """its heading, and the table of the blocks whose cells it shows"""
    of: str = ""
    """that table, if it has another name"""
    defense: tuple[str, ...] = ()
    """the defenses to show; empty: all"""
    attack: tuple[str, ...] = ()
    """the attacks to show; empty: all"""
    poison: tuple[float, ...] = ()
    """the poison ratios to show; empty: all"""
    about: str = ""
    """text above the table"""
    rows: tuple[str, ...] = ("defense",)
    """the fields of a cell that name a row"""
    columns: tuple[str, ...] = ()
    """the settings shown across, by field of a cell; without any, or if they do not vary, the metrics are across"""
    metrics: tuple[str, ...] = ("refusal", "compliance", "over_refusal", "task")
    """the metrics to show"""
    reference: str = "none"
    """the defense that every other is compared with at the same settings"""
    differences: tuple[str, ...] = ()
    """pairs of defenses, "FIRST minus SECOND", for a table of their differences with intervals"""
    published: tuple[str, ...] = ()
    """tables of `evaluation.published` to show below it"""
    pareto: tuple[str, ...] = ()
    """two metrics, learning and safety, for a scatter plot of each setting"""
    sweep: tuple[str, ...] = ()
    """metrics to plot over the settings, which must be numbers of one field"""

    def __post_init__(self) -> None:
        for name in self.published:
            if not isinstance(getattr(published, name, None), published.Published):
                raise UserError(f"no published table is named {name!r}: see secvec_jax/evaluation/published.py")
        if not 1 <= len(self.rows) <= MAX_COLUMNS // 2:
            raise UserError(f"rows is {self.rows}: name 1 to {MAX_COLUMNS // 2} fields, and the others in columns")
        if len(self.pareto) not in (0, 2):
            raise UserError(f"pareto is {self.pareto}: name two metrics, one of learning and one of safety")
        if self.sweep and len(self.columns) != 1:
            raise UserError(f"table {self.name!r} has a sweep and the columns {list(self.columns)}: name one, its axis")
        for pair in self.differences:
            first, _, second = pair.partition(" minus ")
            if not (first and second):
                raise UserError(f"a difference is {pair!r}: write FIRST minus SECOND, with two defenses")

    def shows(self, cell: Cell) -> bool:
        """Return whether the table includes a cell."""
        chosen = {"defense": self.defense, "attack": self.attack, "poison": self.poison}
        return all(cell.settings[name] in wanted for name, wanted in chosen.items() if wanted)

    def named_defenses(self) -> tuple[str, ...]:
        """The labels of the defenses that it shows and compares."""
        return self.defense + tuple(label for pair in self.differences for label in pair.split(" minus ", 1))


REFERENCES = ("none", "not aligned", "benign only")
"""Rows that no user who wants both safety and learning can choose."""


def write(
    folder: Path,
    command: str,
    settings: dict[str, Any],
    layouts: Sequence[Layout],
    cells: Sequence[Collection[Cell]],
    records: Sequence[Record],
) -> None:
    """Write report.md, its plots and results.json.

    cells: those of each layout. records: those that exist so far; a table without any says so.
    """
    summaries: dict[str, Summary] = {}
    by_name = {cell_name(dict(record.cell)): record for record in records}
    parts = ["# Grid", code(command), LEGEND.rstrip()]
    for layout, of_table in zip(layouts, cells, strict=True):
        shown = [cell for cell in of_table if layout.shows(cell)]
        available = [by_name[cell.name] for cell in shown if cell.name in by_name]  # in the order of the file
        parts += [f"## {markdown(layout.name)}", layout.about]
        failed = [record for record in available if record.error is not None]
        count = f"{len(available) - len(failed)} of {len(shown)} cells"
        parts.append(f"{count}; {len(failed)} failed:" if failed else f"{count}.")
        reasons = [f"- {code(cell_name(dict(record.cell)))}: {markdown(record.error or '')}" for record in failed]
        parts.append("\n".join(reasons))
        if not any(record.metrics for record in available):
            continue
        summary = summaries[layout.name] = _summary(layout, available)
        parts += [
            summary.markdown().rstrip(),
            *_differences(layout, available),
            *(getattr(published, name).markdown().rstrip() for name in layout.published),
            *(f"![{path.stem}]({path.name})" for path in _plots(folder, layout, summary)),
        ]
    parts += [gap_report.markdown_of(records), *_coverage(records)]
    with atomic_file(folder / "report.md") as staging:
        staging.write_text("\n\n".join(filter(None, parts)) + "\n")
    seconds = {"cells": sum(record.seconds for record in records)}
    Results(command, settings, environment_facts(), seconds, _rows(summaries)).save(folder)


def _summary(layout: Layout, records: Sequence[Record]) -> Summary:
    measured = {name for record in records for name in record.metrics}
    has_reference = any(record.cell["defense"] == layout.reference for record in records)
    metrics = [name for name in layout.metrics if name in measured]
    return summarize(records, layout.rows, layout.columns, metrics, layout.reference if has_reference else "")


def _differences(layout: Layout, records: Sequence[Record]) -> list[str]:
    """The table of the differences that the layout names, if there are cells for one."""
    columns = [name for name in (*layout.rows, *layout.columns) if name != "defense"]
    pairs = [pair.split(" minus ", 1) for pair in layout.differences]
    summary = differences(records, [(first, second) for first, second in pairs], columns, layout.metrics)
    return [f"**{markdown(layout.name)}, differences**", summary.markdown().rstrip()] if summary else []


def _coverage(records: Sequence[Record]) -> list[str]:
    """How many cells each defense has, so that the report also says what has not been measured."""
    finished = [str(record.cell["defense"]) for record in records if not record.error]
    counts = Counter(" ".join(word for word in name.split() if "=" not in word) for name in finished)
    by_count: dict[int, list[str]] = {}
    for name in dict.fromkeys([*DEFENSES, *counts]):
        by_count.setdefault(counts[name], []).append(name)
    items = [f"- {count}: {', '.join(by_count[count])}" for count in sorted(by_count)]
    return [
        "## Cells of each defense",
        f"{len(finished)} finished cells, by the number that a defense has:",
        "\n".join(items),
    ]


def _plots(folder: Path, layout: Layout, summary: Summary) -> list[Path]:
    colors = colors_of(summary.entries["defense"].cat.categories) if "defense" in summary.entries else {}
    figures: dict[str, Figure | None] = {}
    if layout.pareto:
        x, y = layout.pareto
        for setting, entries in _by_setting(summary):
            points = _points(entries, layout.rows, x, y)
            figures[f"pareto {setting}".strip()] = plot_pareto(points, x, y, colors, REFERENCES)
    for metric in layout.sweep:
        figures[f"sweep {metric}"] = plot_sweep(_sweep(summary, layout, metric), metric, layout.columns[0], colors)
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{layout.name} {name}.png".lower().replace(" ", "-").replace("/", "-"))
            with atomic_file(paths[-1]) as staging:
                staging.write_bytes(png(figure))
    return paths


def _by_setting(summary: Summary) -> list[tuple[str, pd.DataFrame]]:
    """The entries of each setting, with its name."""
    if not summary.columns:
        return [("", summary.entries)]
    groups = summary.entries.groupby(list(summary.columns), observed=True)
    return [(" ".join(map(show, setting)), entries) for setting, entries in groups]


def _points(entries: pd.DataFrame, rows: Sequence[str], x: str, y: str) -> dict[str, tuple[Score, Score]]:
    """Row -> its scores in two metrics, for `plot_pareto`; rows that lack one are left out."""
    points = {}
    for row, of_row in entries.groupby(list(rows), observed=True):
        scores = {metric: entry.score for metric, entry in zip(of_row["metric"], of_row["entry"], strict=True)}
        if scores.get(x) and scores.get(y):
            points[label(row)] = (scores[x], scores[y])
    return points


def _sweep(summary: Summary, layout: Layout, metric: str) -> dict[str, list[tuple[float, Score]]]:
    """Row -> [(setting, score)] of one metric, for `plot_sweep`; missing cells are left out."""
    entries = summary.entries[summary.entries["metric"] == metric]
    (field,) = layout.columns
    curves = {}
    for row, of_row in entries.groupby(list(layout.rows), observed=True):
        points = zip(of_row[field], of_row["entry"], strict=True)
        curves[label(row)] = [(setting, entry.score) for setting, entry in points if entry.score]
    return curves


def _rows(summaries: Mapping[str, Summary]) -> list[dict[str, Any]]:
    """The rows of results.json, which `eval.py compare` reads: one for each place of each table."""
    rows = []
    for name, summary in summaries.items():
        for place, entries in summary.entries.groupby([*summary.rows, *summary.columns], observed=True):
            metrics: dict[str, dict[str, Any]] = {}
            for metric, entry in zip(entries["metric"], entries["entry"], strict=True):
                if entry.score:
                    score = entry.score
                    metrics[metric] = {"value": score.value, "n": score.n, "ci95": list(score.ci95)}
                    if metric in RULED and RULES_FIELD in summary.shared:
                        metrics[metric]["rules"] = summary.shared[RULES_FIELD]
            if metrics:
                rows.append({"name": f"{name}: {label(place)}", "metrics": metrics})
    return rows
