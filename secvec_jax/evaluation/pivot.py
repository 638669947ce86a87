"""Records of a grid summarized in one table: seeds averaged, defenses compared prompt by prompt.

Only seeds are ever averaged: all other settings must be the same within one entry of the table.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from secvec_jax.errors import UserError
from secvec_jax.evaluation.metrics import BETTER, FILTERS, RATES, RULED, digits, percent, unit, with_companions
from secvec_jax.evaluation.records import Record, Value, is_number, quoted
from secvec_jax.evaluation.statistics import Difference, SeededScore, paired, seeded_bootstrap
from secvec_jax.evaluation.tables import (
    MAX_COLUMNS,
    label,
    markdown_table,
    show,
    split_evenly,
    split_metrics,
    words,
)
from secvec_jax.printable import markdown, paragraph

RULES_FIELD = "scoring_rules"
"""The version of the rules as a field of a cell: like any other field, it must not be mixed."""

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

_ARROWS = {"higher": " ↑", "lower": " ↓"}


@dataclass(frozen=True)
class Entry:
    """One metric at one place of the table: its score, if any seed has one, and how it compares with the reference."""

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
    """A table of scores, a line of `entries` for each metric at each place.

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
                body.append([*names, _titled(metric), *cells])
                previous = row
            yield markdown_table(header, body, len(self.rows) + 1)

    def _metrics_across(self, texts: pd.DataFrame) -> Iterator[str]:
        wide = texts.pivot(index=list(self.rows), columns="metric", values="text")
        metrics = [metric for metric in self.metrics if metric in wide]
        for part in split_metrics(metrics, MAX_COLUMNS - len(self.rows)):
            shown = wide[part].dropna(how="all").fillna("-")
            header = [*map(words, self.rows), *map(_titled, part)]
            rows = [row if isinstance(row, tuple) else (row,) for row in shown.index]
            body = [[*map(show, row), *cells] for row, cells in zip(rows, shown.to_numpy().tolist(), strict=True)]
            yield markdown_table(header, body, len(self.rows))

    def _texts(self) -> list[str | None]:
        usual, footnotes, most_seeds = self._usual_sizes(), self._footnotes(), self._most_seeds()
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
            parts = [_number(metric, score)]
            if score.n != usual[metric] * score.seeds:
                parts.append(f"n={score.n}")
            if 1 < score.seeds < most_seeds:
                parts.append(f"{score.seeds} seeds")
            if score.seeds == 1 < most_seeds:
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

    def _most_seeds(self) -> int:
        return max((score.seeds for _, score in self._scores()), default=0)

    def _footnotes(self) -> dict[str, str]:
        """Why cells failed -> the mark that refers to it."""
        failures = dict.fromkeys(entry.failure for entry in self.entries["entry"] if entry.failure)
        return {failure: f"({index})" for index, failure in enumerate(failures, 1)}

    def _caption(self) -> str:
        """What is across, the unit of each metric, and how many prompts and seeds the numbers are from."""
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
        parts += [f"n per seed: {_listed(sizes.items())}", f"Seeds: {self._most_seeds()}"]
        return ". ".join(parts) + "."

    def _notes(self) -> Iterable[str]:
        compared = sum(entry.difference is not None for entry in self.entries["entry"])
        if self.reference and compared:
            yield f"▲ ▼ against {self.reference}, {compared} comparison{'' if compared == 1 else 's'}."
        if self._most_seeds() == 1:
            yield "One seed: the intervals do not include how seeds vary."
        if self.shared:
            yield f"The same in all cells: {fields_text(self.shared)}."
        if self.differing:
            yield f"Not shown, and not the same in all cells: {', '.join(map(words, self.differing))}."
        yield from (f"{mark} {failure}" for failure, mark in self._footnotes().items())


