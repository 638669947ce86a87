"""What a run leaves for its readers: results.json, and everything that is drawn from it.

results.json is the one source. The table in the terminal, report.md and the comparison of runs are views of
it, so two views cannot disagree:

    {"command": "...", "config": {...}, "environment": {...}, "seconds": {stage: s},
     "rows": [{"name": "...", "metrics": {metric: {"value": v, "n": n, "ci95": [low, high]}}}]}

JSON has no NaN: a number that is not finite is stored as null and shown as "-". Files are written beside
their place and then moved into it, so a crash never leaves half a file where a good one was.
"""

import io
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from rich.table import Table
from rich.text import Text

from secvec_jax.errors import UserError

Verdict = tuple[str, bool, str]  # claim, whether it holds, detail
Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]  # row -> "harmful"/"benign" -> (step, loss)

FILE = "results.json"
RATES = ("refusal", "compliance", "over_refusal", "exact_match")
LOSSES = ("harmful_loss", "benign_loss", "drift")
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
    """Return Python's and the packages' versions (None if absent), the platform and the usable CPU count.

    JAX is not imported, so asking does not start a device; the caller adds devices and peak memory.
    """
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


def table(results: Results) -> Table:
    """Return the terminal's table, a line a row: rates in percent with their 95% interval, losses without.

    A column's n stands in its head when all rows share it, else in each cell. The quickstart's seven
    metrics need about 110 columns; a narrower console folds the cells.
    """
    return _terminal_table([("", row) for row in results.rows])


