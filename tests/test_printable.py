"""What others wrote reaches terminals, reports and cards as text: no escape sequences, markup, Markdown or HTML."""

import io
import logging
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt  # rich depends on it
from rich.progress import Progress, TextColumn

from secvec_jax import progress
from secvec_jax.command_line import _ScreenHandler
from secvec_jax.errors import UserError
from secvec_jax.evaluation.plots import plot_histogram, png
from secvec_jax.evaluation.report import TerminalTables
from secvec_jax.evaluation.tables import markdown_table, terminal_table
from secvec_jax.printable import LONGEST_MESSAGE, code, fenced, hidden, markdown, paragraph, printable
from secvec_jax.terminal import Console

many = settings(max_examples=200)
HOSTILE = (
    "a\x1b]0;title\x07 \x1b[2Jb \x9b31m\x00 \u202egnp.exe [/x] [red]r[/] [link=http://e]l[/link] :smile: "
    "|<img src=http://e>`c` *d* ![i](http://e) [l][m] \\| $\\bad{$ \ud800 \u2028\n# h\n[m]: http://e\n```\n<b>"
)
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
hostile = st.lists(
    st.sampled_from(["\x1b[31m", "\x9b", "\r", "\n", "|", "`", "``", "\\", "<", "</b>", "[", "](", "![", "]:", "[/x]",
                     "#", "* ", "1. ", "> ", "---", "\u202e", "\ud800", "a", " ", "&lt;", "$", "\t"])
    | st.text(max_size=3)
).map("".join)  # fmt: skip


def shown(*objects) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=300, color_system=None)
    for each in objects:
        console.print(each)
    return stream.getvalue()


def test_the_console_prints_text_and_nothing_else():
    text = shown(HOSTILE, terminal_table(["name", "n"], [[HOSTILE, "1"]]))
    assert not CONTROLS.search(text)
    assert (
        r"\x1b]0;title" in text
        and r"\u202egnp.exe" in text
        and "[/x] [red]r[/] [link=http://e]l[/link] :smile:" in text
    )
    assert len(shown(terminal_table(["name"], [[HOSTILE]])).strip().splitlines()) == 2, "a cell forged a line"


def test_results_of_any_size_take_little_time_in_a_terminal():
    """rich takes square time for a long name, and a millisecond for each row of each width that is tried."""
    score = {"value": 0.5, "n": 3, "ci95": [0, 1]}
    rows = [{"name": f"{number} {'x' * 100_000}", "metrics": {"refusal": score}} for number in range(3)]
    rows += [{"name": f"row {number}", "metrics": {"refusal": score}} for number in range(5_000)]
    rows.append({"name": "last", "metrics": {f"metric {'y' * 9_999} {number}": score for number in range(500)}})
    start = time.process_time()
    text = shown(TerminalTables([((row["name"],), row) for row in rows], ["model"]))
    assert time.process_time() - start < 3
    assert "row 196" in text and "row 197" not in text, "200 rows"
    assert "4,804 more rows are in results.json" in text and "441 more metrics are in results.json" in text


@pytest.mark.parametrize("size", ["²", "9" * 5_000, "-1", "", "\x1b[31m"])
def test_a_size_that_is_none_does_not_count(monkeypatch, size):
    monkeypatch.setenv("COLUMNS", size)
    monkeypatch.setenv("LINES", size)
    assert 0 < Console(file=io.StringIO()).width < 1_000


def test_styles_and_bars_still_work():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system="standard")
    console.print("[/x] done", style="dim")
    with Progress(TextColumn("{task.description}", markup=False), console=console) as bars:
        bars.add_task("[/x]\x1b]0;t\x07", total=1)
    text = stream.getvalue()
    assert "\x1b[2m[/x] done\x1b[0m" in text and r"[/x]\x1b" in text and "\x1b]0;" not in text


@many
@given(hostile)
def test_nothing_printed_holds_controls(text):
    assert not CONTROLS.search(shown(text).replace("\n", ""))
    assert not CONTROLS.search(printable(text)) and not hidden(printable(text), keep="")
    assert printable(printable(text)) == printable(text)


def test_an_error_is_one_printable_line_of_limited_length():
    for message in (HOSTILE, "a" * 10**7, "\x1b" * 10**6, "a\nb\r\nc\td"):
        text = str(UserError(message))
        assert not CONTROLS.search(text) and len(text.splitlines()) == 1 and len(text) <= LONGEST_MESSAGE
    assert str(UserError("first\n  second")) == "first second"
    assert str(UserError("x" * 5_000 + "the end")).endswith("the end")


def test_the_log_and_the_progress_line_are_printable(capsys, monkeypatch):
    _ScreenHandler().emit(logging.LogRecord("n", logging.WARNING, "p", 1, "%s", (HOSTILE,), None))
    monkeypatch.setattr(progress, "_is_watched", lambda: True)
    with progress.step_progress(HOSTILE, None) as on_step:
        on_step(1, 1, {"loss": 1.0})
    text = capsys.readouterr().err
    assert r"warning: a\x1b]0;title" in text and r": step 1/1" in text
    assert not CONTROLS.search(text.replace("\r", ""))


def test_words_that_are_plain_stay_as_they_are():
    for text in [
        "security vectors",
        "over_refusal",
        "+60.0 [+32.5, +83.3] t [-5.7, +125.7] ▲",
        "-",
        "2 x cpu",
        "n=5",
        "¬ é 日本",
    ]:
        assert markdown(text) == text and printable(text) == text
    assert paragraph("3 of 100 answers are cut (see runs/x).") == "3 of 100 answers are cut (see runs/x)."
    assert code("lora.rank") == "`lora.rank`" and code("('q_proj', 'v_proj')") == "`('q_proj', 'v_proj')`"
    assert printable("family 👨‍👩‍👧 नी‍") == "family 👨‍👩‍👧 नी‍"


def rendered(text: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)


@many
@example("1. ")
@example("_a_ __b__ _a-")
@example("~~a~~")
@example("see https://a.example/b or www.a.example")
@given(hostile)
def test_markdown_shows_the_text_and_makes_nothing_of_it(text):
    html = rendered(paragraph(text))
    assert re.sub(r"</?(?:p|code)>|\s", "", html).count("<") == 0, html
    assert not re.search(r"(?<!\\)://|\bwww(?<!\\)\.", paragraph(text)), "GitHub and the Hub make links of addresses"
    table = rendered(markdown_table(["name", "n"], [[text, "1"]]))
    tags = re.findall(r"<(\w+)", table)
    assert tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"], table


@many
@example("_\x1b[31m_")
@given(hostile)
def test_code_ends_where_it_ends(text):
    html = rendered(f"{code(text)}\n\n{fenced(text, 'bash')}\n\nlast")
    assert html.count("<pre>") == 1 and html.endswith("<p>last</p>\n")
    inside = re.sub(r"(?s)<pre>.*</pre>", "", html)
    assert re.sub(r"</?(?:p|code)>", "", inside).count("<") == 0, html


def test_a_name_in_a_plot_is_no_formula():
    for name in ("$\\bad{$", "$x$", HOSTILE, "a" * 10_000):
        assert png(plot_histogram({name: [0.0, 1.0]}, "score")).startswith(b"\x89PNG")