def summarize(
    records: Sequence[Record], rows: Sequence[str], columns: Sequence[str], metrics: Sequence[str], reference: str = ""
) -> Summary:
    """Return the summary of `metrics` with the cell fields `rows` down and `columns` across.

    reference: the defense with which each entry is compared, prompt by prompt, at the same other settings. Numbers are
    shown in ascending order and text as it comes. With "refusal" come compliance and the loss of unseen harmful
    replies, requested or not, if they were measured (`metrics.SAFETY`). A cell without a field that others have counts
    as having None there.

    Raises:
        UserError: no records, an axis, a metric or the reference is in none of them, cells that differ in more than
            their seed share a place, or two cells to be compared differ in the number of prompts.
    """
    axes = [*rows, *columns]
    _check(records, axes, rows, metrics)
    frame = _ordered(_frame(records), axes)
    measured = {name for record in records for name in record.metrics}
    shown = with_companions(metrics, measured)
    groups = {place: _by_seed(place, group, axes) for place, group in frame.groupby(axes, observed=True)}

    def compared(place: tuple) -> dict[int, Record]:
        at_reference = (reference if name == "defense" else value for name, value in zip(axes, place, strict=True))
        return groups.get(tuple(at_reference), {}) if reference else {}

    if reference and not any(compared(place) is group for place, group in groups.items()):
        raise UserError(f"no cell with defense {reference} to compare with: name a defense that was run")
    entries = [
        (*place, metric, _entry(group, compared(place), metric)) for place, group in groups.items() for metric in shown
    ]
    varying = [name for name in columns if frame[name].nunique() > 1]
    outside = {name: frame[name].unique() for name in frame if name not in {*rows, *varying, "seed", "record"}}
    return Summary(
        _ordered(pd.DataFrame(entries, columns=[*axes, "metric", "entry"], dtype=object), [*axes, "metric"]),
        tuple(rows),
        tuple(varying),
        f"defense {reference}" if reference else "",
        {name: values[0] for name, values in outside.items() if len(values) == 1},
        tuple(name for name, values in outside.items() if len(values) > 1),
    )


def differences(
    records: Sequence[Record],
    pairs: Sequence[tuple[str, str]],
    columns: Sequence[str],
    metrics: Sequence[str],
) -> Summary | None:
    """Return the summary of the differences between defenses, prompt by prompt; None if no pair has cells in common.

    pairs: (first, second), of which "first minus second" is shown at all settings `columns` that both were run with.
    """
    tables = []
    for first, second in pairs:
        kept = [record for record in records if record.cell.get("defense") in (first, second)]
        measured = [metric for metric in metrics if any(metric in record.metrics for record in kept)]
        if not measured or {record.cell["defense"] for record in kept} != {first, second}:
            continue
        entries = summarize(kept, ["defense"], columns, measured, reference=second).entries
        of_first = entries[entries["defense"] == first]
        of_both = of_first[[entry.difference is not None for entry in of_first["entry"]]]
        as_scores = [replace(entry, score=entry.difference) for entry in of_both["entry"]]
        tables.append(of_both.assign(defense=f"{first} minus {second}", entry=as_scores).astype(object))
    if not sum(map(len, tables)):
        return None
    entries = pd.concat(tables).rename(columns={"defense": "difference"})
    compared = set(entries["metric"])
    in_order = [metric for metric in with_companions(metrics, compared) if metric in compared]
    entries = _ordered(entries, ["difference", *columns])
    entries["metric"] = pd.Categorical(entries["metric"], in_order, ordered=True)
    varying = [name for name in columns if entries[name].nunique() > 1]
    shared = {name: entries[name].iloc[0] for name in columns if name not in varying}
    return Summary(entries, ("difference",), tuple(varying), "the second defense", shared, ())


def fields_text(values: Mapping[str, object]) -> str:
    """Return fields with their values: "defense plain, poison 0.1"."""
    return ", ".join(f"{words(name)} {show(value)}" for name, value in values.items())


def _check(records: Sequence[Record], axes: list[str], rows: Sequence[str], metrics: Sequence[str]) -> None:
    if not records:
        raise UserError("no records to summarize: run some cells first")
    if len(set(axes)) < len(axes):
        raise UserError(f"a field is named twice in {axes}: use it in rows or in columns, once")
    if not rows or not metrics or len(rows) > MAX_COLUMNS // 2:
        raise UserError(f"name at least one metric, and 1 to {MAX_COLUMNS // 2} fields as rows")
    known = {name for record in records for name in record.cell}
    if set(axes) - known:
        raise UserError(f"no cell has {quoted(set(axes) - known)}: the fields are {quoted(known)}")
    measured = {metric for record in records for metric in record.metrics}
    if measured and set(metrics) - measured:
        raise UserError(f"no cell has measured {quoted(set(metrics) - measured)}: there are {quoted(measured)}")


