"""Summarize the records of a grid in one table: seeds averaged, defenses compared prompt by prompt.

Only seeds are ever averaged: all other settings must be the same within one entry of the table.
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from secvec_jax.errors import UserError
from secvec_jax.evaluation.metrics import FILTERS, RATES, RULED, is_rate, with_companions
from secvec_jax.evaluation.records import Record, is_number, quoted
from secvec_jax.evaluation.statistics import paired, seeded_bootstrap
from secvec_jax.evaluation.summary import Entry, Summary, fields_text
from secvec_jax.evaluation.tables import MAX_COLUMNS

RULES_FIELD = "scoring_rules"
"""The version of the rules as a field of a cell: like any other field, it must not be mixed."""


def summarize(
    records: Sequence[Record], rows: Sequence[str], columns: Sequence[str], metrics: Sequence[str], reference: str = ""
) -> Summary:
    """Return the summary of `metrics` with the cell fields `rows` down and `columns` across.

    reference: the defense with which each entry is compared, prompt by prompt, at the same other settings. Numbers are
    shown in ascending order and text as it comes. With "refusal" come compliance and the loss of unseen harmful
    replies, requested or not, if they were measured (`metrics.SAFETY`). A cell without a field that others have counts
    as having None there.

    Raises:
        UserError: no records; an axis, a metric or the reference is in none of them; cells of one entry differ in
            more than their seed; or two cells to be compared differ in the number of prompts.
    """
    axes = [*rows, *columns]
    _check(records, axes, rows, metrics)
    frame = _ordered(_frame(records), axes)
    measured = {name for record in records for name in record.metrics}
    shown = with_companions(metrics, measured)
    groups = {values: _by_seed(values, group, axes) for values, group in frame.groupby(axes, observed=True)}

    def compared(axis_values: tuple) -> dict[int, Record]:
        pairs = zip(axes, axis_values, strict=True)
        at_reference = (reference if name == "defense" else value for name, value in pairs)
        return groups.get(tuple(at_reference), {}) if reference else {}

    if reference and not any(compared(axis_values) is group for axis_values, group in groups.items()):
        raise UserError(f"no cell with defense {reference} to compare with: name a defense that was run")
    entries = [
        (*axis_values, metric, _entry(group, compared(axis_values), metric))
        for axis_values, group in groups.items()
        for metric in shown
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


def _by_seed(axis_values: tuple, group: pd.DataFrame, axes: Sequence[str]) -> dict[int, Record]:
    """Seed -> record, of the cells with these values of the axes."""
    finished = group[[record.error is None for record in group["record"]]]
    mixed = [name for name in group if name not in (*axes, "seed", "record") and finished[name].nunique() > 1]
    if mixed:
        position = fields_text(dict(zip(axes, axis_values, strict=True)))
        raise UserError(f"cells with {position} differ in {quoted(mixed)}: use it in rows or columns")
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
    score = seeded_bootstrap(list(ours.values()), is_rate=is_rate(metric))
    if metric in (*RATES, *FILTERS):
        low, high = score.ci95
        score = replace(score, ci95=(max(low, 0.0), min(high, 1.0)))
    common = [seed for seed in ours if seed in theirs]
    if metric in RULED:  # scores by other rules are a different measure
        common = [seed for seed in common if group[seed].rules == other[seed].rules]
    if other is group or not common:
        return Entry(score, failure=failure)
    try:
        first, second = ([scores[seed] for seed in common] for scores in (ours, theirs))
        difference = paired(first, second, is_rate=is_rate(metric))
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
