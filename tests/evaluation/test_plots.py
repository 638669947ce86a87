"""What grids are drawn as: which points, which front, which bands, and names that can be read."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Annotation, Text

from secvec_jax.evaluation import plots
from secvec_jax.evaluation.intervals import Score
from secvec_jax.evaluation.metrics import RATES
from secvec_jax.evaluation.plots import colors_of, pareto_front, plot_pareto, plot_scores, plot_sweep, png


def score(value, reach=0.05):
    return Score(value, 40, (max(0.0, value - reach), min(1.0, value + reach)))


PLACES = {
    "aligned": (0.02, 0.97), "plain": (0.84, 0.14), "benign only": (0.85, 0.97), "random control": (0.83, 0.16),
    "security vectors": (0.84, 0.96), "vaccine rho=5": (0.80, 0.20), "ewc": (0.70, 0.30), "kl": (0.72, 0.33),
    "lisa": (0.79, 0.50), "forget filter": (0.92, 0.90), "caft": (0.80, 0.92), "persona": (0.81, 0.91),
    "replay": (0.84, 0.88),
}  # fmt: skip
COLORS = colors_of(PLACES)


@pytest.fixture(scope="module")
def pareto():
    points = {name: (score(x), score(y)) for name, (x, y) in PLACES.items()}
    return plot_pareto(points, "task", "refusal", COLORS, references=["aligned", "benign only"])


def drawn(figure, gid):
    return [line for line in figure.axes[0].lines if line.get_gid() == gid]


class TestParetoFront:
    def test_by_hand(self):
        assert pareto_front([(0, 3), (1, 1), (2, 2), (3, 0), (1, 2)]) == [3, 2, 0]

    def test_ties(self):
        assert pareto_front([(1, 1), (1, 2), (0, 2)]) == [1]
        assert sorted(pareto_front([(1, 1), (0, 0), (1, 1)])) == [0, 2]

    def test_none_and_one(self):
        assert pareto_front([]) == []
        assert pareto_front([(5, -1)]) == [0]

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=15))
    @settings(max_examples=200)
    def test_is_what_no_other_dominates(self, points):
        def dominated(point):
            return any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)

        assert sorted(pareto_front(points)) == [i for i, point in enumerate(points) if not dominated(point)]


class TestPareto:
    def test_every_defense_is_a_point_with_two_bars(self, pareto):
        for name, place in PLACES.items():
            (line,) = drawn(pareto, name)
            assert tuple(np.ravel(line.get_data())) == place
            assert line.get_color() == COLORS[name]
        bars = [line for line in pareto.axes[0].lines if line.get_gid() is None]
        assert len(bars) == 2 * len(PLACES)
        assert sorted(len(set(map(float, line.get_xdata()))) for line in bars) == [1] * len(PLACES) + [2] * len(PLACES)

    def test_the_front_leaves_out_the_dominated_and_the_references(self, pareto):
        (front,) = drawn(pareto, "front")
        assert list(zip(*map(list, front.get_data()))) == [PLACES["forget filter"], PLACES["security vectors"]]
        hollow = {name for name in PLACES if drawn(pareto, name)[0].get_markerfacecolor() == "white"}
        assert hollow == {"aligned", "benign only"}

    def test_lower_is_better_where_it_is(self):
        points = {"a": (score(0.5), score(0.1)), "b": (score(0.6), score(0.2)), "c": (score(0.5), score(0.3))}
        (front,) = drawn(plot_pareto(points, "task", "compliance", colors_of(points)), "front")
        assert list(zip(*map(list, front.get_data()))) == [(0.6, 0.2), (0.5, 0.1)]

    def test_every_name_is_inside_and_off_the_others(self, pareto):
        axes = pareto.axes[0]
        pareto.canvas.draw()
        names = [child for child in axes.get_children() if isinstance(child, Annotation)]
        assert [name.get_text() for name in names] == list(PLACES)
        boxes = [Text.get_window_extent(name) for name in names]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(axes.bbox.containsx(x) and axes.bbox.containsy(y) for box in boxes for x, y in box.corners())

    def test_is_a_png_of_the_usual_size(self, pareto):
        assert png(pareto)[16:24] == (1500).to_bytes(4, "big") + (675).to_bytes(4, "big")
        assert not pareto.legends

    def test_losses_have_a_free_axis_and_nothing_draws_nothing(self):
        axes = plot_pareto({"plain": (Score(3.0, 1, (2.0, 4.0)), score(0.5))}, "drift", "refusal", COLORS).axes[0]
        assert axes.get_xlim()[1] > 4 and axes.get_ylim() == (-0.03, 1.08)
        assert axes.get_xlabel() == "drift (lower is better)"
        assert plot_pareto({}, "task", "refusal", COLORS) is None
        assert plot_pareto({"plain": (score(0), score(1))}, "task", "refusal", COLORS, ["plain"]) is not None


class TestSweep:
    def test_every_defense_is_a_line_with_a_band(self):
        series = {
            "plain": [(1e-3, score(0.1)), (1e-4, score(0.6))],
            "security vectors": [(1e-4, score(0.9)), (1e-3, score(0.8))],
            "caft": [],
        }
        figure = plot_sweep(series, "refusal", "learning_rate", COLORS)
        axes = figure.axes[0]
        assert [line.get_label() for line in axes.lines] == ["plain", "security vectors"]
        assert [list(data) for data in axes.lines[0].get_data()] == [[1e-4, 1e-3], [0.6, 0.1]]
        assert len(axes.collections) == 2
        band = axes.collections[0].get_paths()[0].vertices
        assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.05, 0.65))
        assert axes.get_xscale() == "log" and "log scale" in axes.get_xlabel()
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.0001", "0.001"]
        assert png(figure).startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        "over, ticks, scale",
        [("poison", (0.1, 0.5), "linear"), ("samples", (10, 100), "log"), ("samples", (0, 100), "linear")],
    )
    def test_the_axis_is_logarithmic_where_it_can_be(self, over, ticks, scale):
        figure = plot_sweep({"plain": [(at, score(0.5)) for at in ticks]}, "drift", over, COLORS)
        assert figure.axes[0].get_xscale() == scale

    def test_lines_of_one_color_are_distinguished(self):
        names = [f"defense {index}" for index in range(12)]
        series = {name: [(0.1, score(0.5)), (0.2, score(0.5))] for name in names}
        lines = plot_sweep(series, "refusal", "poison", colors_of(names)).axes[0].lines
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12

    def test_nothing_draws_nothing(self):
        assert plot_sweep({"plain": []}, "refusal", "poison", COLORS) is None


def test_bars_know_the_direction_of_every_rate():
    rows = [{"name": "plain", "metrics": {rate: {"value": 0.5, "n": 4, "ci95": [0.4, 0.6]} for rate in RATES}}]
    labels = [tick.get_text() for tick in plot_scores(rows, plots.colors_of(["plain"])).axes[0].get_xticklabels()]
    assert len(labels) == len(RATES) and all(label.endswith("is better)") for label in labels)
