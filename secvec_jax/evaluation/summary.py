"""A table of a grid's scores, and its Markdown: a caption, tables of at most eight columns, and notes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from secvec_jax.evaluation.metrics import BETTER, RATES, digits, percent, unit
from secvec_jax.evaluation.records import Value
from secvec_jax.evaluation.statistics import Difference, SeededScore
from secvec_jax.evaluation.tables import (
    MAX_COLUMNS,
    label,
    markdown_table,
    show,
    split_evenly,
    split_metrics,
    titled,
    words,
)
from secvec_jax.printable import markdown, paragraph

LEGEND = """\
How to read the tables:

- Each number is a mean, with its 95% interval in brackets.
- ▲ better, ▼ worse than the reference, ≠ different where neither direction is better: the 95% interval of the
  difference, prompt by prompt and seed by seed, excludes 0. No mark: no significant difference. About 1 in 20
  comparisons without a difference is marked by chance.
- † one seed of several: the interval does not include how seeds vary.
- With fewer than five seeds, intervals are too narrow and marks too confident if seeds vary more than prompts do.
- With one number per seed (n per seed: 1), intervals are Student's t.
- Tables of differences show differences of rates in percentage points, and as t Student's interval of the seeds' mean
  differences.
"""


@dataclass(frozen=True)
class Entry:
    """One metric of one row at one setting: its score, if any seed has one, and how it compares with the reference."""

    score: SeededScore | None
    difference: Difference | None = None  # from the reference, over the seeds that both have
    failure: str = ""  # which seeds failed, and why

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show: no score, and no reason why."""
        return self.score is None and not self.failure

    def mark(self, metric: str) -> str:
        """Return ▲ significantly better than the reference, ▼ worse, ≠ different, or nothing."""
        if not (self.difference and self.difference.is_significant):
            return ""
        direction = BETTER.get(metric)
        if direction is None:
            return "≠"
        return "▲" if (self.difference.value > 0) == (direction == "higher") else "▼"


