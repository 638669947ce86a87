"""An audit's table, report.md and report.html: the numbers of results.json, and nothing that a text can inject."""

import dataclasses
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from secvec_jax.evaluation import audit_page, audit_report
from secvec_jax.evaluation.audit import Audit, Limits, compared
from secvec_jax.evaluation.audit_changes import Change
from secvec_jax.evaluation.report import markdown
from secvec_jax.evaluation.results import Results
from tests import browser

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


def test_the_headline_names_a_limit_that_nothing_was_measured_for():
    lines = compared(BEFORE, BEFORE, Limits())
    passing = Audit("a", "b", tuple(line for line in lines if line.verdict == "passes"))
    assert passing.verdict == "passes" and "passes: all" in audit_report.headline(passing)
    missing = dataclasses.replace(passing, unmeasured=("data_loss",))
    assert audit_report.headline(missing) == "The audit is inconclusive: nothing was measured for limits.data_loss."
    assert audit_report.headline(Audit("a", "b", ())) == "The audit is inconclusive: no measure has a limit."


VOID = {"br", "meta"}
"""Elements of the page that have no end."""


class Page(HTMLParser):
    """The tags of a page, their attributes, and the values in its rows by metric."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.rows: dict[str, dict[str, dict]] = {}
        self.metric: str | None = None
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_startendtag(self, tag, attrs):  # as <rect ... />
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
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
    page = Page(audit_page.page(audit, results))
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
    for text in (audit_page.page(audit, results), audit._repr_html_()):
        page = Page(text)
        assert not {"script", "img", "iframe", "link", "object", "embed"} & {tag for tag, _ in page.tags}
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        assert "<script" not in text and "49" not in "".join(data for data in page.texts if "alert" in data)
        assert HOSTILE in "".join(page.texts), "shown as it is"


def test_the_page_needs_nothing_from_elsewhere(audit, results):
    text = audit_page.page(audit, results)
    page = Page(text)
    assert not [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert ("html", {"lang": "en"}) in page.tags and text.startswith("<!DOCTYPE html>\n")


def test_every_color_is_set_for_light_and_for_dark(audit, results):
    for text in (audit_page.page(audit, results), audit._repr_html_()):
        styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
        light, *dark = styles.split("@media (prefers-color-scheme: dark)")
        assert dark, "there is a dark scheme"
        used, set_light = set(re.findall(r"var\((--\w+)\)", text)), set(re.findall(r"(--\w+): #", light + styles))
        set_dark = set(re.findall(r"(--\w+): #", "".join(dark)))
        assert used == set_light == set_dark


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
    assert audit_report.headline(audit).startswith("The audit fails: prefill 5: 100% → 43%, -57.1 [")
    same = dataclasses.replace(audit, lines=compared(BEFORE, BEFORE))
    assert audit_report.headline(same) == "The audit passes: all 4 measures with a limit are within it."


def test_other_commands_show_an_audits_rows(results):
    assert "after minus before" in markdown(results)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium is installed: set $SECVEC_CHROMIUM to one")
    opened = browser.Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


NUMBERS = """Array.from(document.querySelectorAll("tr[data-metric]"), row => [row.dataset.metric, Object.fromEntries(
    Array.from(row.querySelectorAll("td[data-value]"), cell => [cell.dataset.label, [cell.dataset.value,
    cell.innerText, cell.getBoundingClientRect().width, cell.getBoundingClientRect().right]]))])"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page(audit, results, tab, tmp_path, width, dark):
    """Without an error, a request or a cell beyond the edge, and with the numbers of results.json."""
    results.save(tmp_path)
    path = tmp_path / "report.html"
    path.write_text(audit_page.page(audit, results))
    tab.open(path, width, 900, dark)
    assert [sent["request"]["url"] for sent in tab.of("Network.requestWillBeSent")] == [path.as_uri()]
    told = [*tab.of("Log.entryAdded"), *tab.of("Runtime.consoleAPICalled"), *tab.of("Runtime.exceptionThrown")]
    assert not told
    assert tab.value("document.documentElement.scrollWidth") <= width, "nothing has to be scrolled to the side"
    background = tab.value("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(22, 24, 29)" if dark else "rgb(255, 255, 255)")
    rows = {row["name"]: row["metrics"] for row in Results.load(tmp_path).rows}
    shown = dict(tab.value(NUMBERS))
    assert set(shown) == set(rows["before"])
    for metric, cells in shown.items():
        assert all(text and 0 < wide <= width and right <= width for _, text, wide, right in cells.values())
        stored = {name: rows[name][metric]["value"] for name in ("before", "after")}
        stored |= {"difference": rows["after minus before"][metric]["value"], "n": rows["before"][metric]["n"]}
        assert {name: float(cells[name][0]) for name in stored} == stored
        text = cells["after"][1]
        number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
        assert number == pytest.approx(stored["after"], abs=0.0051)