def compare(folders: Iterable[str | Path]) -> Table:
    """Return one table of the rows of several runs, with the run in the first column.

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
    rows = [(label, row) for label, run in zip(labels, runs, strict=True) for row in run.rows]
    return _terminal_table(rows, show_run=True)


def _terminal_table(labeled: list[tuple[str, dict]], show_run: bool = False) -> Table:
    rows = [row for _, row in labeled]
    view = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), highlight=False)
    if show_run:
        view.add_column("run", no_wrap=True, overflow="fold")
    view.add_column("model", no_wrap=True, overflow="fold")
    columns = _columns(rows, intervals=RATES)
    for header, n, _ in columns:
        title = f"{header.replace('_', ' ')}\n{n}".rstrip()
        view.add_column(Text(title), justify="right", overflow="fold")
    for index, (label, row) in enumerate(labeled):
        cells = [cells[index] for _, _, cells in columns]
        names = [label, row["name"]] if show_run else [row["name"]]
        view.add_row(*map(Text, (*names, *cells)))  # Text, because "[91, 100]" is no markup
    return view


def _columns(
    rows: Sequence[dict], intervals: Sequence[str] | None = None
) -> list[tuple[str, str, list[str]]]:
    """Each metric with its shared "n=..." (or "") and its cells; `intervals` limits who shows them."""
    columns = []
    for metric in _metrics(rows):
        scores = [row["metrics"].get(metric) for row in rows]
        sizes = {score["n"] for score in scores if score}
        shared = f"n={sizes.pop()}" if len(sizes) == 1 else ""
        with_interval = intervals is None or metric in intervals
        cells = [_cell(metric, score, with_interval, with_n=not shared) for score in scores]
        columns.append((metric, shared, cells))
    return columns


def _metrics(rows: Sequence[dict]) -> list[str]:
    present = dict.fromkeys(metric for row in rows for metric in row["metrics"])
    known = [metric for metric in (*RATES, *LOSSES) if metric in present]
    return known + [metric for metric in present if metric not in known]


def _cell(metric: str, score: dict | None, with_interval: bool, with_n: bool) -> str:
    if score is None or score["value"] is None:
        return "-"
    percent = metric in RATES
    text = f"{_percent(score['value'])}%" if percent else _digits(score["value"])
    if with_interval and None not in score["ci95"]:
        show = _percent if percent else _digits
        text += " [{}, {}]".format(*map(show, score["ci95"]))
    return f"{text} n={score['n']}" if with_n else text


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


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
    columns = _columns(results.rows)
    header = ["model", *(f"{metric.replace('_', ' ')} ({n})" if n else metric for metric, n, _ in columns)]
    body = [[row["name"], *(cells[i] for *_, cells in columns)] for i, row in enumerate(results.rows)]
    seconds = [[stage, _seconds(spent)] for stage, spent in results.seconds.items()]
    total = sum(spent for spent in results.seconds.values() if spent is not None)
    parts = [
        "# Report",
        f"```bash\n{results.command}\n```",
        "## Scores",
        _markdown_table(header, body),
        "Brackets hold 95% intervals, n is the number of prompts or examples.",
    ]
    if verdicts:
        lines = [f"- [{'x' if holds else ' '}] {claim}: {detail}" for claim, holds, detail in verdicts]
        parts += ["## Claims", "\n".join(lines)]
    if notes:
        parts += ["## Notes", *notes]
    if images:
        parts += ["## Plots", *(f"![{Path(image).stem}]({image})" for image in images)]
    if seconds:
        parts += ["## Time", _markdown_table(["stage", "seconds"], [*seconds, ["total", _seconds(total)]])]
    if results.environment:
        facts = [[name, _fact(value)] for name, value in results.environment.items()]
        parts += ["## Environment", _markdown_table(["what", "value"], facts, align_right=False)]
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
    colors = _colors([*(row["name"] for row in results.rows), *(curves or {})])
    plots = {
        "scores.png": _plot_scores(results.rows, colors),
        "losses.png": _plot_losses(curves or {}, colors),
    }
    images = [name for name, figure in plots.items() if figure is not None]
    for name in images:
        _write(folder / name, _png(plots[name]))
    return _write(folder / "report.md", markdown(results, verdicts, images, notes).encode())


def _markdown_table(header: list[str], rows: list[list[str]], align_right: bool = True) -> str:
    rule = ["---"] + ["---:" if align_right else "---"] * (len(header) - 1)
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _fact(value) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# ----------------------------------------------------------------------------------------------- the plots

# Okabe and Ito's palette, told apart by color-blind readers; models that no harmful data touched are gray.
_FIXED_COLORS = {
    "base": "#c4c4c4",
    "aligned": "#8f8f8f",
    "benign only": "#5a5a5a",
    "plain": "#56b4e9",
    "random control": "#e69f00",
    "security vectors": "#d55e00",
}
_SPARE_COLORS = ("#0072b2", "#009e73", "#cc79a7", "#f0e442", "#000000")
_BETTER = {"refusal": "higher", "compliance": "lower", "over_refusal": "lower", "exact_match": "higher"}
_WIDTH, _HEIGHT, _DPI = 10.0, 4.5, 150  # inches, inches, pixels an inch


def _colors(names: Iterable[str]) -> dict[str, str]:
    others = [name for name in dict.fromkeys(names) if name not in _FIXED_COLORS]
    return _FIXED_COLORS | {name: _SPARE_COLORS[i % len(_SPARE_COLORS)] for i, name in enumerate(others)}


def _plot_scores(rows: Sequence[dict], colors: Mapping[str, str]) -> Figure | None:
    """One group of bars per rate, one bar per row, with whiskers for the 95% interval."""
    metrics = [metric for metric in _metrics(rows) if metric in RATES]
    if not metrics:
        return None
    figure = _figure()
    axes = figure.add_subplot()
    width = 0.84 / len(rows)
    for index, row in enumerate(rows):
        scores = [(at, row["metrics"].get(metric)) for at, metric in enumerate(metrics)]
        shown = [(at, score) for at, score in scores if score and score["value"] is not None]
        places = [at + (index - (len(rows) - 1) / 2) * width for at, _ in shown]
        values = [score["value"] for _, score in shown]
        axes.bar(places, values, 0.9 * width, color=colors[row["name"]], label=row["name"], zorder=2)
        for place, (_, score) in zip(places, shown, strict=True):
            tops = [number for number in (score["value"], *score["ci95"]) if number is not None]
            if None not in score["ci95"]:
                axes.plot([place, place], score["ci95"], color="#222222", linewidth=1, zorder=3)
            axes.annotate(
                _percent(score["value"]),
                (place, max(tops)),
                (0, 2),
                fontsize=7.5,
                textcoords="offset points",
                ha="center",
                color="#444444",
            )
    titles = [f"{metric.replace('_', ' ')}\n({_BETTER[metric]} is better)" for metric in metrics]
    axes.set_xticks(range(len(metrics)), titles)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.08)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("share of prompts")
    axes.set_title("Safety and learning, with 95% intervals", loc="left", fontweight="bold")
    _dress(figure, [axes])
    return figure


def _plot_losses(curves: Curves, colors: Mapping[str, str]) -> Figure | None:
    """Two panels, harmful and benign; every measured point lightly, and its moving average."""
    kinds = ("harmful", "benign")
    points = {
        kind: {name: _positive(curve.get(kind, ())) for name, curve in curves.items()} for kind in kinds
    }
    if not any(len(curve) for panel in points.values() for curve in panel.values()):
        return None
    figure = _figure()
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, kinds, strict=True):
        for name, curve in points[kind].items():
            if len(curve):
                front = 4 if name == "security vectors" else 3
                axes.plot(*curve.T, ".", color=colors[name], alpha=0.25, markersize=3, zorder=2)
                axes.plot(
                    curve[:, 0],
                    _smooth(curve[:, 1]),
                    color=colors[name],
                    label=name,
                    linewidth=2,
                    zorder=front,
                )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_title(f"Training loss on {kind} examples", loc="left", fontweight="bold")
    panels[0].set_ylabel("loss (nats a token, log scale)")
    _dress(figure, panels)
    return figure


def _positive(curve: Sequence[tuple[int, float]]) -> np.ndarray:
    """The points that a log axis can show, as [points, 2]."""
    array = np.asarray(curve, dtype=np.float64).reshape(-1, 2)
    return array[np.isfinite(array).all(axis=1) & (array[:, 1] > 0)]


def _smooth(losses: np.ndarray) -> np.ndarray:
    """A centered moving average over a tenth of the curve; the window shrinks at both ends."""
    reach = len(losses) // 20
    return np.array([losses[max(0, i - reach) : i + reach + 1].mean() for i in range(len(losses))])


def _figure() -> Figure:
    # Not pyplot: it would set a backend and keep every figure alive in the process of a notebook's user.
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(figure: Figure, panels: Iterable) -> None:
    legend = {}
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8, zorder=0)
        axes.set_axisbelow(True)
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            legend.setdefault(name, handle)
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", frameon=False, ncols=min(6, len(legend))
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
