"""The report of a grid: its tables as its file lays them out, published ones under them, plots, and results.json."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from secvec_jax.checks import checked
from secvec_jax.defenses.registry import DEFENSES
from secvec_jax.errors import UserError
from secvec_jax.evaluation import published, report
from secvec_jax.evaluation.metrics import RULED
from secvec_jax.evaluation.pivot import RULES_FIELD, Record, differences, pivot
from secvec_jax.evaluation.plots import colors_of, plot_pareto, plot_sweep, png
from secvec_jax.evaluation.tables import Table, label, show
from secvec_jax.files import whole_file
from secvec_jax.grid.cells import Cell, cell_name


@checked
@dataclasses.dataclass(frozen=True)
class Layout:
    """A table of the report."""

    name: str = ""
    """its heading, and the table of the blocks whose cells it shows"""
    of: str = ""
    """that table, where it is another"""
    defense: tuple[str, ...] = ()
    """the defenses that it shows, by the labels of their rows; none: all"""
    attack: tuple[str, ...] = ()
    poison: tuple[float, ...] = ()
    """likewise the attacks and the poison ratios"""
    about: str = ""
    """what stands over it"""
    rows: tuple[str, ...] = ("defense",)
    columns: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("refusal", "compliance", "over_refusal", "task")
    reference: str = "none"
    """the defense that every cell is compared with, column by column"""
    differences: tuple[str, ...] = ()
    """pairs of defenses, "FIRST minus SECOND", for a table of how far they differ, with intervals"""
    published: tuple[str, ...] = ()
    """tables of `evaluation.published` to stand under it"""
    pareto: tuple[str, ...] = ()
    """two metrics, learning and safety, for a scatter of each column"""
    sweep: tuple[str, ...] = ()
    """metrics to be drawn over the column, which must be one number"""

    def __post_init__(self) -> None:
        for name in self.published:
            if not isinstance(getattr(published, name, None), published.Published):
                raise UserError(f"no published table is named {name!r}: see secvec_jax/evaluation/published.py")
        if len(self.pareto) not in (0, 2):
            raise UserError(f"pareto is {self.pareto}: name two metrics, one of learning and one of safety")
        for pair in self.differences:
            first, _, second = pair.partition(" minus ")
            if not (first and second):
                raise UserError(f"a difference is {pair!r}: write FIRST minus SECOND, two defenses")

    def shows(self, cell: Cell) -> bool:
        """Whether a cell is one of the table's."""
        chosen = {"defense": self.defense, "attack": self.attack, "poison": self.poison}
        return all(cell.settings[name] in wanted for name, wanted in chosen.items() if wanted)

    def named_defenses(self) -> tuple[str, ...]:
        """The labels of the defenses that it shows and compares."""
        return self.defense + tuple(label for pair in self.differences for label in pair.split(" minus ", 1))


REFERENCES = ("none", "not aligned", "benign only")
"""Rows that are no choice for somebody who wants to be safe and to learn."""


def write(
    folder: Path,
    command: str,
    settings: dict[str, Any],
    layouts: Sequence[Layout],
    cells: Sequence[Collection[Cell]],
    records: Sequence[Record],
) -> None:
    """Write report.md, its plots and results.json.

    cells: those of each layout. records: what there is of them; a table that has none yet is left out.
    """
    tables: dict[str, Table] = {}
    there = {cell_name(dict(record.cell)): record for record in records}
    parts = ["# Grid", "", f"`{command}`", ""]
    for layout, shown in zip(layouts, cells, strict=True):
        own = [cell for cell in shown if layout.shows(cell)]
        some = [there[cell.name] for cell in own if cell.name in there]  # in the order of the file
        parts += [f"## {layout.name}", "", *([layout.about, ""] if layout.about else [])]
        if not any(record.metrics for record in some):
            parts += ["No cell of it is there yet.", ""]
            continue
        table = tables[layout.name] = _table(layout, some)
        beside = [getattr(published, name) for name in layout.published]
        parts += [
            f"{len(some)} of {len(own)} cells.",
            "",
            table.markdown(),
            *_differences(layout, some),
            *(f"{one.markdown()}\n" for one in beside),
        ]
        parts += [f"![{path.stem}]({path.name})\n" for path in _plots(folder, layout, some)]
    with whole_file(folder / "report.md") as staging:
        staging.write_text("\n".join([*parts, *_coverage(records)]))
    seconds = {"cells": sum(record.seconds for record in records)}
    report.Results(command, settings, report.environment(), seconds, _rows(tables)).save(folder)


