"""The results of a run: results.json, and the tables, report and plots made from it.

results.json is the single source. The table in the terminal, report.md and the comparison of runs are views of it, so
they cannot disagree:

    {"schema_version": 1, "command": "...", "config": {...}, "environment": {...}, "seconds": {stage: s},
     "rows": [{"name": "...", "metrics": {metric: {"value": v, "n": n, "ci95": [low, high], "rules": 2}}}]}

`schema_version` is the version of this form; files of versions that did not write it have the form of version 1.
`rules` is the version of the rules that scored the replies, for metrics scored by rules (`metrics.RULED`); a score
without it is of version 1.

JSON has no NaN: a number that is not finite is stored as null and shown as "-". Files are written under a temporary
name and then renamed, so a crash never replaces a good file with half of one.
"""

import json
import math
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Group
from rich.table import Table

from secvec_jax.errors import UserError
from secvec_jax.evaluation.metrics import RATES, Curves, digits, in_order, percent, rules_note
from secvec_jax.evaluation.tables import MAX_COLUMNS, markdown_table, split_metrics, terminal_table, words
from secvec_jax.files import atomic_file, check_regular, resolved
from secvec_jax.printable import fenced, paragraph

Verdict = tuple[str, bool, str]  # claim, whether it holds, detail
_NamedRow = tuple[tuple[str, ...], dict]  # the texts of the columns that name a row, and the row

FILE = "results.json"
SCHEMA_VERSION = 1
"""Of results.json: to be raised whenever an older version of this package could not read the file."""
_LARGEST = 1e15
"""Of the numbers of a file: larger ones are no scores, times or counts."""
_DEEPEST = 40
"""Levels of nesting in a file."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")

# ------------------------------------------------------------------------------------------------ the file


@dataclass
class Results:
    """One run: its command and settings, its environment, the seconds of each stage, and a row per model."""

    command: str
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def save(self, folder: str | Path) -> Path:
        """Write results.json into `folder`, created if missing, and return its path.

        Raises:
            UserError: the contents do not have the form above, or cannot be represented in JSON.
        """
        contents = _jsonable(asdict(self))
        _check(contents, source="these results")
        text = json.dumps(contents, indent=2, allow_nan=False) + "\n"
        return _write(Path(folder) / FILE, text.encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Read and check the results.json in `folder`.

        Raises:
            UserError: the file is missing, malformed, or of another schema version.
        """
        path = Path(folder) / FILE
        check_regular(path, max_bytes=2**28)
        try:
            contents = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except OSError:
            raise UserError(f"no readable {path}: give the folder of a finished run") from None
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}): rerun to rewrite it") from None
        except RecursionError:
            raise UserError(f"{path} is nested too deep: rerun to rewrite it") from None
        if isinstance(contents, dict):
            contents = {"schema_version": 1} | contents  # files of version 0.1 have none
        _check(contents, source=str(path))
        return cls(**{item.name: contents[item.name] for item in fields(cls)})


def environment() -> dict:
    """Return Python's and the packages' versions (None if absent), the platform and the usable CPU count."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only; respects the limits of containers
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(affinity(0)) if affinity else os.cpu_count(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")


def _jsonable(value):
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    raise UserError(f"results cannot hold a {type(value).__name__}: convert it to numbers or text first")


def _check(contents, source: str) -> None:
    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{source}: {what}; see secvec_jax/evaluation/report.py for the form")

    require(not _is_deeper(contents, _DEEPEST), f"its values are nested deeper than {_DEEPEST} levels")

    require(isinstance(contents, dict), "not an object")
    version = contents.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UserError(
            f"{source}: schema_version is {version!r}, and this version of secvec_jax reads {SCHEMA_VERSION}: "
            "use the version that wrote the file, or rerun"
        )
    kinds = {"command": str, "config": dict, "environment": dict, "seconds": dict, "rows": list}
    for name, kind in kinds.items():
        require(isinstance(contents.get(name), kind), f"'{name}' must be a {kind.__name__}")
    for stage, seconds in contents["seconds"].items():
        require(_is_number(seconds), f"the seconds of '{stage}' must be a number")
    for row in contents["rows"]:
        require(isinstance(row, dict) and isinstance(row.get("name"), str), "each row needs a 'name'")
        require(isinstance(row.get("metrics"), dict), f"row '{row['name']}' needs 'metrics'")
        for metric, score in row["metrics"].items():
            require(_is_score(score), f"'{metric}' of row '{row['name']}' needs value, n and ci95 [low, high]")


def _is_deeper(value, levels: int) -> bool:
    """Whether lists and objects are nested in more than so many levels."""
    level = [value]
    for _ in range(levels):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(item, dict | list) for item in level)


def _is_score(score) -> bool:
    if not isinstance(score, dict) or not isinstance(score.get("ci95"), list) or len(score["ci95"]) != 2:
        return False
    return (
        _is_count(score.get("n"))
        and _is_count(score.get("rules", 1))
        and "value" in score
        and all(_is_number(number) for number in (score["value"], *score["ci95"]))
    )


def _is_number(value) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and abs(value) <= _LARGEST)  # NaN is not


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _write(path: Path, contents: bytes) -> Path:
    with atomic_file(path) as staging:
        staging.write_bytes(contents)
    return path


# ---------------------------------------------------------------------------------------------- the tables


def table(results: Results) -> Group:
    """Return the tables for the terminal, a line per row: rates in percent with their 95% interval, losses without.

    A metric's n is in the header if all rows share it, else in each cell. Metrics beyond eight columns are in a second
    table. On a narrower console the cells are wrapped.
    """
    return _terminal_tables([((row["name"],), row) for row in results.rows], ["model"])


def compare(folders: Iterable[str | Path]) -> Group:
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
    return _terminal_tables(rows, ["run", "model"])


def scores_table(rows: Sequence[dict]) -> str:
    """Return the rows' metrics in Markdown, each with its n and interval, in tables of at most eight columns."""
    named = [((row["name"],), row) for row in rows]
    tables = []
    for columns, body in _parts(named, names=1):
        header = ["model", *(f"{column.title} ({column.n})" if column.n else column.title for column in columns)]
        tables.append(markdown_table(header, body))
    return "\n\n".join(tables)


def _terminal_tables(named: Sequence[_NamedRow], titles: list[str]) -> Group:
    views: list[Table | str] = []
    for columns, body in _parts(named, names=len(titles), intervals=RATES):
        header = [*titles, *(f"{column.title}\n{column.n}".rstrip() for column in columns)]
        view = terminal_table(header, body, left=len(titles))
        views += ["", view] if views else [view]
    return Group(*views)


class _Column(NamedTuple):
    title: str
    n: str  # "n=64" if all rows share it, else ""
    cells: list[str]


def _parts(
    named: Sequence[_NamedRow], names: int, intervals: Collection[str] | None = None
) -> list[tuple[list[_Column], list[list[str]]]]:
    """The columns and the body of each table. intervals: the metrics to show with their interval; None: all.

    Rows without any metric of a part are left out of it.
    """
    rows = [row for _, row in named]
    parts = []
    several = split_metrics(in_order(rows), MAX_COLUMNS - names) or [[]]
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
    return _Column(words(metric), shared, [_cell(metric, score, with_interval, not shared) for score in scores])


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
    contents = _jsonable(asdict(results))
    _check(contents, source="these results")
    results = Results(**contents)
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
