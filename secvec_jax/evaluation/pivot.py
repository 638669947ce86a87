"""From the cells of a grid to tables: seeds put together, defenses beside each other, real differences marked.

`train.py grid` leaves one JSON file a cell in `cells/`:

    {"cell": {"defense": "plain", "attack": "harmful", "poison": 0.1, ..., "seed": 0},
     "metrics": {"refusal": [1.0, 0.0, ...], "drift": [0.3], ...}, "seconds": 93.1, "error": null, "rules": 2}

`rules` is the version of the rules that read the replies (`scorers.RULES`); a cell without it is of version 1.

A metric has one number a prompt; null in place of a number stands for what is undefined (the AUROC of a filter where
there is nothing to find), and such a metric counts as missing. A cell that failed tells why in `error`, in one line.

`pivot` lays such records out as a `Table`: what is not an axis must be the same within a place of the table, so
nothing but seeds is ever averaged.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import cast

from secvec_jax.errors import UserError
from secvec_jax.evaluation.columns import with_companions
from secvec_jax.evaluation.metrics import BETTER, FILTERS, RATES, RULED
from secvec_jax.evaluation.statistics import paired, seeded_bootstrap
from secvec_jax.evaluation.tables import Cell, Place, Table, Value, is_number, names, told

# -------------------------------------------------------------------------------------------------- the records


RULES_FIELD = "scoring_rules"
"""What a table calls the version of the rules, by which cells are kept apart like by any other field."""


@dataclass(frozen=True)
class Record:
    """One cell of a grid: what was run, one number a prompt for each metric, how long it took, why it failed."""

    cell: Mapping[str, Value]
    metrics: Mapping[str, Sequence[float]]
    seconds: float
    error: str | None = None
    rules: int = 1
    inputs: Mapping[str, str | None] = field(default_factory=dict)
    """The content of what it was made of; empty in cells of versions that did not record it."""

    @classmethod
    def from_dict(cls, contents: dict, source: str = "this record") -> "Record":
        """Read the form above; metrics that are null on every prompt are left out.

        Raises:
            UserError: a field is missing, unknown or of another type; the message starts with `source`.
        """

        def demand(holds: bool, what: str) -> None:
            if not holds:
                raise UserError(f"{source}: {what}; see secvec_jax/evaluation/pivot.py for the form")

        known = [item.name for item in fields(cls)]
        demand(isinstance(contents, dict), "not an object")
        demand(set(contents) <= set(known), f"unknown {names(set(contents) - set(known))}: there are {names(known)}")
        missing = set(known) - set(contents) - {"rules", "inputs"}  # which earlier versions did not write
        demand(not missing, f"no {names(missing)}")
        cell, metrics, error = contents["cell"], contents["metrics"], contents["error"]
        demand(isinstance(cell, dict) and isinstance(cell.get("seed"), int), "'cell' must be an object with a seed")
        for name, value in cell.items():
            plain = value is None or isinstance(value, str | bool) or is_number(value)
            demand(plain, f"'{name}' of the cell must be text, a finite number, true, false or null")
        demand(is_number(contents["seconds"]), "'seconds' must be a number")
        demand(error is None or bool(error and isinstance(error, str)), "'error' must be null or one line")
        rules = contents.get("rules", 1)
        demand(
            isinstance(rules, int) and not isinstance(rules, bool) and rules > 0,
            "'rules' must be a version, 1 or above",
        )
        demand(isinstance(metrics, dict), "'metrics' must be an object")
        demand(bool(metrics or error), "neither metrics nor an error")
        for name, values in metrics.items():
            demand(isinstance(values, list) and bool(values), f"'{name}' must be a list with one number a prompt")
            alike = all(map(is_number, values)) or all(value is None for value in values)
            demand(alike, f"'{name}' must hold finite numbers, or null only")
        defined = {name: tuple(values) for name, values in metrics.items() if values[0] is not None}
        inputs = contents.get("inputs", {})
        demand(isinstance(inputs, dict), "'inputs' must be an object")
        return cls(cell, defined, contents["seconds"], error, rules, inputs)


def read(folder: str | Path) -> list[Record]:
    """Return the records of all finished and failed cells in `folder`/cells, by file name.

    Raises:
        UserError: there are none, or one is malformed.
    """
    paths = sorted((Path(folder) / "cells").glob("*.json"))
    if not paths:
        raise UserError(f"no cells/*.json in {folder}: give the folder of a grid with finished cells")
    return [_read(path) for path in paths]


def _read(path: Path) -> Record:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): delete it and run the grid again to rewrite it") from None
    return Record.from_dict(contents, str(path))


# ---------------------------------------------------------------------------------------------------- the pivot


def pivot(
    records: Sequence[Record],
    rows: Sequence[str],
    columns: Sequence[str],
    metrics: Sequence[str],
    reference: Mapping[str, Value] | str | None = None,
    *,
    where: Mapping[str, Value | Collection[Value]] | None = None,
    order: Mapping[str, Sequence[Value]] | None = None,
    better: Mapping[str, str] = BETTER,
    rates: Collection[str] = RATES,
) -> Table:
    """Return the table of `metrics` with the cell fields `rows` down and `columns` across.

    `where` keeps the records whose fields have these values (one, or a collection to choose from). `reference` names
    the place that each cell is compared with, prompt by prompt: the cell's own place with these fields put in, so
    `{"defense": "plain"}` compares every column within itself; a bare string is a value of the first of `rows`.
    `order` lists the values of fields in the order to show them; values that it does not list follow, numbers
    ascending and text as it comes. Next to "refusal" stand compliance and the loss of unseen harmful replies, asked
    for or not, where they were measured: see `columns`. `better` says of a metric whether "higher" or "lower" is
    better, and `rates` which metrics are shown in percent. A cell without a field that others have counts as having
    None there.

    Raises:
        UserError: nothing is left to show, an axis, a metric or the reference is in no record, cells that differ in
            more than their seed share a place, or two cells to be compared differ in the number of prompts.
    """
    versioned = [replace(record, cell={**record.cell, RULES_FIELD: record.rules}) for record in records]
    kept = [record for record in versioned if _matches(record, where or {})]
    if not kept:
        raise UserError(f"no record with {told(where or {}) or 'anything in it'}: mend `where`, or run those cells")
    _check(kept, rows, columns, metrics, better)
    metrics = with_companions(metrics, {name for record in kept for name in record.metrics})
    axes = (*rows, *columns)
    groups = _groups(kept, axes)
    fixed = {rows[0]: reference} if isinstance(reference, str) else dict(reference or {})

    def compared(place: Place) -> Place:
        return tuple(fixed.get(name, value) for name, value in zip(axes, place, strict=True))

    if fixed and (set(fixed) - set(axes) or not any(compared(place) == place for place in groups)):
        raise UserError(f"no cell with {told(fixed)} to compare with: name values of rows or columns that were run")
    ranks = [_ranks([place[i] for place in groups], (order or {}).get(name, ())) for i, name in enumerate(axes)]
    ranked = {tuple(rank[value] for rank, value in zip(ranks, place, strict=True)): place for place in groups}
    wide = len(rows)
    outside = _outside(kept, {*axes, "seed"})
    return Table(
        rows=tuple(rows),
        columns=tuple(columns),
        metrics=tuple(metrics),
        down=tuple({key[:wide]: ranked[key][:wide] for key in sorted(ranked)}.values()),
        across=tuple({key[wide:]: ranked[key][wide:] for key in sorted(ranked, key=lambda key: key[wide:])}.values()),
        cells={
            (place[:wide], place[wide:], metric): _cell(group, groups.get(compared(place)), metric, better.get(metric))
            for place, group in groups.items()
            for metric in metrics
        },
        reference=told(fixed),
        shared={name: values[0] for name, values in outside.items() if len(values) == 1},
        differing=tuple(name for name, values in outside.items() if len(values) > 1),
        better=better,
        rates=rates,
    )


def differences(
    records: Sequence[Record], pairs: Sequence[tuple[Value, Value]], rows: Sequence[str], metrics: Sequence[str]
) -> Table | None:
    """Return the table of the differences between defenses, prompt by prompt; None if no pair has cells in common.

    pairs: (first, second), of which "first minus second" is shown, a line for each combination of the fields `rows`
    that both were run with. The other options of `pivot` have their defaults.
    """
    down: list[Place] = []
    cells: dict[tuple[Place, Place, str], Cell] = {}
    table = None
    for first, second in pairs:
        kept = [record for record in records if record.cell.get("defense") in (first, second)]
        if {record.cell["defense"] for record in kept} != {first, second}:
            continue
        measured = [metric for metric in metrics if any(metric in record.metrics for record in kept)]
        if not measured:
            continue
        table = pivot(kept, ("defense", *rows), (), measured, {"defense": second})
        for place in table.down:
            compared = {metric: table.cells[place, (), metric] for metric in table.metrics}
            if place[0] == first and any(cell.difference for cell in compared.values()):
                down.append((f"{first} minus {second}", *place[1:]))
                for metric, cell in compared.items():
                    cells[down[-1], (), metric] = replace(cell, score=cell.difference)
    if table is None or not down:
        return None
    shown = with_companions(metrics, {metric for *_, metric in cells})
    return replace(
        table,
        rows=("difference", *rows),
        metrics=tuple(metric for metric in shown if any(metric == name for *_, name in cells)),
        down=tuple(down),
        cells=cells,
        reference="the second defense",
        shared={},
        differing=(),
    )


def _matches(record: Record, where: Mapping[str, Value | Collection[Value]]) -> bool:
    choices = {name: wanted if isinstance(wanted, list | tuple | set) else [wanted] for name, wanted in where.items()}
    return all(name in record.cell and record.cell[name] in wanted for name, wanted in choices.items())


def _check(
    records: list[Record],
    rows: Sequence[str],
    columns: Sequence[str],
    metrics: Sequence[str],
    better: Mapping[str, str],
) -> None:
    if any(isinstance(several, str) for several in (rows, columns, metrics)) or not rows or not metrics:
        raise UserError("rows, columns and metrics are lists of names; name at least one row field and one metric")
    if set(better.values()) - {"higher", "lower"}:
        raise UserError(f"better is 'higher' or 'lower', not {names(set(better.values()) - {'higher', 'lower'})}")
    axes = [*rows, *columns]
    if len(set(axes)) < len(axes):
        raise UserError(f"a field is named twice in {axes}: use it in rows or in columns, once")
    known = {name for record in records for name in record.cell}
    if set(axes) - known:
        raise UserError(f"no cell has {names(set(axes) - known)}: there are {names(known)}")
    measured = {metric for record in records for metric in record.metrics}
    if measured and set(metrics) - measured:
        raise UserError(f"no cell has measured {names(set(metrics) - measured)}: there are {names(measured)}")


def _groups(records: list[Record], axes: Sequence[str]) -> dict[Place, dict[int, Record]]:
    """Place -> seed -> record."""
    groups: dict[Place, dict[int, Record]] = {}
    for record in records:
        group = groups.setdefault(tuple(record.cell.get(name) for name in axes), {})
        first = next(iter(group.values()), record)
        mixed = [name for name, values in _outside([first, record], {"seed"}).items() if len(values) > 1]
        if mixed:
            what = told({name: record.cell.get(name) for name in axes})
            raise UserError(f"cells with {what} differ in {names(mixed)}: use it in rows, columns or `where`")
        seed = cast(int, record.cell["seed"])  # as `Record.from_dict` saw to
        if seed in group:
            raise UserError(f"two records of one cell ({told(record.cell)}): delete one of them")
        group[seed] = record
    return groups


def _outside(records: list[Record], inside: Collection[str]) -> dict[str, list[Value]]:
    """The values, each once, of the fields that are not `inside`; None where a cell lacks the field."""
    outer = dict.fromkeys(name for record in records for name in record.cell if name not in inside)
    return {name: list(dict.fromkeys(record.cell.get(name) for record in records)) for name in outer}


def _ranks(values: list[Value], listed: Sequence[Value]) -> dict[Value, int]:
    others = [value for value in dict.fromkeys(values) if value not in listed]
    numbers = sorted(value for value in others if is_number(value))
    return {value: rank for rank, value in enumerate(dict.fromkeys([*listed, *numbers, *others]))}


def _cell(group: dict[int, Record], other: dict[int, Record] | None, metric: str, better: str | None) -> Cell:
    failure, ours, theirs = _failure(group), _by_seed(group, metric), _by_seed(other or {}, metric)
    if not ours:
        return Cell(None, failure=failure)
    score = seeded_bootstrap(list(ours.values()))
    if metric in (*RATES, *FILTERS):
        low, high = score.ci95
        score = replace(score, ci95=(max(low, 0.0), min(high, 1.0)))
    common = [seed for seed in ours if seed in theirs]
    if metric in RULED:  # what other rules read is another measure
        common = [seed for seed in common if other and group[seed].rules == other[seed].rules]
    if other is group or not common:
        return Cell(score, failure=failure)
    try:
        difference = paired([ours[seed] for seed in common], [theirs[seed] for seed in common])
    except UserError as error:
        raise UserError(f"{metric} of {told(group[common[0]].cell)} against the reference: {error}") from None
    return Cell(score, difference, failure, better)


def _by_seed(group: dict[int, Record], metric: str) -> dict[int, Sequence[float]]:
    finished = {seed: record.metrics for seed, record in sorted(group.items()) if record.error is None}
    return {seed: metrics[metric] for seed, metrics in finished.items() if metric in metrics}


def _failure(group: dict[int, Record]) -> str:
    reasons: dict[str, list[str]] = {}
    for seed, record in sorted(group.items()):
        if record.error is not None:
            reasons.setdefault(" ".join(record.error.split()), []).append(str(seed))
    lines = {", ".join(seeds): reason for reason, seeds in reasons.items()}
    return "; ".join(f"seed{'s' if ',' in seeds else ''} {seeds} failed: {reason}" for seeds, reason in lines.items())
