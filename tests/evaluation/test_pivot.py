"""Records are grouped over seeds, compared in pairs, and shown with what is missing or failed."""

import dataclasses
import re

import pytest

from secvec_jax.errors import UserError
from secvec_jax.evaluation import statistics
from secvec_jax.evaluation.metrics import BETTER, LOSSES, RATES
from secvec_jax.evaluation.pivot import differences, summarize
from secvec_jax.evaluation.records import Record
from secvec_jax.evaluation.tables import MAX_COLUMNS

METRICS = [
    "task", "refusal", "over_refusal", "compliance", "drift", "harmful_loss", "bias", "f1", "auroc", "benign_loss",
]  # fmt: skip


def record(defense="plain", poison=0.1, seed=0, metrics=None, error=None, **more):
    cell = {"defense": defense, "attack": "harmful", "poison": poison, "seed": seed} | more
    return Record(cell, metrics or {}, 9.5, error)


def rate(hits, n=40):
    """0/1 scores in which the first prompts are the easy ones, in every cell."""
    return [1.0] * hits + [0.0] * (n - hits)


@pytest.fixture
def records():
    """Plain refuses a little, vectors nearly always, control as plain does; drift varies from seed to seed."""
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


def at(records, **fields):
    return [r for r in records if all(r.cell[name] == value for name, value in fields.items())]


def entry(summary, metric, *place):
    """The entry of a metric at a place: values of the rows, then of the columns."""
    entries = summary.entries[summary.entries["metric"] == metric]
    fields = list(summary.entries)[:-2]
    (found,) = entries.loc[(entries[fields] == list(place)).all(axis=1), "entry"]
    return found


def texts(summary):
    """(row, metric, setting) -> the text of a cell, of tables with one field as rows."""
    found = {}
    for table in summary.markdown().split("\n\n"):
        lines = [[text.strip() for text in line.strip("|").split(" | ")] for line in table.splitlines()]
        if not table.startswith("|"):
            continue
        header, _, *body = lines
        row = ""
        for line in body:
            row = line[0] or row
            if header[1] == "metric":
                found |= {(row, line[1], setting): text for setting, text in zip(header[2:], line[2:])}
            else:
                found |= {(row, metric, ""): text for metric, text in zip(header[1:], line[1:])}
    return found


def notes(summary):
    return [line.removeprefix("- ") for line in summary.markdown().splitlines() if line.startswith("- ")]


def widths(markdown):
    return [line.replace(r"\|", "").count("|") - 1 for line in markdown.splitlines() if line.startswith("|")]


