"""Scores as bars with their intervals and training losses as curves, as matplotlib figures."""

import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from secvec_jax.evaluation.metrics import RATES, in_order, percent

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]  # row -> "harmful"/"benign" -> (step, loss)

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


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """A color for every name, the same in all plots."""
    others = [name for name in dict.fromkeys(names) if name not in _FIXED_COLORS]
    return _FIXED_COLORS | {name: _SPARE_COLORS[i % len(_SPARE_COLORS)] for i, name in enumerate(others)}


def plot_scores(rows: Sequence[dict], colors: Mapping[str, str]) -> Figure | None:
    """One group of bars per rate, one bar per row, with whiskers for the 95% interval."""
    metrics = [metric for metric in in_order(rows) if metric in RATES]
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
                percent(score["value"]),
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


def plot_losses(curves: Curves, colors: Mapping[str, str]) -> Figure | None:
    """Two panels, harmful and benign; every measured point lightly, and its moving average."""
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
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", frameon=False, ncols=min(6, len(legend)))


def png(figure: Figure) -> bytes:
    """The figure as the contents of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
