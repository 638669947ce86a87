"""No table is wider than eight columns, none loses a number by that, and refusal is never shown alone."""

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from secvec_jax.evaluation import published, report
from secvec_jax.evaluation.metrics import SAFETY, with_companions
from secvec_jax.evaluation.results import Results
from secvec_jax.evaluation.tables import MAX_COLUMNS, split_evenly, split_metrics

METRICS = (
    "task", "refusal", "over_refusal", "compliance", "drift", "harmful_loss", "bias", "f1", "auroc", "benign_loss",
)  # fmt: skip
PUBLISHED = [table for table in vars(published).values() if isinstance(table, published.Published)]


def widths(markdown: str) -> list[int]:
    return [line.replace(r"\|", "").count("|") - 1 for line in markdown.splitlines() if line.startswith("|")]


def headers(markdown: str) -> list[str]:
    return re.findall(r"(?m)^(\|.*\|)\n\| ---", markdown)


class TestSplit:
    @given(st.lists(st.sampled_from(METRICS), unique=True, min_size=1), st.integers(4, MAX_COLUMNS - 1))
    @settings(max_examples=50)
    def test_every_metric_is_shown_once_and_no_part_is_too_wide(self, metrics, room):
        parts = split_metrics(metrics, room)
        assert sorted(metric for part in parts for metric in part) == sorted(metrics)
        assert all(len(part) <= room for part in parts)
        if "refusal" in metrics:
            together = {metric for metric in metrics if metric in SAFETY}
            assert all(together <= set(part) for part in parts if "refusal" in part)

    @given(st.integers(0, 40), st.integers(1, MAX_COLUMNS))
    @settings(max_examples=50)
    def test_every_setting_is_shown_once_and_no_part_is_too_wide(self, count, room):
        parts = split_evenly(count, room)
        assert [index for part in parts for index in part] == list(range(count))
        assert all(len(part) <= room for part in parts) and len(parts) == -(-count // room)

    def test_parts_are_of_similar_sizes(self):
        assert [len(part) for part in split_metrics([str(i) for i in range(8)], 7)] == [4, 4]
        assert split_evenly(10, 7) == [range(0, 5), range(5, 10)]

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


def test_a_report_and_a_terminal_split_wide_tables(tmp_path):
    score = {"value": 0.25, "n": 4, "ci95": [0.0, 0.5]}
    rows = [
        {"name": "plain", "metrics": dict.fromkeys(METRICS, score)},
        {"name": "base", "metrics": {"drift": score}},
    ]
    text = report.scores_table(rows)
    assert max(widths(text)) <= MAX_COLUMNS and len(headers(text)) == 2
    refusals = next(header for header in headers(text) if "| refusal ↑ (n=4) |" in header)
    assert "| refusal ↑ (n=4) | compliance ↓ (n=4) | harmful loss ↑ (n=4) |" in refusals
    assert text.count("| base |") == 1, "a row without a number of the part is left out"
    results = Results("command", rows=rows)
    console = Console(width=118, file=io.StringIO())
    assert [len(view.columns) for view in drawn(report.table(results), console)] == [6, 6]
    results.save(tmp_path / "run")
    compared = drawn(report.compare([tmp_path / "run"]), console)
    assert all(len(view.columns) <= MAX_COLUMNS for view in compared)


def drawn(tables: report.TerminalTables, console: Console) -> list[Table]:
    return [view for view in tables.__rich_console__(console, console.options) if view]


class TestPublished:
    @pytest.mark.parametrize("table", PUBLISHED, ids=lambda table: table.name)
    def test_is_rectangular_and_names_its_source(self, table):
        assert {len(numbers) for numbers in table.rows.values()} == {len(table.columns)} == {len(table.digits)}
        assert len(set(table.columns)) == len(table.columns)
        text = table.markdown()
        assert f"another model ({table.model}), other data" in text and table.source in text and table.units in text
        assert ("unverified" in text) == table.secondary == table.name.startswith("Security vectors")
        assert max(widths(text)) <= MAX_COLUMNS

    def test_numbers_are_shown_as_printed(self):
        assert "| base | 0.05 | 0.47 | 0.74 |" in published.REPNOISE_1.markdown()
        assert "| 1 | 54.4 | 94.4 | 0.0047 | 0.0075 |" in published.VACCINE_6.markdown()
        assert "| nothing | 0 | 1.00 | - | - |" in published.SECURITY_VECTORS_1.markdown()
        assert "| Vaccine | 92.6 | 92.6 | 93.0 | 93.8 | 95.0 | 93.40 |" in published.VACCINE_1.markdown()

    def test_averages_are_those_of_their_rows_except_the_two_named(self):
        wrong = set()
        for method, numbers in published.VACCINE_1.rows.items():
            for start in (0, 6):
                if abs(np.mean(numbers[start : start + 5]) - numbers[start + 5]) > 0.011:
                    wrong.add((method, published.VACCINE_1.columns[start + 5]))
        assert wrong == {("VLGuard", "HS, average"), ("KL", "FA, average")}
        assert "VLGuard" in published.VACCINE_1.note and "KL" in published.VACCINE_1.note