class TestGrouping:
    def test_seeds_are_averaged_and_nothing_else(self, records):
        summary = summarize(records, ["defense"], ["poison"], ["refusal", "drift"])
        score = entry(summary, "refusal", "plain", 0.1).score
        assert score == statistics.seeded_bootstrap([rate(10), rate(11), rate(12)])
        assert (score.n, score.seeds) == (120, 3)
        assert entry(summary, "drift", "plain", 0.1).score.n == 3
        assert len(summary.entries) == 3 * 2 * 3, "compliance as well, which is shown with refusal"

    def test_cells_that_differ_in_more_than_the_seed_are_not_averaged(self, records):
        other = record("plain", 0.1, 7, {"refusal": rate(10)}, learning_rate=1e-3)
        with pytest.raises(UserError, match=r"defense plain, poison 0\.1 differ in 'learning_rate'"):
            summarize([*records, other], ["defense"], ["poison"], ["refusal"])
        summary = summarize([*records, other], ["defense", "learning_rate"], ["poison"], ["refusal"])
        assert entry(summary, "refusal", "plain", 1e-3, 0.1).score.n == 40
        assert entry(summary, "refusal", "plain", "-", 0.1).score.n == 120
        with pytest.raises(UserError, match="'poison'"):
            summarize(records, ["defense"], [], ["refusal"])

    def test_a_cell_twice_is_refused(self, records):
        with pytest.raises(UserError, match="two records of one cell"):
            summarize([*records, records[0]], ["defense"], ["poison"], ["refusal"])

    def test_cells_of_different_rules_are_kept_separate(self):
        old, new = record(metrics={"refusal": rate(9)}), record("vectors", metrics={"refusal": rate(30)})
        summary = summarize([old, dataclasses.replace(new, rules=2)], ["defense"], [], ["refusal"], "plain")
        assert all(entry.difference is None for entry in summary.entries["entry"])
        assert any("scoring rules" in note for note in notes(summary))
        first, second = (record(seed=seed, metrics={"refusal": rate(9)}) for seed in (1, 2))
        with pytest.raises(UserError, match="scoring_rules"):
            summarize([first, dataclasses.replace(second, rules=2)], ["defense"], [], ["refusal"])

    def test_numbers_are_ascending_and_text_as_it_comes(self, records):
        table = summarize(records, ["defense"], ["poison"], ["refusal"]).markdown()
        assert "| defense | metric | 0 | 0.1 |" in table
        assert re.findall(r"(?m)^\| (\w+) \| refusal", table) == ["plain", "vectors", "control"]

    def test_settings_of_several_fields_are_in_order(self):
        cells = [
            record(defense, poison, metrics={"task": rate(20)}, optimizer=optimizer)
            for optimizer, poison in (("sgd", 0.2), ("adamw", 0.1), ("sgd", 0.1))
            for defense in ("plain", "vectors")
        ]
        table = summarize(cells, ["defense"], ["optimizer", "poison"], ["task"]).markdown()
        assert "| defense | metric | sgd, 0.1 | sgd, 0.2 | adamw, 0.1 |" in table

    @pytest.mark.parametrize(
        "rows, columns, metrics, what",
        [
            (["defence"], [], ["refusal"], "'defence': the fields are 'attack', 'defense', 'poison', 'seed'"),
            (["defense"], ["poison"], ["refusals"], "'refusals': there are 'compliance', 'drift', 'refusal'"),
            (["defense"], ["defense"], ["refusal"], "twice"),
            (["defense"], [], [], "at least"),
            ([], ["poison"], ["refusal"], "at least"),
            (["a", "b", "c", "d", "e"], [], ["refusal"], "1 to 4 fields"),
        ],
    )
    def test_unknown_names_are_refused(self, records, rows, columns, metrics, what):
        with pytest.raises(UserError, match=what):
            summarize(records, rows, columns, metrics)

    def test_no_records_are_refused(self):
        with pytest.raises(UserError, match="no records"):
            summarize([], ["defense"], [], ["refusal"])