def _table(layout: Layout, records: Sequence[Record], where: Mapping[str, Any] | None = None) -> Table:
    measured = {name for record in records for name in record.metrics}
    there = any(record.cell["defense"] == layout.reference for record in records)
    return pivot(
        records,
        layout.rows,
        layout.columns,
        [name for name in layout.metrics if name in measured],
        {"defense": layout.reference} if there else None,
        where=where,
        order={"defense": list(dict.fromkeys(record.cell["defense"] for record in records))},
    )


def _differences(layout: Layout, records: Sequence[Record]) -> list[str]:
    """The table of the differences that the layout names, if there are cells for one; varying fields name its rows."""
    fields = [name for name in (*layout.rows, *layout.columns) if name != "defense"]
    varying = [name for name in fields if len({record.cell.get(name) for record in records}) > 1]
    pairs = [tuple(pair.split(" minus ", 1)) for pair in layout.differences]
    table = differences(records, [(first, second) for first, second in pairs], varying, layout.metrics)
    return [f"**{layout.name}, differences**\n", table.markdown()] if table else []


def _coverage(records: Sequence[Record]) -> list[str]:
    """How many cells each defense has: what has not been measured is said, too."""
    finished = [str(record.cell["defense"]) for record in records if not record.error]
    counts = Counter(" ".join(word for word in name.split() if "=" not in word) for name in finished)
    by_count: dict[int, list[str]] = {}
    for name in dict.fromkeys([*DEFENSES, *counts]):
        by_count.setdefault(counts[name], []).append(name)
    lines = [f"- {count}: {', '.join(by_count[count])}" for count in sorted(by_count)]
    return ["## Cells of each defense", "", f"{len(finished)} finished cells, by how many a defense has:", "",
            *lines, ""]  # fmt: skip


def _plots(folder: Path, layout: Layout, records: Sequence[Record]) -> list[Path]:
    names = list(dict.fromkeys(str(record.cell["defense"]) for record in records))
    colors = colors_of(names)
    figures = {}
    if layout.pareto:
        x, y = layout.pareto
        for at in _columns(layout, records):
            flat = dataclasses.replace(layout, rows=("defense",), columns=(), metrics=layout.pareto, reference="")
            points = _table(flat, records, at).points(x, y)
            title = " ".join(map(show, at.values()))
            figures[f"pareto {title}"] = plot_pareto(points, x, y, colors, REFERENCES)
    for metric in layout.sweep:
        lines = _table(dataclasses.replace(layout, metrics=(metric,)), records).sweep(metric)
        figures[f"sweep {metric}"] = plot_sweep(lines, metric, layout.columns[0], colors)
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{layout.name} {name}.png".lower().replace(" ", "-"))
            with whole_file(paths[-1]) as staging:
                staging.write_bytes(png(figure))
    return paths


def _columns(layout: Layout, records: Sequence[Record]) -> list[dict[str, Any]]:
    """The columns of a table, each as what its cells have in common."""
    found = dict.fromkeys(tuple(record.cell[name] for name in layout.columns) for record in records)
    return [dict(zip(layout.columns, values)) for values in found]


def _rows(tables: Mapping[str, Table]) -> list[dict[str, Any]]:
    """What `eval.py compare` reads: a row for each place of each table."""
    rows = []
    for name, table in tables.items():
        for down in table.down:
            for across in table.across:
                cells = {metric: table.cells.get((down, across, metric)) for metric in table.metrics}
                scores = {metric: cell.score for metric, cell in cells.items() if cell and cell.score}
                metrics = {m: {"value": s.value, "n": s.n, "ci95": list(s.ci95)} for m, s in scores.items()}
                for metric in metrics.keys() & RULED if RULES_FIELD in table.shared else ():
                    metrics[metric]["rules"] = table.shared[RULES_FIELD]
                rows += [{"name": f"{name}: {label((*down, *across))}", "metrics": metrics}] if metrics else []
    return rows
