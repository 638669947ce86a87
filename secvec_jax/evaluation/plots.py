"""Matplotlib figures: scores as bars, training losses as curves, grids as scatter plots and sweeps.

Intervals are 95%. Every plot takes the colors of `colors_of`, so that a model looks the same in all of them.
"""

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from secvec_jax.evaluation.intervals import Score
from secvec_jax.evaluation.metrics import BETTER, RATES, Curves, in_order, percent
from secvec_jax.evaluation.replies import clip
from secvec_jax.printable import printable

# Okabe and Ito's palette, safe for color-blind readers; models trained without harmful data are gray.
_FIXED_COLORS = {
    "base": "#c4c4c4",
    "aligned": "#8f8f8f",
    "benign only": "#5a5a5a",
    "plain": "#56b4e9",
    "random control": "#e69f00",
    "security vectors": "#d55e00",
}
_SPARE_COLORS = ("#0072b2", "#009e73", "#cc79a7", "#f0e442", "#000000")
_LOG_AXES = ("learning_rate", "samples")
_DASHES = ("-", "--", ":", "-.")
_WIDTH, _HEIGHT, _DPI = 10.0, 4.5, 150  # inches, inches, pixels per inch


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """Return name -> color, the same in all plots."""
    others = [name for name in dict.fromkeys(names) if name not in _FIXED_COLORS]
    return _FIXED_COLORS | {name: _SPARE_COLORS[i % len(_SPARE_COLORS)] for i, name in enumerate(others)}


def plot_scores(rows: Sequence[dict], colors: Mapping[str, str]) -> Figure | None:
    """Draw one group of bars per rate, with one bar per row and whiskers for the 95% interval."""
    metrics = [metric for metric in in_order(rows) if metric in RATES]
    if not metrics:
        return None
    figure = _figure()
    axes = figure.add_subplot()
    width = 0.84 / len(rows)
    for index, row in enumerate(rows):
        scores = [(at, row["metrics"].get(metric)) for at, metric in enumerate(metrics)]
        shown = [(at, score) for at, score in scores if score and score["value"] is not None]
        bar_centers = [at + (index - (len(rows) - 1) / 2) * width for at, _ in shown]
        values = [score["value"] for _, score in shown]
        axes.bar(bar_centers, values, 0.9 * width, color=colors[row["name"]], label=row["name"], zorder=2)
        for center, (_, score) in zip(bar_centers, shown, strict=True):
            tops = [number for number in (score["value"], *score["ci95"]) if number is not None]
            if None not in score["ci95"]:
                axes.plot([center, center], score["ci95"], color="#222222", linewidth=1, zorder=3)
            axes.annotate(
                percent(score["value"]),
                (center, max(tops)),
                (0, 2),
                fontsize=7.5,
                textcoords="offset points",
                ha="center",
                color="#444444",
            )
    titles = [f"{metric.replace('_', ' ')}\n({BETTER[metric]} is better)" for metric in metrics]
    axes.set_xticks(range(len(metrics)), titles)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.08)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("share of prompts")
    axes.set_title("Safety and learning, with 95% intervals", loc="left", fontweight="bold")
    _dress(figure, [axes])
    return figure


def plot_losses(curves: Curves, colors: Mapping[str, str]) -> Figure | None:
    """Draw a harmful and a benign panel: every measured point in a light color, and their moving average."""
    kinds = ("harmful", "benign")
    points = {kind: {name: _positive(curve.get(kind, ())) for name, curve in curves.items()} for kind in kinds}
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
    panels[0].set_ylabel("loss (nats per token, log scale)")
    _dress(figure, panels)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto-optimal points; in both numbers more is better.

    They are sorted by descending first number. Points that coincide are on the front together.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        # Earlier points are at least as good in the first number, so only the best second number so far matters.
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def plot_pareto(
    points: Mapping[str, tuple[Score, Score]],
    x: str,
    y: str,
    colors: Mapping[str, str],
    references: Collection[str] = (),
) -> Figure | None:
    """Draw one point per defense with bars for both 95% intervals, and the Pareto front of the defenses as steps.

    `points` holds (score of metric `x`, score of metric `y`), usually utility and safety. `references` are names of
    points that are not an option, such as the model before the attack: hollow diamonds, not part of the front.
    """
    if not points:
        return None
    figure = _figure()
    axes = figure.add_subplot()
    for name, scores in points.items():
        at, hollow = [score.value for score in scores], name in references
        for axis, score in enumerate(scores):
            bar = [[number if axis == i else at[i] for number in score.ci95] for i in (0, 1)]
            axes.plot(*bar, color=colors[name], linewidth=1, alpha=0.6, zorder=2)
        axes.plot(
            *at,
            "D" if hollow else "o",
            color=colors[name],
            markerfacecolor="white" if hollow else colors[name],
            markersize=7,
            zorder=4,
            gid=name,
        )
    signs = [-1 if BETTER.get(metric) == "lower" else 1 for metric in (x, y)]
    choices = [tuple(score.value for score in scores) for name, scores in points.items() if name not in references]
    front = [choices[i] for i in pareto_front([(signs[0] * a, signs[1] * b) for a, b in choices])]
    if front:
        axes.step(*zip(*front, strict=True), "--", where="post", color="#222222", linewidth=1.2, zorder=3, gid="front")
    for metric, ruler, limit in ((x, axes.xaxis, axes.set_xlim), (y, axes.yaxis, axes.set_ylim)):
        ruler.set_label_text(_titled(metric))
        if metric in RATES:
            limit(-0.03, 1.08)  # room for names at the edge
            ruler.set_ticks(np.linspace(0, 1, 6))
            ruler.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Safety and learning, with 95% intervals and the Pareto front", loc="left", fontweight="bold")
    _dress(figure, [axes])
    _label(figure, axes, {name: (a.value, b.value) for name, (a, b) in points.items()})
    return figure