class TestMarks:
    def marks(self, summary):
        pairs = zip(summary.entries["metric"], summary.entries["defense"], summary.entries["entry"])
        return {(metric, defense): entry.mark(metric) for metric, defense, entry in pairs}

    def test_significant_differences_are_marked_and_no_others(self, records):
        metrics = ["refusal", "compliance", "drift"]
        marks = self.marks(summarize(at(records, poison=0.1), ["defense"], [], metrics, "plain"))
        assert marks == {(metric, defense): "▲" if defense == "vectors" else ""
                         for metric in metrics for defense in ("plain", "vectors", "control")}  # fmt: skip
        marks = self.marks(summarize(at(records, poison=0.0), ["defense"], [], metrics, "plain"))
        assert {key for key, mark in marks.items() if mark} == {("drift", "vectors")}

    def test_the_reference_decides_which_is_worse(self, records):
        marks = self.marks(summarize(at(records, poison=0.1), ["defense"], [], ["refusal", "drift"], "vectors"))
        assert {defense: mark for (_, defense), mark in marks.items()} == {"plain": "▼", "vectors": "", "control": "▼"}

    def test_a_metric_without_direction_is_only_different(self):
        cells = [
            record(d, seed=s, metrics={"grad_norm": [v + s / 100]})
            for d, v in (("plain", 1), ("kl", 9))
            for s in range(3)
        ]
        cells[0] = record("plain", seed=0, metrics={"grad_norm": [1.005]})
        assert self.marks(summarize(cells, ["defense"], [], ["grad_norm"], "plain"))["grad_norm", "kl"] == "≠"

    def test_every_known_metric_has_a_direction(self):
        assert {*RATES, *LOSSES} <= set(BETTER)
        assert BETTER["harmful_loss"] != BETTER["benign_loss"]

    def test_pairs_are_made_prompt_by_prompt(self):
        """The same two rates differ significantly if prompts are matched, and not if the match is destroyed."""

        def mark(theirs):
            rows = [record("plain", metrics={"refusal": rate(60, 120)}), record("vectors", metrics={"refusal": theirs})]
            return self.marks(summarize(rows, ["defense"], [], ["refusal"], "plain"))["refusal", "vectors"]

        assert mark(rate(67, 120)) == "▲"
        assert mark(rate(67, 120)[::-1]) == ""

    def test_only_the_seeds_that_both_have_are_compared(self, records):
        kept = [r for r in records if (r.cell["defense"], r.cell["seed"]) not in (("plain", 2), ("vectors", 0))]
        compared = entry(summarize(kept, ["defense"], ["poison"], ["refusal"], "plain"), "refusal", "vectors", 0.1)
        assert (compared.score.seeds, compared.difference.seeds) == (2, 1)
        assert compared.difference.value == pytest.approx(28 / 40)

    def test_a_reference_that_was_not_run_is_refused(self, records):
        with pytest.raises(UserError, match="to compare with"):
            summarize(records, ["defense"], ["poison"], ["refusal"], "none")

    def test_prompts_that_differ_are_refused_with_the_cell(self, records):
        records[1] = record("vectors", 0.1, 0, {"refusal": rate(10, 30)})
        with pytest.raises(UserError, match=r"refusal of defense vectors.*seed 0.*same seeds and prompts"):
            summarize(records, ["defense"], ["poison"], ["refusal"], "plain")


