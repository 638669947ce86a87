"""Records are read strictly, grouped over seeds, compared in pairs, and shown with what is missing or failed."""

import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from rich.console import Console

from secvec_jax.errors import UserError
from secvec_jax.evaluation import published, statistics
from secvec_jax.evaluation.metrics import BETTER, LOSSES, RATES
from secvec_jax.evaluation.pivot import Record, pivot, read


def contents(defense="plain", poison=0.1, seed=0, metrics=None, error=None, **more):
    cell = {"defense": defense, "attack": "harmful", "poison": poison, "seed": seed} | more
    return {"cell": cell, "metrics": metrics or {}, "seconds": 9.5, "error": error}


def record(*args, **options):
    return Record.from_dict(contents(*args, **options))


def rate(hits, n=40):
    """0/1 scores in which the first prompts are the easy ones, in every cell."""
    return [1.0] * hits + [0.0] * (n - hits)


@pytest.fixture
def records():
    """Plain refuses a little, vectors nearly always, benign only as plain does; drift wanders from seed to seed."""
    rows = []
    for seed in range(3):
        for poison in (0.1, 0.0):
            for defense, hits, drift in (("plain", 10, 0.5), ("vectors", 38, 0.1), ("control", 10, 0.5)):
                metrics = {
                    "refusal": rate(hits + seed if poison else 39),
                    "compliance": rate(38 - hits if poison else 1),
                    "drift": [drift + 0.01 * (-1) ** (seed + len(defense))],
                }
                rows.append(record(defense, poison, seed, metrics))
    return rows


def cells(table):
    """The body of the Markdown, as lists of texts by the first one."""
    lines = [line for line in table.markdown().splitlines() if line.startswith("|")][2:]
    return {line[0]: line[1:] for line in ([text.strip() for text in line.strip("|").split(" | ")] for line in lines)}


def notes(table):
    return [line.removeprefix("- ") for line in table.markdown().splitlines() if line.startswith("- ")]


def test_cells_of_different_rules_are_kept_apart():
    old, new = record(metrics={"refusal": rate(9)}), record("vectors", metrics={"refusal": rate(30)})
    assert old.rules == 1
    new = dataclasses.replace(new, rules=2)
    table = pivot([old, new], ["defense"], [], ["refusal"], "plain")
    assert all(cell.difference is None for cell in table.cells.values())
    assert any("scoring rules" in note for note in notes(table))
    first, second = (record(seed=seed, metrics={"refusal": rate(9)}) for seed in (1, 2))
    with pytest.raises(UserError, match="scoring_rules"):
        pivot([first, dataclasses.replace(second, rules=2)], ["defense"], [], ["refusal"])
    with pytest.raises(UserError, match="rules"):
        Record.from_dict(contents(metrics={"refusal": rate(9)}) | {"rules": 0})


class TestRecord:
    def test_reads_the_form(self):
        read_back = record(metrics={"refusal": [1, 0.0]}, task_rank=8, shuffled=True, note=None)
        assert read_back.metrics == {"refusal": (1, 0.0)}
        assert read_back.cell["task_rank"] == 8
        assert (read_back.seconds, read_back.error) == (9.5, None)

    def test_a_metric_of_nulls_is_missing(self):
        assert record(metrics={"auroc": [None], "drift": [0.1]}).metrics == {"drift": (0.1,)}

    def test_an_unknown_field_is_named_with_the_known_ones(self):
        with pytest.raises(
            UserError, match=r"unknown 'duration': there are 'cell', 'error', 'inputs', 'metrics', 'rules', 'seconds'"
        ):
            Record.from_dict(contents(metrics={"drift": [1]}) | {"duration": 3})

    @pytest.mark.parametrize("field", ["cell", "metrics", "seconds", "error"])
    def test_a_missing_field_is_named(self, field):
        whole = contents(metrics={"drift": [1]})
        with pytest.raises(UserError, match=f"no '{field}'"):
            Record.from_dict({name: value for name, value in whole.items() if name != field})

    @pytest.mark.parametrize(
        "change",
        [
            {"cell": []},
            {"cell": {"defense": "plain"}},
            {"cell": {"seed": "0"}},
            {"cell": {"seed": 0, "defense": ["plain"]}},
            {"cell": {"seed": 0, "poison": float("nan")}},
            {"metrics": []},
            {"metrics": {}},
            {"metrics": {"refusal": []}},
            {"metrics": {"refusal": 0.5}},
            {"metrics": {"refusal": [1, None]}},
            {"metrics": {"refusal": [1, True]}},
            {"metrics": {"refusal": [1, float("inf")]}},
            {"seconds": "long"},
            {"seconds": None},
            {"error": 3},
            {"error": ""},
        ],
    )
    def test_a_wrong_form_is_refused(self, change):
        with pytest.raises(UserError, match=r"^somewhere: .*pivot\.py"):
            Record.from_dict(contents(metrics={"drift": [1]}) | change, "somewhere")

    def test_no_object_is_refused(self):
        with pytest.raises(UserError, match="not an object"):
            Record.from_dict([])


