"""No table is wider than eight columns, none loses a number by that, and refusal is never shown alone."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.evaluation import published, report
from secvec_jax.evaluation.columns import MAX_COLUMNS, SAFETY, room_beside, split, with_companions
from secvec_jax.evaluation.pivot import Record, differences, pivot

METRICS = (
    "task",
    "refusal",
    "over_refusal",
    "compliance",
    "drift",
    "harmful_loss",
    "bias",
    "f1",
    "auroc",
    "benign_loss",
)


def widths(markdown: str) -> list[int]:
    return [line.replace(r"\|", "").count("|") - 1 for line in markdown.splitlines() if line.startswith("|")]


def tables(markdown: str) -> list[str]:
    """The header lines."""
    return re.findall(r"(?m)^(\|.*\|)\n\| ---", markdown)


def record(defense: str, poison: float, seed: int, metrics: dict[str, float], n: int = 8) -> Record:
    values = {name: [value] * (n - 1) + [0.0] for name, value in metrics.items()}
    return Record({"defense": defense, "poison": poison, "learning_rate": 1e-4, "seed": seed}, values, 1.0)


WIDE = {name: 0.5 for name in METRICS}


class TestSplit:
    @given(
        st.lists(st.sampled_from(METRICS), unique=True, min_size=1), st.integers(1, 6), st.integers(3, MAX_COLUMNS - 1)
    )
    @settings(max_examples=50, deadline=None)
    def test_every_column_is_shown_once_and_no_part_is_too_wide(self, metrics, places, room):
        parts = split(metrics, range(places), room)
        shown = [(metric, place) for some, at in parts for metric in some for place in at]
        assert sorted(shown) == sorted((metric, place) for metric in metrics for place in range(places))
        assert all(len(some) * len(at) <= room for some, at in parts)
        if "refusal" in metrics:
            together = {metric for metric in metrics if metric in SAFETY}
            assert all(together <= set(some) for some, _ in parts if "refusal" in some)

    def test_parts_are_as_even_as_they_can_be(self):
        assert [len(some) for some, _ in split([str(i) for i in range(8)], [None], 7)] == [4, 4]
        assert [at for _, at in split(["task"], range(10), 7)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]

    def test_there_is_no_room_beside_too_many_names(self):
        assert room_beside(5, SAFETY) == 0 and room_beside(4, SAFETY) == 4 and room_beside(1, ["task"]) == 7

    @pytest.mark.parametrize(
        "asked, measured, shown",
        [
            (["refusal"], {"compliance", "harmful_loss", "task"}, ["refusal", "compliance", "harmful_loss"]),
            (["task", "compliance", "refusal", "bias"], {"refusal"}, ["task", "refusal", "compliance", "bias"]),
            (["compliance", "task"], {"refusal", "harmful_loss"}, ["compliance", "task"]),
            (["refusal"], {"refusal"}, ["refusal"]),
        ],
    )
    def test_companions(self, asked, measured, shown):
        assert with_companions(asked, measured) == shown


class TestTables:
    @pytest.mark.parametrize("rows", [["defense"], ["defense", "seed"], ["defense", "poison", "learning_rate", "seed"]])
    def test_a_wide_pivot_is_split(self, rows):
        cells = [record(d, p, s, WIDE) for d in ("none", "kl") for p in (0.0, 0.1, 0.2) for s in (0, 1)]
        columns = [name for name in ("poison", "learning_rate") if name not in rows]
        text = pivot(cells, rows, columns, METRICS, {"defense": "none"}).markdown()
        assert max(widths(text)) <= MAX_COLUMNS and len(tables(text)) > 1
        for head in tables(text):
            assert (
                ("refusal ↑" in head.replace("over refusal", "")) == ("compliance" in head) == ("harmful loss" in head)
            )
        values = sum(len(re.findall(r"0\.438|44%", line)) for line in text.splitlines() if line.startswith("|"))
        assert values == len(METRICS) * 2 * 3 * (2 if "seed" in rows else 1)

    def test_more_names_than_fit_are_one_column(self):
        rows = ["defense", "poison", "learning_rate", "seed", "a", "b"]
        cells = [Record({**dict.fromkeys(rows, 0), "defense": "none"}, {m: [1.0, 0.0] for m in SAFETY}, 1.0)]
        text = pivot(cells, rows, [], ["refusal"]).markdown()
        assert tables(text)[0].startswith("| defense, poison, learning rate, seed, a, b | refusal")
        assert "| none, 0, 0, 0, 0, 0 | 50%" in text

    def test_a_part_shows_no_row_without_a_number(self):
        cells = [record("none", p, 0, WIDE) for p in (0.0, 0.1)] + [record("kl", 0.1, 0, WIDE)]
        first, second = pivot(cells, ["defense"], ["poison"], ["refusal", "task"]).markdown().split("**poison 0.1**")
        assert "| kl |" not in first and "| kl |" in second and "**poison 0**" in first

    def test_a_report_and_a_terminal_split_as_well(self, tmp_path):
        score = {"value": 0.25, "n": 4, "ci95": [0.0, 0.5]}
        rows = [
            {"name": "plain", "metrics": dict.fromkeys(METRICS, score)},
            {"name": "base", "metrics": {"drift": score}},
        ]
        text = report.scores_table(rows)
        assert max(widths(text)) <= MAX_COLUMNS and len(tables(text)) == 2
        refusals = next(head for head in tables(text) if "| refusal (n=4) |" in head)
        assert "| refusal (n=4) | compliance (n=4) | harmful loss (n=4) |" in refusals
        assert text.count("| base |") == 1, "a row without a number of the part is left out"
        results = report.Results("command", rows=rows)
        assert [len(view.columns) for view in report.table(results).renderables if view] == [6, 6]
        results.save(tmp_path / "run")
        compared = report.compare([tmp_path / "run"]).renderables
        assert all(len(view.columns) <= MAX_COLUMNS for view in compared if view)

    def test_what_the_papers_printed_is_split(self):
        for table in published.PUBLISHED:
            assert max(widths(table.markdown())) <= MAX_COLUMNS, table.name
        assert "| Vaccine | 92.6 | 92.6 | 93.0 | 93.8 | 95.0 | 93.40 |" in published.VACCINE_1.markdown()


class TestDifferences:
    def cells(self) -> list[Record]:
        shares = {"none": (0.1, 0.3, 0.2), "kl": (0.9, 0.6, 0.9)}
        return [
            Record(
                {"defense": name, "poison": poison, "seed": seed},
                {"refusal": [1.0] * round(20 * share) + [0.0] * (20 - round(20 * share)), "drift": [share]},
                1.0,
            )
            for name, of_seed in shares.items()
            for poison in (0.0, 0.1)
            for seed, share in enumerate(of_seed)
            if (name, poison) != ("kl", 0.1)
        ]

    def test_by_hand(self):
        table = differences(self.cells(), [("kl", "none"), ("kl", "absent")], ["poison"], ["refusal", "drift"])
        assert table.down == (("kl minus none", 0.0),), "only what both were run with"
        found = table.cells[("kl minus none", 0.0), (), "refusal"].score
        assert found.value == pytest.approx(0.6) and found.n == 60
        # 0.8, 0.3 and 0.7: mean 0.6, deviation 0.2646, t(2) = 4.3027
        assert found.by_seed == pytest.approx((0.6 - 0.6572, 0.6 + 0.6572), abs=1e-3)
        text = table.markdown()
        assert "| kl minus none | 0 | +60.0 [+" in text and "] t [-5.7, +125.7] ▲ |" in text
        assert "+0.600 [-0.0572, +1.26] |" in text, "one number a seed has one interval, not two"
        assert "than the second defense" in text

    def test_none_where_no_pair_was_run(self):
        assert differences(self.cells(), [("kl", "ewc")], ["poison"], ["refusal"]) is None
        assert differences(self.cells(), [], ["poison"], ["refusal"]) is None

    def test_seeds_that_agree_have_no_interval_of_seeds(self):
        cells = [record(d, 0.1, s, {"task": v}) for d, v in (("kl", 1.0), ("none", 0.0)) for s in (0, 1)]
        found = differences(cells, [("kl", "none")], [], ["task"])
        assert found.cells[("kl minus none",), (), "task"].score.by_seed is None
