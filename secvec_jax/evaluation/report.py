"""What a run leaves for its readers: results.json, and everything that is drawn from it.

results.json is the one source. The table in the terminal, report.md and the comparison of runs are views of
it, so two views cannot disagree:

    {"command": "...", "config": {...}, "environment": {...}, "seconds": {stage: s},
     "rows": [{"name": "...", "metrics": {metric: {"value": v, "n": n, "ci95": [low, high], "rules": 2}}}]}

`rules` is there where rules read the score off replies (`metrics.RULED`); without it they were those of version 1.

JSON has no NaN: a number that is not finite is stored as null and shown as "-". Files are written beside
their place and then moved into it, so a crash never leaves half a file where a good one was.
"""

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from secvec_jax.errors import UserError
from secvec_jax.evaluation.columns import MAX_COLUMNS, split
from secvec_jax.evaluation.metrics import RATES, in_order, percent, rules_note
from secvec_jax.evaluation.plots import Curves, colors_of, plot_losses, plot_scores, png

Verdict = tuple[str, bool, str]  # claim, whether it holds, detail

FILE = "results.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")

# ------------------------------------------------------------------------------------------------ the file


@dataclass
class Results:
    """One run: what was asked, where it ran, how long each stage took (seconds), and a row per model."""

    command: str
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)

    def save(self, folder: str | Path) -> Path:
        """Write results.json into `folder`, made if need be, and return its path.

        Raises:
            UserError: the contents do not have the form above, or hold something that JSON has no form for.
        """
        contents = _jsonable(asdict(self))
        _check(contents, source="these results")
        text = json.dumps(contents, indent=2, allow_nan=False) + "\n"
        return _write(Path(folder) / FILE, text.encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Read and check the results.json in `folder`.

        Raises:
            UserError: the file is missing or malformed.
        """
        path = Path(folder) / FILE
        try:
            contents = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except OSError:
            raise UserError(f"no readable {path}: give the folder of a finished run") from None
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}): run again to rewrite it") from None
        _check(contents, source=str(path))
        return cls(**{item.name: contents[item.name] for item in fields(cls)})


def environment() -> dict:
    """Return Python's and the packages' versions (None if absent), the platform and the usable CPU count."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only; knows the limits of containers
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
    raise ValueError(f"{name} is no JSON number")


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
    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{source}: {what}; see secvec_jax/evaluation/report.py for the form")

    demand(isinstance(contents, dict), "not an object")
    for item in fields(Results):
        kind = str if item.name == "command" else list if item.name == "rows" else dict
        demand(isinstance(contents.get(item.name), kind), f"'{item.name}' must be a {kind.__name__}")
    for stage, seconds in contents["seconds"].items():
        demand(_is_number(seconds), f"the seconds of '{stage}' must be a number")
    for row in contents["rows"]:
        demand(isinstance(row, dict) and isinstance(row.get("name"), str), "each row needs a 'name'")
        demand(isinstance(row.get("metrics"), dict), f"row '{row['name']}' needs 'metrics'")
        for metric, score in row["metrics"].items():
            demand(_is_score(score), f"'{metric}' of row '{row['name']}' needs value, n and ci95 [low, high]")


def _is_score(score) -> bool:
    if not isinstance(score, dict) or not isinstance(score.get("ci95"), list) or len(score["ci95"]) != 2:
        return False
    return (
        isinstance(score.get("n"), int)
        and "value" in score
        and all(_is_number(number) for number in (score["value"], *score["ci95"]))
    )


def _is_number(value) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _write(path: Path, contents: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(contents)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------------------------------------- the tables


def table(results: Results) -> Group:
    """Return the terminal's tables, a line a row: rates in percent with their 95% interval, losses without.

    A column's n stands in its head when all rows share it, else in each cell. No table has more than eight columns: the
    metrics beyond are in a second one. A console that is narrower still folds the cells.
    """
    return _terminal_tables([(row["name"], row) for row in results.rows], ["model"])


def compare(folders: Iterable[str | Path]) -> Group:
    """Return tables of the rows of several runs, with the run in the first column.

    Only each folder's results.json is read. Runs whose folders share a name are told apart by their paths.

    Raises:
        UserError: no folder is given, or a results.json is missing or malformed.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if not paths:
        raise UserError("nothing to compare: give one or more folders of finished runs")
    names = [path.name for path in paths]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    runs = [Results.load(path) for path in paths]
    rows = [(label, row["name"], row) for label, run in zip(labels, runs, strict=True) for row in run.rows]
    return _terminal_tables(rows, ["run", "model"])


def _terminal_tables(labeled: Sequence[tuple], titles: list[str]) -> Group:
    """labeled: the texts of the columns that name a row, and the row itself."""
    views: list[Table | str] = []
    for columns, shown in _parts([row for *_, row in labeled], MAX_COLUMNS - len(titles), intervals=RATES):
        view = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), highlight=False)
        for title in titles:
            view.add_column(title, no_wrap=True, overflow="fold")
        for header, n, _ in columns:
            view.add_column(Text(f"{header.replace('_', ' ')}\n{n}".rstrip()), justify="right", overflow="fold")
        for index in shown:
            cells = [cells[index] for *_, cells in columns]
            view.add_row(*map(Text, (*labeled[index][:-1], *cells)))  # Text, because "[91, 100]" is no markup
        views += ["", view] if views else [view]
    return Group(*views)


_Column = tuple[str, str, list[str]]  # a metric, its shared "n=..." or "", and its cells


def _parts(
    rows: Sequence[dict], room: int, intervals: Sequence[str] | None = None
) -> list[tuple[list[_Column], list[int]]]:
    """The columns of each table of at most `room` metrics, and which rows have any of them."""
    columns = {column[0]: column for column in _columns(rows, intervals)}
    parts = split(list(columns), [None], room)
    if len(parts) == 1:
        return [(list(columns.values()), list(range(len(rows))))]
    return [
        ([columns[m] for m in metrics], [i for i, row in enumerate(rows) if any(m in row["metrics"] for m in metrics)])
        for metrics, _ in parts
    ]


def _columns(rows: Sequence[dict], intervals: Sequence[str] | None = None) -> list[_Column]:
    """Each metric; `intervals` limits which of them show theirs."""
    columns = []
    for metric in in_order(rows):
        scores = [row["metrics"].get(metric) for row in rows]
        sizes = {score["n"] for score in scores if score}
        shared = f"n={sizes.pop()}" if len(sizes) == 1 else ""
        with_interval = intervals is None or metric in intervals
        cells = [_cell(metric, score, with_interval, with_n=not shared) for score in scores]
        columns.append((metric, shared, cells))
    return columns


def _cell(metric: str, score: dict | None, with_interval: bool, with_n: bool) -> str:
    if score is None or score["value"] is None:
        return "-"
    is_rate = metric in RATES
    text = f"{percent(score['value'])}%" if is_rate else _digits(score["value"])
    if with_interval and score["n"] > 1 and None not in score["ci95"]:
        show = percent if is_rate else _digits
        text += " [{}, {}]".format(*map(show, score["ci95"]))
    return f"{text} n={score['n']}" if with_n else text


def _digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


# ---------------------------------------------------------------------------------------------- the report


def markdown(
    results: Results,
    verdicts: Sequence[Verdict] = (),
    images: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return report.md: command, scores with n and interval, verdicts, notes, images, time, environment.

    `verdicts` are (claim, whether it holds, detail); `images` are paths relative to the report; `notes` are
    paragraphs on what the numbers do and do not say.
    """
    seconds = [[stage, _seconds(spent)] for stage, spent in results.seconds.items()]
    total = sum(spent for spent in results.seconds.values() if spent is not None)
    parts = [
        "# Report",
        f"```bash\n{results.command}\n```",
        "## Scores",
        scores_table(results.rows),
        f"Brackets hold 95% intervals, n is the number of prompts or examples. {rules_note(results.rows)}".rstrip(),
    ]
    if verdicts:
        lines = [f"- [{'x' if holds else ' '}] {claim}: {detail}" for claim, holds, detail in verdicts]
        parts += ["## Claims", "\n".join(lines)]
    if notes:
        parts += ["## Notes", *notes]
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

    scores.png is drawn when a row has a rate, losses.png when `curves` hold a positive loss:
    `{row name: {"harmful": [(step, loss), ...], "benign": [...]}}`. results.json is `Results.save`'s.

    Raises:
        UserError: the results do not have the form of results.json.
    """
    folder = Path(folder)
    contents = _jsonable(asdict(results))
    _check(contents, source="these results")
    results = Results(**contents)
    colors = colors_of([*(row["name"] for row in results.rows), *(curves or {})])
    plots = {
        "scores.png": plot_scores(results.rows, colors),
        "losses.png": plot_losses(curves or {}, colors),
    }
    drawn = {name: figure for name, figure in plots.items() if figure is not None}
    for name, figure in drawn.items():
        _write(folder / name, png(figure))
    return _write(folder / "report.md", markdown(results, verdicts, list(drawn), notes).encode())


def scores_table(rows: Sequence[dict]) -> str:
    """The rows' metrics in Markdown, each with its n and interval, in tables of at most eight columns."""
    tables = []
    for columns, shown in _parts(rows, MAX_COLUMNS - 1):
        header = ["model", *(f"{metric.replace('_', ' ')} ({n})" if n else metric for metric, n, _ in columns)]
        body = [[rows[index]["name"], *(cells[index] for *_, cells in columns)] for index in shown]
        tables.append(markdown_table(header, body))
    return "\n\n".join(tables)


def environment_table(results: Results) -> str:
    """Versions and devices in Markdown."""
    facts = [[name, _fact(value)] for name, value in results.environment.items()]
    return markdown_table(["what", "value"], facts, align_right=False)


def markdown_table(header: list[str], rows: list[list[str]], align_right: bool = True) -> str:
    """A table whose columns behind the first are aligned to the right or all to the left."""
    rule = ["---"] + ["---:" if align_right else "---"] * (len(header) - 1)
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _fact(value) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
