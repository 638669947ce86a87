"""The table that `pivot` lays out: cells with intervals, marks and footnotes, for GitHub, terminal and plots."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

from rich.console import Group
from rich.table import Table as TerminalTable
from rich.text import Text

from secvec_jax.errors import UserError
from secvec_jax.evaluation.columns import room_beside, split
from secvec_jax.evaluation.metrics import percent
from secvec_jax.evaluation.statistics import Difference, SeededScore

Value = str | int | float | bool | None
Place = tuple[Value, ...]  # values of the fields that make up a row, a column, or both

_ARROWS = {"higher": " ↑", "lower": " ↓"}


@dataclass(frozen=True)
class Cell:
    """A place of the table for one metric: its score, if any seed has one, and how it stands to the reference."""

    score: SeededScore | None
    difference: Difference | None = None  # from the reference, over the seeds that both have
    failure: str = ""  # which seeds failed, and why
    better: str | None = None  # "higher", "lower", or neither

    @property
    def is_there(self) -> bool:
        """Whether there is anything to show: a score, or why there is none."""
        return self.score is not None or bool(self.failure)

    @property
    def mark(self) -> str:
        """What a reader sees: ▲ really better than the reference, ▼ really worse, ≠ really different, or nothing."""
        if not (self.difference and self.difference.real):
            return ""
        return "≠" if self.better is None else "▲" if (self.difference.value > 0) == (self.better == "higher") else "▼"


@dataclass(frozen=True)
class Table:
    """The cells by (row, column, metric), and all that is needed to show them."""

    rows: tuple[str, ...]  # the fields that make up a row
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    down: tuple[Place, ...]  # the rows in order
    across: tuple[Place, ...]
    cells: Mapping[tuple[Place, Place, str], Cell]
    reference: str  # "" when nothing is compared
    shared: Mapping[str, Value]  # fields outside the table that are the same in all cells
    differing: tuple[str, ...]  # fields outside the table that go with its rows or columns
    better: Mapping[str, str]
    rates: Collection[str]  # metrics shown in percent

    def markdown(self) -> str:
        """Return GitHub Markdown: the table, in parts where it is wide, and what its numbers and marks mean."""
        lines = []
        for part in self._parts():
            lines += [f"**{part.caption}**", ""] if part.caption else []
            lines += [*markdown_lines(part.header, part.body, part.left), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self._notes())]) + "\n"

    def terminal(self) -> Group:
        """Return the same for rich's console."""
        views = []
        for part in self._parts():
            view = TerminalTable(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), highlight=False)
            if part.caption:
                view.title, view.title_justify = Text(part.caption), "left"
            for index, title in enumerate(part.header):
                view.add_column(Text(title), justify="left" if index < part.left else "right", overflow="fold")
            for line in part.body:
                view.add_row(*map(Text, line))  # Text, because "[91, 100]" is no markup
            views.append(view)
        return Group(*views, Text("\n".join(self._notes())))

    def points(self, x: str, y: str) -> dict[str, tuple[SeededScore, SeededScore]]:
        """Return row -> its scores of two metrics, for `plot_pareto`; rows that lack one are left out.

        Raises:
            UserError: the table has several columns, or lacks a metric.
        """
        if len(self.across) != 1:
            raise UserError(f"{len(self.across)} columns give a row more than one point: keep one with `where`")
        pairs = {label(row): [self._score(row, self.across[0], metric) for metric in (x, y)] for row in self.down}
        return {name: (a, b) for name, (a, b) in pairs.items() if a and b}

    def sweep(self, metric: str) -> dict[str, list[tuple[float, SeededScore]]]:
        """Return row -> [(number at the head of a column, score)], for `plot_sweep`; missing cells are left out.

        Raises:
            UserError: the columns are not those of one field that holds numbers, or the table lacks the metric.
        """
        if len(self.columns) != 1 or not all(is_number(place[0]) for place in self.across):
            raise UserError("a sweep needs columns of one field that holds numbers, such as columns=['poison']")
        heads = [head for (head,) in self.across if is_number(head)]
        lines = {label(row): [(head, self._score(row, (head,), metric)) for head in heads] for row in self.down}
        return {name: [(at, score) for at, score in line if score] for name, line in lines.items()}

    def _score(self, row: Place, column: Place, metric: str) -> SeededScore | None:
        if metric not in self.metrics:
            raise UserError(f"the table has no '{metric}': there are {names(self.metrics)}")
        return self._cell(row, column, metric).score

    def _cell(self, row: Place, column: Place, metric: str) -> Cell:
        return self.cells.get((row, column, metric), Cell(None))

    def _parts(self) -> list["_Part"]:
        """The table, or what it is split into: rows, columns and metrics without a number are left out of a part."""
        room = room_beside(len(self.rows), self.metrics)
        left = len(self.rows) if room else 1  # too many to stand beside the metrics: one column names them all
        several = split(self.metrics, self.across, room or room_beside(1, self.metrics))
        parts = [self._part(metrics, places, left, len(several) > 1) for metrics, places in several]
        return [part for part in parts if part.body]

    def _part(self, metrics: list[str], places: list[Place], left: int, is_one_of_several: bool) -> "_Part":
        shown = [(column, metric) for metric in metrics for column in places]
        down = list(self.down)
        if is_one_of_several:
            down = [row for row in down if any(self._cell(row, *place).is_there for place in shown)]
            shown = [place for place in shown if any(self._cell(row, *place).is_there for row in down)]
        caption = (
            told(dict(zip(self.columns, places[0], strict=True))) if is_one_of_several and len(places) == 1 else ""
        )
        header = [*map(_words, self.rows)] if left == len(self.rows) else [", ".join(map(_words, self.rows))]
        for column, metric in shown:
            head = "" if caption else told(dict(zip(self.columns, column, strict=True)))
            title = _words(metric) + _ARROWS.get(self.better.get(metric, ""), "")
            header.append(", ".join(filter(None, (title, head))))
        usual, footnotes = {metric: self._usual(metric) for metric in metrics}, self._footnotes()
        body = []
        for row in down:
            cells = [self._cell_text((row, *place), usual[place[1]], footnotes) for place in shown]
            body.append([*(map(show, row) if left == len(self.rows) else [label(row)]), *cells])
        return _Part(caption, header, body, left)

    def _footnotes(self) -> dict[str, str]:
        """Why cells failed -> the mark that refers to it."""
        order = ((row, column, metric) for row in self.down for metric in self.metrics for column in self.across)
        failures = dict.fromkeys(filter(None, (self._cell(*place).failure for place in order)))
        return {failure: f"({index})" for index, failure in enumerate(failures, 1)}

    def _usual(self, metric: str) -> tuple[int, int] | None:
        """The most common (n, seeds) of a metric's cells."""
        scores = [cell.score for (*_, name), cell in self.cells.items() if name == metric and cell.score]
        return Counter((score.n, score.seeds) for score in scores).most_common(1)[0][0] if scores else None

    def _cell_text(self, place: tuple[Place, Place, str], usual: tuple[int, int] | None, footnotes: dict) -> str:
        cell, score = self._cell(*place), self._cell(*place).score
        footnote = footnotes.get(cell.failure, "")
        if score is None:
            return f"failed {footnote}" if footnote else "-"
        is_rate, is_difference = place[2] in self.rates, isinstance(score, Difference)
        show = (_points if is_rate else _signed) if is_difference else (percent if is_rate else _digits)
        parts = [show(score.value) + ("%" if is_rate and not is_difference else "")]
        if score.n > 1:
            parts.append("[{}, {}]".format(*map(show, score.ci95)))
        if isinstance(score, Difference) and score.by_seed and score.n > score.seeds:
            parts.append("t [{}, {}]".format(*map(show, score.by_seed)))
        if (score.n, score.seeds) != usual:
            parts.append(f"n={score.n}" + (f" of {score.seeds} seeds" if score.seeds > 1 else ""))
        dagger = "†" if score.seeds == 1 and self._most_seeds() > 1 else ""
        return " ".join(filter(None, (*parts, dagger, cell.mark, footnote)))

    def _most_seeds(self) -> int:
        return max((cell.score.seeds for cell in self.cells.values() if cell.score), default=0)

    def _notes(self) -> Iterable[str]:
        usual = {metric: self._usual(metric) for metric in self.metrics}
        scores = [(metric, cell.score) for (*_, metric), cell in self.cells.items() if cell.score]
        by_size: dict[tuple[int, int], list[str]] = {}
        for metric, size in usual.items():
            if size:
                by_size.setdefault(size, []).append(_words(metric))
        sizes = [f"{', '.join(group)}: n={n}, {_count(seeds, 'seed')}" for (n, seeds), group in by_size.items()]
        if scores:
            alike = all((score.n, score.seeds) == usual[metric] for metric, score in scores)
            yield f"Means with 95% intervals. {'; '.join(sizes)}{'' if alike else ', unless a cell says otherwise'}."
        compared = sum(cell.difference is not None for cell in self.cells.values())
        if self.reference and compared:
            yield (
                f"▲ better, ▼ worse than {self.reference}: the 95% interval of the difference, prompt by prompt and "
                f"seed by seed, leaves out 0. No mark: not distinguishable. Of the {_count(compared, 'comparison')}, "
                "about 1 in 20 of those without a difference is marked by chance."
            )
        if any(cell.mark == "≠" for cell in self.cells.values()):
            yield "≠ differs likewise; of this metric neither more nor less is better."
        single = [score for _, score in scores if score.seeds == 1]
        if single:
            yield ("† o" if self._most_seeds() > 1 else "O") + "ne seed: the interval leaves out what seeds differ by."
        if any(1 < score.seeds < 5 for _, score in scores):
            yield "Fewer than five seeds: intervals and marks are too sure where seeds differ by more than prompts do."
        lone = dict.fromkeys(_words(metric) for metric, score in scores if score.n == score.seeds > 1)
        if lone:
            yield f"One number a seed: {', '.join(lone)}; intervals by Student's t."
        if any(isinstance(score, Difference) for _, score in scores):
            yield "Differences of rates are in percentage points. t: Student's interval of the seeds' own differences."
        if self.shared:
            yield f"The same in all cells: {told(self.shared)}."
        if self.differing:
            yield f"Not the same in all cells, though not shown: {', '.join(map(_words, self.differing))}."
        yield from (f"{mark} {failure}" for failure, mark in self._footnotes().items())


class _Part(NamedTuple):
    """A table as it is shown. left: how many of its columns name the rows."""

    caption: str
    header: list[str]
    body: list[list[str]]
    left: int


def markdown_lines(header: list[str], body: list[list[str]], left: int = 1) -> list[str]:
    """Return the lines of a Markdown table whose first `left` columns are aligned left and the others right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in (header, rule, *body)]


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a finite number and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def names(several: Iterable[str]) -> str:
    """Return the names in quotes and in alphabetical order."""
    return ", ".join(f"'{name}'" for name in sorted(several))


def told(values: Mapping[str, object]) -> str:
    """Return fields with their values: "defense plain, poison 0.1"."""
    return ", ".join(f"{_words(name)} {show(value)}" for name, value in values.items())


def label(place: Place) -> str:
    """Return the values of a place, one after the other."""
    return ", ".join(map(show, place))


def show(value: object) -> str:
    """Return a value as tables and file names have it."""
    if isinstance(value, list | tuple | set):
        return " or ".join(map(show, value))
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _points(rate: float) -> str:
    return f"{round(100 * rate, 1) + 0.0:+.1f}"  # + 0.0: never "-0.0"


def _signed(value: float) -> str:
    return ("" if value < 0 else "+") + _digits(value)


def _digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")