def plot_sweep(
    series: Mapping[str, Sequence[tuple[float, Score]]], metric: str, over: str, colors: Mapping[str, str]
) -> Figure | None:
    """Draw one line per defense with a band for the 95% interval: `metric` over `over` (poison, samples, ...).

    Learning rates and sample counts are on a log axis, unless one of them is 0. The ticks are the values that were
    run. If several lines have the same color, the later ones are dashed.
    """
    lines = {name: sorted(line, key=lambda point: point[0]) for name, line in series.items() if line}
    if not lines:
        return None
    figure = _figure()
    axes = figure.add_subplot()
    used: list[str] = []
    for name, line in lines.items():
        settings = [at for at, _ in line]
        dash = _DASHES[used.count(colors[name]) % len(_DASHES)]
        used.append(colors[name])
        axes.plot(
            settings, [score.value for _, score in line], dash, marker="o", markersize=4, color=colors[name], label=name
        )
        lows, highs = zip(*(score.ci95 for _, score in line), strict=True)
        axes.fill_between(settings, lows, highs, color=colors[name], alpha=0.15, linewidth=0)
    ticks = sorted({at for line in lines.values() for at, _ in line})
    if over in _LOG_AXES and ticks[0] > 0:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{at:g}" for at in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if metric in RATES:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(over.replace("_", " ") + (" (log scale)" if axes.get_xscale() == "log" else ""))
    axes.set_ylabel(_titled(metric))
    axes.set_title(
        f"{metric.replace('_', ' ').capitalize()} by {over.replace('_', ' ')}, with 95% intervals",
        loc="left",
        fontweight="bold",
    )
    _dress(figure, [axes])
    return figure


def plot_histogram(scores: Mapping[str, Sequence[float]], label: str, threshold: float | None = None) -> Figure:
    """Draw a histogram for each kind of score, with the threshold between the kinds, if any."""
    figure = _figure()
    axes = figure.add_subplot()
    everything = np.concatenate([np.asarray(values, np.float64) for values in scores.values()])
    edges = np.histogram_bin_edges(everything, bins=min(40, max(5, len(everything) // 4)))
    for (name, values), color in zip(scores.items(), _SPARE_COLORS * len(scores)):
        axes.hist(values, edges.tolist(), color=color, alpha=0.5, label=f"{name} (n={len(values)})")
    if threshold is not None:
        axes.axvline(threshold, color="#222222", linestyle="--", linewidth=1, label=f"threshold {threshold:.2f}")
    axes.set_xlabel(label)
    axes.set_ylabel("rows")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(figure, [axes])
    return figure


def _titled(metric: str) -> str:
    return metric.replace("_", " ") + (f" ({BETTER[metric]} is better)" if metric in BETTER else "")


def _label(figure: Figure, axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each name next to its point, where it covers the least of other names, points and lines."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # computes the layout, which pixel coordinates need
    renderer = canvas.get_renderer()
    taken = [line.get_window_extent(renderer).padded(3) for line in axes.lines if line.get_gid() != "front"]
    # (right, up), the corners first: the bars leave them free
    sides = ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
    positions = [(right, up, reach) for reach in (5, 14, 26, 38) for right, up in sides]

    def put(text: Annotation, position: tuple[int, int, int]) -> Bbox:
        right, up, reach = position
        text.set(ha=("center", "left", "right")[right], va=("center", "bottom", "top")[up])
        text.xyann = right * reach, up * reach
        text.update_positions(renderer)
        return Text.get_window_extent(text, renderer)  # without the line to the point

    def cost(position: tuple[int, int, int], box: Bbox) -> float:
        outside = box.width * box.height - _overlap(box, axes.bbox)
        return 15 * position[2] + 10 * outside + sum(_overlap(box, other) for other in taken)

    for name, point in points.items():
        text = axes.annotate(
            _name(name),
            point,
            (0, 0),
            fontsize=8.5,
            textcoords="offset points",
            color="#444444",
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6},
            zorder=5,
        )
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        best = min(positions, key=lambda position: cost(position, put(text, position)))
        taken.append(put(text, best))


def _overlap(a: Bbox, b: Bbox) -> float:
    """The area that two boxes share, in square pixels."""
    shared = Bbox.intersection(a, b)
    return shared.width * shared.height if shared else 0.0


def _positive(curve: Sequence[tuple[int, float]]) -> np.ndarray:
    """The points that a log axis can show, `[points, 2]`."""
    array = np.asarray(curve, dtype=np.float64).reshape(-1, 2)
    return array[np.isfinite(array).all(axis=1) & (array[:, 1] > 0)]


def _smooth(losses: np.ndarray) -> np.ndarray:
    """A centered moving average over a tenth of the curve; the window shrinks at both ends."""
    reach = len(losses) // 20
    return np.array([losses[max(0, i - reach) : i + reach + 1].mean() for i in range(len(losses))])


def _name(text: str) -> str:
    """A name as matplotlib shows it: on one short line, and not as a formula."""
    return clip(printable(text)).replace("$", r"\$")


def _figure() -> Figure:
    # Not pyplot: it would set a backend and keep every figure alive in the process of a notebook's user.
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(figure: Figure, panels: Iterable) -> None:
    legend: dict[str, Any] = {}
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8, zorder=0)
        axes.set_axisbelow(True)
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            legend.setdefault(name, handle)
    if legend:
        columns = min(6, len(legend))
        names = list(map(_name, legend))
        figure.legend(list(legend.values()), names, loc="outside lower center", frameon=False, ncols=columns)


def png(figure: Figure) -> bytes:
    """Return the contents of a PNG file of the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