def _frame(records: Sequence[Record]) -> pd.DataFrame:
    """The cells' settings, a line per record; "-" where one lacks a field. The record itself is in "record"."""
    fields = dict.fromkeys(name for record in records for name in record.cell)
    cells = []
    for record in records:
        values = {name: "-" if record.cell.get(name) is None else record.cell[name] for name in fields}
        cells.append(values | {RULES_FIELD: record.rules, "record": record})
    return pd.DataFrame(cells, dtype=object)


def _ordered(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The frame with the columns `names` as ordered categories: numbers ascending, then text as it comes."""
    frame = frame.copy()
    for name in names:
        values = list(dict.fromkeys(frame[name]))
        numbers = sorted(value for value in values if is_number(value))
        others = [value for value in values if not is_number(value)]
        frame[name] = pd.Categorical(frame[name], [*numbers, *others], ordered=True)
    return frame


def _by_seed(place: tuple, group: pd.DataFrame, axes: Sequence[str]) -> dict[int, Record]:
    """Seed -> record, of the cells at one place."""
    mixed = [name for name in group if name not in (*axes, "seed", "record") and group[name].nunique() > 1]
    if mixed:
        where = fields_text(dict(zip(axes, place, strict=True)))
        raise UserError(f"cells with {where} differ in {quoted(mixed)}: use it in rows or columns")
    by_seed: dict[int, Record] = {}
    for seed, record in zip(group["seed"], group["record"], strict=True):
        if seed in by_seed:
            raise UserError(f"two records of one cell ({fields_text(record.cell)}): delete one of them")
        by_seed[seed] = record
    return dict(sorted(by_seed.items()))


def _entry(group: dict[int, Record], other: dict[int, Record], metric: str) -> Entry:
    failure, ours, theirs = _failure(group), _finished(group, metric), _finished(other, metric)
    if not ours:
        return Entry(None, failure=failure)
    score = seeded_bootstrap(list(ours.values()))
    if metric in (*RATES, *FILTERS):
        low, high = score.ci95
        score = replace(score, ci95=(max(low, 0.0), min(high, 1.0)))
    common = [seed for seed in ours if seed in theirs]
    if metric in RULED:  # scores by other rules are another measure
        common = [seed for seed in common if group[seed].rules == other[seed].rules]
    if other is group or not common:
        return Entry(score, failure=failure)
    try:
        difference = paired([ours[seed] for seed in common], [theirs[seed] for seed in common])
    except UserError as error:
        cell = fields_text(group[common[0]].cell)
        raise UserError(f"{metric} of {cell} against the reference: {error}") from None
    return Entry(score, difference, failure)


def _finished(group: dict[int, Record], metric: str) -> dict[int, Sequence[float]]:
    return {
        seed: record.metrics[metric]
        for seed, record in group.items()
        if record.error is None and metric in record.metrics
    }


def _failure(group: dict[int, Record]) -> str:
    seeds_by_reason: dict[str, list[str]] = {}
    for seed, record in group.items():
        if record.error is not None:
            seeds_by_reason.setdefault(" ".join(record.error.split()), []).append(str(seed))
    return "; ".join(
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)} failed: {reason}"
        for reason, seeds in seeds_by_reason.items()
    )


def _number(metric: str, score: SeededScore) -> str:
    """A score with its interval, without the unit."""
    if isinstance(score, Difference):
        number = _points if metric in RATES else _signed
    else:
        number = percent if metric in RATES else digits
    parts = [number(score.value)]
    if score.n > 1:
        parts.append("[{}, {}]".format(*map(number, score.ci95)))
    if isinstance(score, Difference) and score.by_seed and score.n > score.seeds:
        parts.append("t [{}, {}]".format(*map(number, score.by_seed)))
    return " ".join(parts)


def _points(rate: float) -> str:
    return f"{round(100 * rate, 1) + 0.0:+.1f}"  # + 0.0: never "-0.0"


def _signed(value: float) -> str:
    return ("" if value < 0 else "+") + digits(value)


def _titled(metric: str) -> str:
    return words(metric) + _ARROWS.get(BETTER.get(metric, ""), "")


def _listed(groups: Iterable[tuple[str, list[str]]]) -> str:
    """ "% (refusal, compliance), nats per token (harmful loss)" """
    return ", ".join(f"{name} ({', '.join(metrics)})" for name, metrics in groups)