class TestRead:
    def test_all_cells_by_name(self, tmp_path):
        (tmp_path / "cells").mkdir()
        for name, seed in (("b", 1), ("a", 0)):
            text = json.dumps(contents(seed=seed, metrics={"drift": [0.5]}))
            (tmp_path / "cells" / f"{name}.json").write_text(text)
        (tmp_path / "cells" / "a.json.tmp").write_text("{")
        assert [r.cell["seed"] for r in read(tmp_path)] == [0, 1]

    def test_none_is_a_mistake(self, tmp_path):
        with pytest.raises(UserError, match="finished cells"):
            read(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"cell": NaN}', "\xff"])
    def test_a_malformed_file_is_named(self, tmp_path, text):
        (tmp_path / "cells").mkdir()
        (tmp_path / "cells" / "broken.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"broken\.json"):
            read(tmp_path)


class TestGrouping:
    def test_seeds_are_put_together_and_nothing_else(self, records):
        table = pivot(records, ["defense"], ["poison"], ["refusal", "drift"])
        score = table.cells[("plain",), (0.1,), "refusal"].score
        assert score == statistics.seeded_bootstrap([rate(10), rate(11), rate(12)])
        assert (score.n, score.seeds) == (120, 3)
        assert table.cells[("plain",), (0.1,), "drift"].score.n == 3
        assert len(table.cells) == 3 * 2 * 3, "compliance as well, which stands beside refusal"

    def test_cells_that_differ_in_more_than_the_seed_are_not_averaged(self, records):
        other = record("plain", 0.1, 7, {"refusal": rate(10)}, learning_rate=1e-3)
        with pytest.raises(UserError, match=r"defense plain, poison 0\.1 differ in 'learning_rate'"):
            pivot([*records, other], ["defense"], ["poison"], ["refusal"])
        table = pivot([*records, other], ["defense", "learning_rate"], ["poison"], ["refusal"])
        assert ("plain", 1e-3) in table.down and ("plain", None) in table.down
        with pytest.raises(UserError, match="'poison'"):
            pivot(records, ["defense"], [], ["refusal"])

    def test_a_cell_twice_is_refused(self, records):
        with pytest.raises(UserError, match="two records of one cell"):
            pivot([*records, records[0]], ["defense"], ["poison"], ["refusal"])

    def test_where_keeps_one_value_or_several(self, records):
        table = pivot(records, ["defense"], [], ["refusal"], where={"poison": 0.1, "defense": ["plain", "control"]})
        assert table.down == (("plain",), ("control",)) and table.across == ((),)
        with pytest.raises(UserError, match=r"poison 0\.2"):
            pivot(records, ["defense"], [], ["refusal"], where={"poison": 0.2})
        with pytest.raises(UserError, match="no record"):
            pivot(records, ["defense"], [], ["refusal"], where={"poisn": 0.1})

    def test_order_is_the_listed_one_then_numbers_ascending_and_text_as_it_comes(self, records):
        table = pivot(records, ["defense"], ["poison"], ["refusal"], order={"defense": ["absent", "vectors"]})
        assert table.down == (("vectors",), ("plain",), ("control",))
        assert table.across == ((0.0,), (0.1,))
        assert pivot(records, ["defense"], ["poison"], ["refusal"], order={"poison": [0.1]}).across == ((0.1,), (0.0,))

    @pytest.mark.parametrize(
        "rows, columns, metrics, what",
        [
            (
                ["defence"],
                [],
                ["refusal"],
                "'defence': there are 'attack', 'defense', 'poison', 'scoring_rules', 'seed'",
            ),
            (["defense"], ["poison"], ["refusals"], "'refusals': there are 'compliance', 'drift', 'refusal'"),
            (["defense"], ["defense"], ["refusal"], "twice"),
            (["defense"], [], [], "at least"),
            ([], ["poison"], ["refusal"], "at least"),
            ("defense", [], ["refusal"], "lists of names"),
        ],
    )
    def test_unknown_names_are_refused(self, records, rows, columns, metrics, what):
        with pytest.raises(UserError, match=what):
            pivot(records, rows, columns, metrics)


class TestMarks:
    def test_real_differences_from_the_reference_are_marked_and_no_others(self, records):
        table = pivot(records, ["defense"], ["poison"], ["refusal", "compliance", "drift"], "plain")
        shown = cells(table)
        assert [text[-1] in "▲▼" for text in shown["vectors"]] == [False, True] * 2 + [True, True]
        assert all(text.endswith("▲") for text in np.array(shown["vectors"])[[1, 3, 4, 5]])
        assert not any(mark in text for row in ("plain", "control") for text in shown[row] for mark in "▲▼≠")

    def test_the_reference_decides_who_is_worse(self, records):
        shown = cells(pivot(records, ["defense"], ["poison"], ["refusal", "compliance", "drift"], "vectors"))
        assert all(text.endswith("▼") for text in np.array(shown["plain"])[[1, 3, 4, 5]])
        assert not any(mark in text for text in shown["vectors"] for mark in "▲▼≠")

    def test_the_direction_decides_the_mark(self, records):
        def mark(metric, better):
            table = pivot(records, ["defense"], ["poison"], [metric], "plain", better=better)
            return table.cells[("vectors",), (0.1,), metric].mark

        for metric, higher in (("refusal", "▲"), ("compliance", "▼")):
            assert mark(metric, {metric: "higher"}) == higher
            assert mark(metric, {metric: "lower"}) == {"▲": "▼", "▼": "▲"}[higher]
            assert mark(metric, {}) == "≠"
        with pytest.raises(UserError, match="'more'"):
            mark("refusal", {"refusal": "more"})

    def test_every_known_metric_has_a_direction(self):
        assert {*RATES, *LOSSES} <= set(BETTER)
        assert BETTER["harmful_loss"] != BETTER["benign_loss"]

    def test_pairs_are_made_prompt_by_prompt(self):
        """The same two rates are told apart when prompts are matched, and not when the match is destroyed."""

        def mark(theirs):
            rows = [record("plain", metrics={"refusal": rate(60, 120)}), record("vectors", metrics={"refusal": theirs})]
            return pivot(rows, ["defense"], [], ["refusal"], "plain").cells[("vectors",), (), "refusal"].mark

        assert mark(rate(67, 120)) == "▲"
        assert mark(rate(67, 120)[::-1]) == ""

    def test_only_the_seeds_that_both_have_are_compared(self, records):
        kept = [r for r in records if (r.cell["defense"], r.cell["seed"]) not in (("plain", 2), ("vectors", 0))]
        cell = pivot(kept, ["defense"], ["poison"], ["refusal"], "plain").cells[("vectors",), (0.1,), "refusal"]
        assert (cell.score.seeds, cell.difference.seeds) == (2, 1)
        assert cell.difference.value == pytest.approx(28 / 40)

    def test_a_mapping_puts_fields_in_the_cells_place(self, records):
        table = pivot(records, ["defense"], ["poison"], ["refusal"], {"poison": 0.0})
        assert [table.cells[(d,), (0.1,), "refusal"].mark for d in ("plain", "vectors")] == ["▼", ""]
        one = pivot(records, ["defense"], ["poison"], ["refusal"], {"defense": "plain", "poison": 0.1})
        assert one.cells[("plain",), (0.0,), "refusal"].mark == "▲"
        assert one.cells[("plain",), (0.1,), "refusal"].difference is None

    @pytest.mark.parametrize("reference", ["none", {"poison": 0.5}, {"attack": "harmful"}])
    def test_a_reference_that_nobody_ran_is_refused(self, records, reference):
        with pytest.raises(UserError, match="to compare with"):
            pivot(records, ["defense"], ["poison"], ["refusal"], reference)

    def test_prompts_that_differ_are_refused_with_the_cell(self, records):
        records[1] = record("vectors", 0.1, 0, {"refusal": rate(10, 30)})
        with pytest.raises(UserError, match=r"refusal of defense vectors.*seed 0.*same seeds and prompts"):
            pivot(records, ["defense"], ["poison"], ["refusal"], "plain")


class TestView:
    def test_rates_are_percent_and_losses_three_digits(self, records):
        table = pivot(records, ["defense"], [], ["refusal", "drift"], where={"poison": 0.0})
        assert cells(table)["plain"][0].startswith("98% [9")
        assert cells(table)["plain"][2].startswith("0.497 [0.")
        assert pivot(records, ["defense"], ["poison"], ["refusal"], rates=()).markdown().count("%") == 1

    def test_heads_tell_metric_direction_and_column(self, records):
        head = pivot(records, ["defense"], ["poison"], ["refusal", "compliance"]).markdown().splitlines()[0]
        metrics = [f"{metric}, poison {p}" for metric in ("refusal ↑", "compliance ↓") for p in ("0", "0.1")]
        assert head == f"| defense | {' | '.join(metrics)} |"

    def test_n_and_seeds_are_told_once(self, records):
        table = pivot(records, ["defense"], ["poison"], ["refusal", "compliance", "drift"])
        assert "refusal, compliance: n=120, 3 seeds; drift: n=3, 3 seeds." in notes(table)[0]
        assert "n=120" not in table.markdown().partition("- Means")[0]
        assert any("Student" in note for note in notes(table))

    def test_what_lies_between_0_and_1_has_an_interval_there(self, records):
        values = dict(enumerate((0.73, 0.8, 1.0)))
        found = [dataclasses.replace(r, metrics={"auroc": [values[r.cell["seed"]]]}) for r in records]
        shown = cells(pivot(found, ["defense"], ["poison"], ["auroc"]))["plain"][0]
        assert shown.startswith("0.843 [0.") and ", 1.00]" in shown

    def test_cells_with_other_seeds_say_so_and_single_ones_have_a_dagger(self, records):
        kept = [r for r in records if r.cell["defense"] == "plain" or r.cell["seed"] == 0]
        kept = [r for r in kept if r.cell["poison"] == 0.0 or r.cell["seed"] < 2 or r.cell["defense"] != "plain"]
        shown = cells(pivot(kept, ["defense"], ["poison"], ["refusal"]))
        assert not any("†" in text for text in shown["plain"])
        assert all(text.endswith("†") for text in shown["vectors"])
        assert {"n=120 of 3 seeds" in text for text in shown["plain"]} == {True, False}

    def test_one_seed_throughout_is_told_without_daggers(self, records):
        table = pivot(records, ["defense"], ["poison"], ["refusal"], where={"seed": 1})
        assert "†" not in table.markdown()
        assert "One seed: the interval leaves out what seeds differ by." in notes(table)

    def test_a_failed_cell_is_shown_with_its_reason(self, records):
        kept = [r for r in records if (r.cell["defense"], r.cell["poison"]) != ("vectors", 0.1)]
        failed = [record("vectors", 0.1, seed, error="out of\nmemory") for seed in range(3)]
        table = pivot([*kept, *failed], ["defense"], ["poison"], ["refusal", "drift"], "plain")
        words = [text.partition(" ")[0] for text in cells(table)["vectors"]]
        assert words == ["98%", "failed", "3%", "failed", "0.0967", "failed"]
        assert cells(table)["vectors"][1] == "failed (1)"
        assert "(1) seeds 0, 1, 2 failed: out of memory" in notes(table)

    def test_one_failed_seed_is_left_out_and_told(self, records):
        kept = [r for r in records if (r.cell["defense"], r.cell["poison"], r.cell["seed"]) != ("vectors", 0.1, 1)]
        failed = record("vectors", 0.1, 1, {"refusal": rate(0)}, error="disk full")
        table = pivot([*kept, failed], ["defense"], ["poison"], ["refusal"], "plain")
        assert cells(table)["vectors"][1].endswith("n=80 of 2 seeds ▲ (1)")
        assert "(1) seed 1 failed: disk full" in notes(table)

    def test_all_failed_still_prints(self):
        table = pivot([record(error="no device")], ["defense"], [], ["refusal"], "plain")
        assert cells(table) == {"plain": ["failed (1)"]}

    def test_missing_cells_and_metrics_are_a_dash(self, records):
        extra = record("caft", 0.1, 0, {"drift": [0.2]})
        shown = cells(pivot([*records, extra], ["defense"], ["poison"], ["refusal", "drift"]))
        assert shown["caft"] == ["-", "-", "-", "-", "-", "0.200 n=1 †"]

    def test_what_is_outside_the_table_is_told(self, records):
        table = pivot(records, ["defense"], [], ["refusal"], where={"poison": 0.1})
        assert "The same in all cells: attack harmful, poison 0.1, scoring rules 1." in notes(table)
        rows = [record("plain", metrics={"drift": [1]}, rate=1e-3), record("caft", metrics={"drift": [1]}, rate=2e-3)]
        assert "Not the same in all cells, though not shown: rate." in notes(pivot(rows, ["defense"], [], ["drift"]))

    def test_markdown_has_as_many_cells_in_each_line(self):
        rows = [record("a|b", p, metrics={"drift": [0.5]}, error="a | b" if p else None) for p in (0.0, 0.1)]
        lines = pivot(rows, ["defense", "seed"], ["poison"], ["drift"]).markdown().splitlines()[:3]
        assert {line.replace(r"\|", "").count("|") for line in lines} == {5}

    def test_the_terminal_shows_the_same_words(self, records):
        table = pivot(records, ["defense"], ["poison"], ["refusal", "drift"], "plain")
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(table.terminal())
        words = " ".join(console.export_text().split())
        for text in [*itertools.chain(*cells(table).values()), *notes(table)]:
            assert text in words

    def test_points_and_sweeps_are_the_cells_scores(self, records):
        table = pivot(records, ["defense"], ["poison"], ["refusal", "compliance"], where={"attack": ["harmful"]})
        sweep = table.sweep("refusal")
        assert list(sweep) == ["plain", "vectors", "control"]
        assert all([at for at, _ in line] == [0, 0.1] for line in sweep.values())
        assert sweep["plain"][1][1] == table.cells[("plain",), (0.1,), "refusal"].score
        with pytest.raises(UserError, match="where"):
            table.points("refusal", "compliance")
        with pytest.raises(UserError, match="'drift'"):
            table.sweep("drift")
        one = pivot(records, ["defense"], [], ["refusal", "compliance"], where={"poison": 0.1})
        assert one.points("compliance", "refusal")["plain"][1].value == pytest.approx(11 / 40)
        with pytest.raises(UserError, match="numbers"):
            one.sweep("refusal")
        extra = record("caft", 0.1, 0, {"compliance": rate(1)})
        lacking = pivot([*records, extra], ["defense"], [], ["refusal", "compliance"], where={"poison": 0.1})
        assert "caft" not in lacking.points("compliance", "refusal")


class TestPublished:
    @pytest.mark.parametrize("table", published.PUBLISHED, ids=lambda table: table.name)
    def test_is_rectangular_and_says_what_it_is(self, table):
        assert {len(numbers) for numbers in table.rows.values()} == {len(table.columns)} == {len(table.digits)}
        assert len(set(table.columns)) == len(table.columns)
        text = table.markdown()
        assert f"another model ({table.model}), other data" in text and table.source in text and table.units in text
        assert ("unverified" in text) == table.secondary == table.name.startswith("Security vectors")

    def test_numbers_are_shown_as_printed(self):
        assert "| base | 0.05 | 0.47 | 0.74 |" in published.REPNOISE_1.markdown()
        assert "| 1 | 54.4 | 94.4 | 0.0047 | 0.0075 |" in published.VACCINE_6.markdown()
        assert "| nothing | 0 | 1.00 | - | - |" in published.SECURITY_VECTORS_1.markdown()

    def test_averages_are_those_of_their_rows_but_for_the_two_named(self):
        wrong = set()
        for method, numbers in published.VACCINE_1.rows.items():
            for start in (0, 6):
                if abs(np.mean(numbers[start : start + 5]) - numbers[start + 5]) > 0.011:
                    wrong.add((method, published.VACCINE_1.columns[start + 5]))
        assert wrong == {("VLGuard", "HS, average"), ("KL", "FA, average")}
        assert "VLGuard" in published.VACCINE_1.note and "KL" in published.VACCINE_1.note