@dataclass(frozen=True)
class Summary:
    """A table of scores; `entries` has a line for each metric at each row and setting.

    entries: a column for each field of `rows` and `columns`, "metric" and "entry" (an `Entry`); all but the last are
    ordered categories, so sorting and pivoting keep the order to show.
    columns: the fields shown across; those of one value are in `shared`.
    reference: what each entry is compared with, "" if with nothing.
    shared, differing: the fields outside the table that have one value, and those that go with its rows or columns.
    """

    entries: pd.DataFrame
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    reference: str
    shared: Mapping[str, Value]
    differing: tuple[str, ...]

    @property
    def metrics(self) -> list[str]:
        """The metrics in the order to show them."""
        return list(self.entries["metric"].cat.categories)

    def markdown(self) -> str:
        """Return GitHub Markdown: a caption, tables of at most `MAX_COLUMNS` columns, and notes.

        Rows are defenses, and settings are across, with a line for each metric of a defense. The only setting at which
        a defense was run has a separate table, with the metrics across, so that it is not mostly empty; it shows all
        defenses at that setting.
        """
        texts = self.entries.assign(text=self._texts()).dropna(subset="text")
        tables = list(self._tables(texts)) if self.columns else list(self._metrics_across(texts))
        notes = "\n".join(f"- {paragraph(note)}" for note in self._notes())
        return "\n\n".join(filter(None, [paragraph(self._caption()), *tables, notes])) + "\n"

    def _tables(self, texts: pd.DataFrame) -> Iterator[str]:
        rows, columns = list(self.rows), list(self.columns)
        places = texts.drop_duplicates([*rows, *columns])
        settings_of_row = places.groupby(rows, observed=True)["metric"].transform("size")
        once = places.loc[settings_of_row == 1, [*rows, *columns]]
        run_once = set(once[rows].itertuples(index=False, name=None))
        is_across = [row not in run_once for row in texts[rows].itertuples(index=False, name=None)]
        if any(is_across):
            yield from self._settings_across(texts[is_across])
        for setting, _ in once.groupby(columns, observed=True):
            at_setting = (texts[columns] == list(setting)).all(axis=1)
            yield f"**{markdown(fields_text(dict(zip(columns, setting, strict=True))))}**"
            yield from self._metrics_across(texts[at_setting])

    def _settings_across(self, texts: pd.DataFrame) -> Iterator[str]:
        wide = texts.pivot(index=[*self.rows, "metric"], columns=list(self.columns), values="text").sort_index(axis=1)
        room = MAX_COLUMNS - len(self.rows) - 1
        for part in split_evenly(wide.shape[1], room):
            shown = wide.iloc[:, list(part)].dropna(how="all").fillna("-")
            settings = [place if isinstance(place, tuple) else (place,) for place in shown.columns]
            header = [*map(words, self.rows), "metric", *map(label, settings)]
            body: list[list[str]] = []
            previous: list | None = None
            for place, cells in zip(shown.index, shown.to_numpy().tolist(), strict=True):
                *row, metric = place
                names = [""] * len(row) if row == previous else [*map(show, row)]
                body.append([*names, titled(metric), *cells])
                previous = row
            yield markdown_table(header, body, len(self.rows) + 1)

    def _metrics_across(self, texts: pd.DataFrame) -> Iterator[str]:
        wide = texts.pivot(index=list(self.rows), columns="metric", values="text")
        metrics = [metric for metric in self.metrics if metric in wide]
        for part in split_metrics(metrics, MAX_COLUMNS - len(self.rows)):
            shown = wide[part].dropna(how="all").fillna("-")
            header = [*map(words, self.rows), *map(titled, part)]
            rows = [row if isinstance(row, tuple) else (row,) for row in shown.index]
            body = [[*map(show, row), *cells] for row, cells in zip(rows, shown.to_numpy().tolist(), strict=True)]
            yield markdown_table(header, body, len(self.rows))

    def _texts(self) -> list[str | None]:
        usual, footnotes, max_seeds = self._usual_sizes(), self._footnotes(), self._max_seeds()
        texts: list[str | None] = []
        for metric, entry in zip(self.entries["metric"], self.entries["entry"], strict=True):
            footnote = footnotes.get(entry.failure, "")
            if entry.is_empty:
                texts.append(None)
                continue
            if entry.score is None:
                texts.append(f"failed {footnote}")
                continue
            score = entry.score
            parts = [number(metric, score)]
            if score.n != usual[metric] * score.seeds:
                parts.append(f"n={score.n}")
            if 1 < score.seeds < max_seeds:
                parts.append(f"{score.seeds} seeds")
            if score.seeds == 1 < max_seeds:
                parts.append("†")
            texts.append(" ".join(filter(None, [*parts, entry.mark(metric), footnote])))
        return texts

    def _scores(self) -> list[tuple[str, SeededScore]]:
        pairs = zip(self.entries["metric"], self.entries["entry"], strict=True)
        return [(metric, entry.score) for metric, entry in pairs if entry.score]

    def _usual_sizes(self) -> dict[str, float]:
        """Metric -> its most common number of prompts per seed."""
        sizes: dict[str, Counter] = {}
        for metric, score in self._scores():
            sizes.setdefault(metric, Counter())[score.n / score.seeds] += 1
        return {metric: sizes[metric].most_common(1)[0][0] for metric in self.metrics if metric in sizes}

    def _max_seeds(self) -> int:
        return max((score.seeds for _, score in self._scores()), default=0)

    def _footnotes(self) -> dict[str, str]:
        """Why cells failed -> the mark that refers to it."""
        failures = dict.fromkeys(entry.failure for entry in self.entries["entry"] if entry.failure)
        return {failure: f"({index})" for index, failure in enumerate(failures, 1)}

    def _caption(self) -> str:
        """The settings across, the unit of each metric, and the number of prompts and seeds."""
        usual = self._usual_sizes()
        if not usual:
            return ""
        are_differences = any(isinstance(score, Difference) for _, score in self._scores())
        units: dict[str, list[str]] = {}
        sizes: dict[str, list[str]] = {}
        for metric, size in usual.items():
            units.setdefault(unit(metric), []).append(words(metric))
            sizes.setdefault(f"{size:g}", []).append(words(metric))
        in_words = {"%": "percentage points" if are_differences else "%", "": "plain numbers"}
        parts = [f"Settings: {', '.join(map(words, self.columns))}"] if self.columns else []
        parts += [f"Units: {_listed((in_words.get(name, name), metrics) for name, metrics in units.items())}"]
        parts += [f"n per seed: {_listed(sizes.items())}", f"Seeds: {self._max_seeds()}"]
        return ". ".join(parts) + "."

    def _notes(self) -> Iterable[str]:
        compared = sum(entry.difference is not None for entry in self.entries["entry"])
        if self.reference and compared:
            yield f"▲ ▼ against {self.reference}, {compared} comparison{'' if compared == 1 else 's'}."
        if self._max_seeds() == 1:
            yield "One seed: the intervals do not include how seeds vary."
        if self.shared:
            yield f"The same in all cells: {fields_text(self.shared)}."
        if self.differing:
            yield f"Not shown, and not the same in all cells: {', '.join(map(words, self.differing))}."
        yield from (f"{mark} {failure}" for failure, mark in self._footnotes().items())


def fields_text(values: Mapping[str, object]) -> str:
    """Return fields with their values: "defense plain, poison 0.1"."""
    return ", ".join(f"{words(name)} {show(value)}" for name, value in values.items())


def number(metric: str, score: SeededScore) -> str:
    """Return a score with its interval, without the unit; a difference in percentage points for rates."""
    if isinstance(score, Difference):
        text = _points if metric in RATES else _signed
    else:
        text = percent if metric in RATES else digits
    parts = [text(score.value)]
    if score.n > 1:
        parts.append("[{}, {}]".format(*map(text, score.ci95)))
    if isinstance(score, Difference) and score.by_seed and score.n > score.seeds:
        parts.append("t [{}, {}]".format(*map(text, score.by_seed)))
    return " ".join(parts)


def _points(rate: float) -> str:
    return f"{round(100 * rate, 1) + 0.0:+.1f}"  # + 0.0: never "-0.0"


def _signed(value: float) -> str:
    return ("" if value < 0 else "+") + digits(value)


def _listed(groups: Iterable[tuple[str, list[str]]]) -> str:
    """ "% (refusal, compliance), nats per token (harmful loss)" """
    return ", ".join(f"{name} ({', '.join(metrics)})" for name, metrics in groups)
