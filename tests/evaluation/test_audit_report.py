"""An audit's table, report.md and report.html: the numbers of results.json, and nothing that a text can inject."""

import dataclasses
import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from secvec_jax.evaluation import audit_report
from secvec_jax.evaluation.audit import Audit, Change, Limits, compared
from secvec_jax.evaluation.report import markdown
from secvec_jax.evaluation.results import Results

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}|`"
BEFORE = {
    "refusal": [1.0] * 90 + [0.0] * 6,
    "compliance": [0.0] * 90 + [1.0] * 6,
    "unclear": [0.0] * 96,
    "prefill_5": [1.0] * 70,
    "over_refusal": [0.0] * 92 + [1.0] * 4,
    "harmful_loss": [1.9, 2.1, 1.7],
    "kl": [0.0, 0.0, 0.0],
}
AFTER = BEFORE | {"refusal": [1.0] * 85 + [0.0] * 11, "prefill_5": [1.0] * 30 + [0.0] * 40, "kl": [0.02, 0.3, 0.1]}


class Page(HTMLParser):
    """The tags of a page, their attributes, and the values in its rows by metric."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.rows: dict[str, dict[str, dict]] = {}
        self.metric: str | None = None
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "tr":
            self.metric = attributes.get("data-metric")
        if tag == "td" and self.metric and "data-value" in attributes:
            self.rows.setdefault(self.metric, {})[attributes["data-label"]] = attributes

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def audit() -> Audit:
    change = Change("harmful", HOSTILE, "refuses → complies", HOSTILE, HOSTILE)
    lines = compared(BEFORE, AFTER, Limits(), reference=BEFORE)
    return Audit(HOSTILE, "b", lines, (change,), (HOSTILE,), "runs/reference", {"before": 1.5})


@pytest.fixture
def results(audit) -> Results:
    return Results(f"python eval.py audit --before '{HOSTILE}'", {}, {"python": HOSTILE}, {"before": 1.5}, audit.rows)


def test_the_page_has_the_numbers_of_the_results(audit, results, tmp_path):
    results.save(tmp_path)
    rows = {row["name"]: row["metrics"] for row in Results.load(tmp_path).rows}
    page = Page(audit_report.page(audit, results))
    assert set(page.rows) == set(rows["before"]) == set(BEFORE)
    for metric, cells in page.rows.items():
        assert float(cells["before"]["data-value"]) == rows["before"][metric]["value"]
        assert float(cells["after"]["data-value"]) == rows["after"][metric]["value"]
        difference, stored = cells["difference"], rows["after minus before"][metric]
        shown = [float(difference[f"data-{name}"]) for name in ("value", "low", "high")]
        assert shown == [stored["value"], *stored["ci95"]]
        assert int(cells["n"]["data-value"]) == stored["n"]
        to_reference = rows["after minus reference"][metric]["value"]
        assert float(cells["minus reference"]["data-value"]) == to_reference
    verdicts = {metric: entry["verdict"] for metric, entry in rows["after minus before"].items()}
    assert verdicts["prefill_5"] == "fails" and verdicts["kl"] == "inconclusive" and verdicts["refusal"] is None
    shown = [data.strip() for data in page.texts]
    assert sum(shown.count(name) for name in ("fails", "inconclusive", "passes")) == 1 + sum(
        map(bool, verdicts.values())
    )


def test_no_text_of_a_model_or_prompt_becomes_markup(audit, results):
    for text in (audit_report.page(audit, results), audit._repr_html_()):
        page = Page(text)
        assert not {"script", "img", "iframe", "link", "object", "embed"} & {tag for tag, _ in page.tags}
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        assert "<script" not in text and "49" not in "".join(data for data in page.texts if "alert" in data)
        assert HOSTILE in "".join(page.texts), "shown as it is"


def test_the_page_needs_nothing_from_elsewhere(audit, results):
    text = audit_report.page(audit, results)
    page = Page(text)
    assert not [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text


def test_the_table_fits_a_terminal_of_118_columns(audit):
    console = Console(file=io.StringIO(), width=118)
    console.print(audit_report.table(audit))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 1 + len(audit.lines), "no cell is wrapped"
    assert max(map(len, lines)) <= 118


def test_the_markdown_shows_texts_as_code(audit, results):
    text = audit_report.markdown(audit, results)
    assert "| prefill 5 | 100% | 43% | -57.1 [" in text and "fails" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| harmful |"))
    assert line.replace(r"\|", "").count("|") == 6 and line.count("`") == 6


def test_the_headline_gives_the_reasons(audit):
    assert audit_report.headline(audit).startswith("The audit fails: prefill 5 100% → 43%, -57.1 [")
    same = dataclasses.replace(audit, lines=compared(BEFORE, BEFORE))
    assert audit_report.headline(same) == "The audit passes: all 4 lines with a limit are within it."


def test_other_commands_show_an_audits_rows(results):
    assert "after minus before" in markdown(results)