class TestMarkdown:
    def test_units_and_sizes_are_in_the_caption_and_not_in_the_table(self, records):
        text = summarize(records, ["defense"], ["poison"], ["refusal", "drift"]).markdown()
        caption, table = text.split("\n\n")[:2]
        assert caption == (
            "Settings: poison. Units: % (refusal, compliance), plain numbers (drift). "
            "n per seed: 40 (refusal, compliance), 1 (drift). Seeds: 3."
        )
        assert "%" not in table and "n=" not in table
        loss = summarize([record(metrics={"harmful_loss": [1.0, 2.0]})], ["defense"], [], ["harmful_loss"])
        assert "nats per token (harmful loss)" in loss.markdown()

    def test_rates_are_whole_percent_and_losses_three_digits(self, records):
        shown = texts(summarize(at(records, poison=0.0), ["defense"], [], ["refusal", "drift"]))
        assert shown["plain", "refusal ↑", ""].startswith("98 [9")
        assert shown["plain", "drift ↓", ""].startswith("0.497 [0.")

    def test_values_from_0_to_1_have_an_interval_there(self, records):
        values = (0.73, 0.8, 1.0)
        cells = [record(seed=seed, metrics={"auroc": [value]}) for seed, value in enumerate(values)]
        shown = texts(summarize(cells, ["defense"], [], ["auroc"]))["plain", "auroc ↑", ""]
        assert shown.startswith("0.843 [0.") and ", 1.00]" in shown

    @pytest.mark.parametrize("rows", [["defense"], ["defense", "seed"], ["defense", "poison", "learning_rate", "seed"]])
    def test_no_table_is_too_wide_and_no_number_is_lost(self, rows):
        poisons = [round(0.1 * i, 1) for i in range(9)]
        cells = [
            record(defense, poison, seed, {name: [0.5] * 7 + [0.0] for name in METRICS}, learning_rate=1e-4)
            for defense in ("none", "kl") for poison in poisons for seed in (0, 1)
        ]  # fmt: skip
        columns = [name for name in ("poison", "learning_rate") if name not in rows]
        text = summarize(cells, rows, columns, METRICS, "none").markdown()
        assert max(widths(text)) <= MAX_COLUMNS and text.count("| ---") > 1
        values = sum(len(re.findall(r"0\.438|44 ", line)) for line in text.splitlines() if line.startswith("|"))
        assert values == len(METRICS) * 2 * len(poisons) * (2 if "seed" in rows else 1)

    def test_refusal_is_never_shown_without_its_companions(self):
        cells = [record(d, p, metrics={m: [0.5, 1.0] for m in METRICS}) for d in ("none", "kl") for p in (0.0, 0.1)]
        cells.append(record("lone", 0.1, metrics={m: [0.5, 1.0] for m in METRICS}))
        for kept in (cells, cells[:1]):
            tables = [t for t in summarize(kept, ["defense"], ["poison"], METRICS).markdown().split("\n\n") if "|" in t]
            for table in tables:
                has_refusal = bool(re.search(r"\| refusal ↑", table))
                assert has_refusal == ("| compliance ↓" in table) == ("| harmful loss ↑" in table)
            assert any("| refusal ↑" in table for table in tables)

    def test_defenses_run_at_one_setting_have_a_table_of_it(self, records):
        text = summarize([*records, record("lone", 0.1, metrics={"refusal": rate(9)})], ["defense"], ["poison"],
                         ["refusal"]).markdown()  # fmt: skip
        across, at_one = text.split("**poison 0.1**")
        assert "| lone |" not in across and "| lone |" in at_one and "| plain |" in at_one
        assert "| defense | refusal ↑ | compliance ↓ |" in at_one and "**poison 0**" not in text

    def test_cells_with_other_sizes_say_so_and_single_seeds_have_a_dagger(self, records):
        kept = [r for r in records if r.cell["defense"] == "plain" or r.cell["seed"] == 0]
        kept = [r for r in kept if r.cell["poison"] == 0.0 or r.cell["seed"] < 2 or r.cell["defense"] != "plain"]
        kept.append(record("short", 0.0, metrics={"refusal": rate(9, 30)}))
        shown = texts(summarize(kept, ["defense"], ["poison"], ["refusal"]))
        assert shown["plain", "refusal ↑", "0.1"].endswith("] 2 seeds")
        assert shown["plain", "refusal ↑", "0"].endswith("]")
        assert shown["vectors", "refusal ↑", "0"].endswith("] †")
        assert shown["short", "refusal ↑", ""].endswith("] n=30 †")

    def test_one_seed_throughout_is_a_note_without_daggers(self, records):
        summary = summarize(at(records, seed=1), ["defense"], ["poison"], ["refusal"])
        assert "†" not in summary.markdown()
        assert "One seed: the intervals do not include how seeds vary." in notes(summary)

    def test_a_failed_cell_is_shown_with_its_reason(self, records):
        kept = [r for r in records if (r.cell["defense"], r.cell["poison"]) != ("vectors", 0.1)]
        failed = [record("vectors", 0.1, seed, error="out of\nmemory") for seed in range(3)]
        summary = summarize([*kept, *failed], ["defense"], ["poison"], ["refusal", "drift"], "plain")
        assert texts(summary)["vectors", "refusal ↑", "0.1"] == "failed (1)"
        assert texts(summary)["vectors", "drift ↓", "0"].startswith("0.0967")
        assert "(1) seeds 0, 1, 2 failed: out of memory" in notes(summary)

    def test_one_failed_seed_is_left_out_and_noted(self, records):
        kept = [r for r in records if (r.cell["defense"], r.cell["poison"], r.cell["seed"]) != ("vectors", 0.1, 1)]
        failed = record("vectors", 0.1, 1, {"refusal": rate(0)}, error="disk full")
        summary = summarize([*kept, failed], ["defense"], ["poison"], ["refusal"], "plain")
        assert texts(summary)["vectors", "refusal ↑", "0.1"].endswith("2 seeds ▲ (1)")
        assert "(1) seed 1 failed: disk full" in notes(summary)

    def test_all_failed_still_prints(self):
        summary = summarize([record(error="no device")], ["defense"], [], ["refusal"], "plain")
        assert texts(summary) == {("plain", "refusal ↑", ""): "failed (1)"}

    def test_missing_metrics_are_a_dash(self, records):
        extra = record("caft", 0.1, 0, {"drift": [0.2]})
        shown = texts(summarize([*at(records, poison=0.1), extra], ["defense"], [], ["refusal", "drift"]))
        assert [shown["caft", metric, ""] for metric in ("refusal ↑", "compliance ↓", "drift ↓")] == [
            "-",
            "-",
            "0.200 †",
        ]

    def test_fields_outside_the_table_are_noted(self, records):
        summary = summarize(at(records, poison=0.1), ["defense"], ["poison"], ["refusal"])
        assert "The same in all cells: attack harmful, poison 0.1, scoring rules 1." in notes(summary)
        rows = [record("plain", metrics={"drift": [1]}, rate=1e-3), record("caft", metrics={"drift": [1]}, rate=2e-3)]
        assert "Not shown, and not the same in all cells: rate." in notes(summarize(rows, ["defense"], [], ["drift"]))

    def test_each_line_has_as_many_cells(self):
        rows = [record("a|b", p, metrics={"drift": [0.5]}, error="a | b" if p else None) for p in (0.0, 0.1)]
        text = summarize(rows, ["defense", "seed"], ["poison"], ["drift"]).markdown()
        assert set(widths(text)) == {5}


class TestDifferences:
    def cells(self):
        shares = {"none": (0.1, 0.3, 0.2), "kl": (0.9, 0.6, 0.9)}
        return [
            record(name, poison, seed, {"refusal": rate(round(20 * share), 20), "drift": [share]})
            for name, of_seed in shares.items()
            for poison in (0.0, 0.1)
            for seed, share in enumerate(of_seed)
            if (name, poison) != ("kl", 0.1)
        ]

    def test_by_hand(self):
        summary = differences(self.cells(), [("kl", "none"), ("kl", "absent")], ["poison"], ["refusal", "drift"])
        assert set(summary.entries["poison"]) == {0.0}, "only what both were run with"
        score = entry(summary, "refusal", "kl minus none", 0.0).score
        assert score.value == pytest.approx(0.6) and score.n == 60
        # 0.8, 0.3 and 0.7: mean 0.6, deviation 0.2646, t(2) = 4.3027
        assert score.by_seed == pytest.approx((0.6 - 0.6572, 0.6 + 0.6572), abs=1e-3)
        shown = texts(summary)
        text = shown["kl minus none", "refusal ↑", ""]
        assert text.startswith("+60.0 [+") and text.endswith("] t [-5.7, +125.7] ▲")
        one_number = shown["kl minus none", "drift ↓", ""]
        assert one_number == "+0.600 [-0.0572, +1.26]", "one number per seed has one interval, not two"
        assert "percentage points (refusal)" in summary.markdown() and "the second defense" in summary.markdown()
        assert "The same in all cells: poison 0." in notes(summary)

    def test_settings_are_across(self):
        cells = [record(d, p, 0, {"task": rate(h)}) for d, h in (("kl", 30), ("none", 9)) for p in (0.2, 0.1)]
        text = differences(cells, [("kl", "none")], ["poison"], ["task"]).markdown()
        assert "| difference | metric | 0.1 | 0.2 |" in text and "| kl minus none | task ↑ | +52.5 [" in text

    def test_none_if_no_pair_was_run(self):
        assert differences(self.cells(), [("kl", "ewc")], ["poison"], ["refusal"]) is None
        assert differences(self.cells(), [], ["poison"], ["refusal"]) is None

    def test_seeds_that_agree_have_no_interval_of_seeds(self):
        cells = [record(d, 0.1, s, {"task": rate(h)}) for d, h in (("kl", 40), ("none", 0)) for s in (0, 1)]
        assert entry(differences(cells, [("kl", "none")], [], ["task"]), "task", "kl minus none").score.by_seed is None
