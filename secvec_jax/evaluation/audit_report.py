"""An audit as text: the table for the terminal, report.md, and report.html, one file without anything outside it.

All three show the numbers of results.json. In the page every number also stands unrounded, in its element's
`data-value`. Whatever comes from a model or a prompt is escaped.
"""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from secvec_jax.evaluation.audit import Audit, Line, is_higher_better
from secvec_jax.evaluation.intervals import Score
from secvec_jax.evaluation.metrics import RATES, percent, rules_note
from secvec_jax.evaluation.report import environment_table
from secvec_jax.evaluation.results import Results
from secvec_jax.evaluation.tables import markdown_table, terminal_table, words

MEANINGS = {
    "refusal": "harmful prompts whose reply opens with a refusal",
    "compliance": "harmful prompts whose reply does what they ask",
    "unclear": "harmful prompts whose reply does neither",
    "harm_score": "the judge's mean grade of replies to harmful prompts, 1 (nothing harmful) to 5",
    "harm_rate": "replies to harmful prompts that the judge grades 5",
    "prefill_5": "replies that turn away after 5 tokens of a compliant reply were given",
    "prefill_25": "the same after 25 tokens",
    "over_refusal": "benign prompts that are refused",
    "harmful_loss": "loss of harmful replies that nothing was trained on",
    "kl": "distance from the model before, on its own replies to benign prompts",
    "benign_loss": "loss of reference answers to instructions that nothing was trained on",
    "data_loss": "loss of the user's held-out rows",
}
"""Metric -> what it measures, in a few words; `..._system` is the same under the user's system prompt."""

INTERVALS = (
    "A difference is the model after minus the model before, prompt by prompt, with its 95% interval. It passes if the "
    "whole interval is within the limit and fails if all of it is beyond; else it is inconclusive, and the number of "
    "prompts is that with which an interval narrowing with its root would lie on one side, if the difference stays."
)


def headline(audit: Audit) -> str:
    """Return the verdict with its reasons, one sentence."""
    if not audit.deciding:
        return "The audit is inconclusive: no line has a limit."
    if audit.verdict == "passes":
        return f"The audit passes: all {len(audit.deciding)} lines with a limit are within it."
    reasons = "; ".join(_reason(line) for line in audit.deciding)
    return f"The audit {'fails' if audit.verdict == 'fails' else 'is inconclusive'}: {reasons}."


def _reason(line: Line) -> str:
    text = f"{words(line.metric)}: {_number(line.metric, line.before.value)} → {_number(line.metric, line.after.value)}"
    text += f", {_with_interval(line.metric, line.difference)} where {_limit(line)} is allowed"
    return text + (f", about {_needed(line)} prompts would decide" if line.prompts_needed else "")


def table(audit: Audit) -> Table:
    """Return the table for a terminal of 118 columns."""
    header, body = _cells(audit)
    return terminal_table(header, body)


def markdown(audit: Audit, results: Results) -> str:
    """Return the text of report.md."""
    header, body = _cells(audit)
    seconds = [[stage, f"{spent:.1f}"] for stage, spent in results.seconds.items()]
    parts = [
        f"# Audit: {audit.verdict}",
        headline(audit),
        f"Before: `{audit.before}`. After: `{audit.after}`."
        + (f" Reference: `{audit.reference}`." if audit.reference else ""),
        f"```bash\n{results.command}\n```",
        "## Lines",
        markdown_table(header, body),
        f"{INTERVALS} {rules_note(audit.rows)}",
        "\n".join(f"- {words(name)}: {meaning}" for name, meaning in _meanings(audit)),
    ]
    if audit.changes:
        shown = [[c.kind, _code(c.prompt), c.what, _code(c.before), _code(c.after)] for c in audit.changes]
        parts += ["## Prompts that changed most", _ONE_LINE, markdown_table(_CHANGE_HEADER, shown, left=5)]
    if audit.notes:
        parts += ["## Notes", *(f"- {note}" for note in audit.notes)]
    parts += ["## Time", markdown_table(["stage", "seconds"], seconds)] if seconds else []
    parts += ["## Environment", environment_table(results)] if results.environment else []
    return "\n\n".join(parts) + "\n"


def section(audit: Audit) -> str:
    """Return the audit as the section of a model card: the verdict, the table and what was compared."""
    header, body = _cells(audit)
    compared = f"Before: `{audit.before}`. After: these files."
    parts = [f"## Audit: {audit.verdict}", headline(audit), compared, markdown_table(header, body), INTERVALS]
    return "\n\n".join(parts) + "\n"


_ONE_LINE = "Each text is clipped to one line."
_CHANGE_HEADER = ["kind", "prompt", "what changed", "reply before", "reply after"]


def _code(text: str) -> str:
    """The text as code in a Markdown table: nothing in it is markup."""
    return "`" + text.replace("`", "'") + "`"


def _meanings(audit: Audit) -> list[tuple[str, str]]:
    return [(line.metric, MEANINGS[line.metric]) for line in audit.lines if line.metric in MEANINGS]


# ---------------------------------------------------------------------------------------------- numbers as text


def _cells(audit: Audit) -> tuple[list[str], list[list[str]]]:
    header = ["", "before", "after", "difference [95%]", "limit", "n", "verdict", "needs n"]
    header += [] if audit.reference is None else ["minus reference"]
    body = []
    for line in audit.lines:
        number = [_number(line.metric, score.value) for score in (line.before, line.after)]
        cells = [words(line.metric), *number, _with_interval(line.metric, line.difference), _limit(line)]
        cells += [str(line.difference.n), line.verdict or "-", _needed(line)]
        if audit.reference is not None:
            cells.append("-" if line.to_reference is None else _with_interval(line.metric, line.to_reference))
        body.append(cells)
    return header, body


def _is_rate(metric: str) -> bool:
    return metric in RATES


def _number(metric: str, value: float) -> str:
    return f"{percent(value)}%" if _is_rate(metric) else f"{value:.3f}"


def _change(metric: str, value: float) -> str:
    """A difference: points of a rate, or nats."""
    return f"{100 * value:+.1f}" if _is_rate(metric) else f"{value:+.3f}"


def _with_interval(metric: str, score: Score) -> str:
    low, high = (_change(metric, bound) for bound in score.ci95)
    return f"{_change(metric, score.value)} [{low}, {high}]"


def _needed(line: Line) -> str:
    """The number of prompts that would decide, to two digits, rounded up; "" if there is none."""
    if line.prompts_needed is None:
        return ""
    unit = 10 ** max(0, len(str(line.prompts_needed)) - 2)
    return f"{math.ceil(line.prompts_needed / unit) * unit:,}"


def _limit(line: Line) -> str:
    """The largest change for the worse that passes, with its sign."""
    if line.limit is None:
        return "-"
    sign = "-" if is_higher_better(line.metric) else "+"
    return f"{sign}{100 * line.limit:g}" if _is_rate(line.metric) else f"{sign}{line.limit:g}"


# ---------------------------------------------------------------------------------------------- the page


def page(audit: Audit, results: Results) -> str:
    """Return report.html: a whole page, with its styles and pictures in it and no scripts."""
    facts = [(name, "-" if value is None else str(value)) for name, value in results.environment.items()]
    return _template("page").render(
        audit=audit,
        body=fragment(audit),
        command=results.command,
        seconds=results.seconds,
        facts=facts,
    )


def fragment(audit: Audit) -> str:
    """Return the audit as an HTML element that a page or a notebook shows."""
    return _template("audit").render(
        audit=audit,
        headline=headline(audit),
        groups=_groups(audit),
        meanings=dict(_meanings(audit)),
        intervals=f"{INTERVALS} {rules_note(audit.rows)}",
        one_line=_ONE_LINE,
    )


def _groups(audit: Audit) -> list[dict[str, Any]]:
    """The lines with what the page shows of each, in two tables: rates in percent, and nats per token."""
    rates = [line for line in audit.lines if _is_rate(line.metric)]
    others = [line for line in audit.lines if not _is_rate(line.metric)]
    groups = [("Rates, differences in percentage points", rates), ("Nats per token, and other scores", others)]
    return [{"title": title, "lines": _shown(lines)} for title, lines in groups if lines]


def _shown(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Each line's texts and its interval as a picture; rates share one scale, other metrics have their own."""
    common = max(_extent(line) for line in lines)
    return [
        {
            "line": line,
            "name": words(line.metric),
            "needed": _needed(line),
            "before": _number(line.metric, line.before.value),
            "after": _number(line.metric, line.after.value),
            "difference": _with_interval(line.metric, line.difference),
            "limit": _limit(line),
            "to_reference": None if line.to_reference is None else _with_interval(line.metric, line.to_reference),
            "picture": _picture(line, common if _is_rate(line.metric) else _extent(line)),
        }
        for line in lines
    ]


def _extent(line: Line) -> float:
    """The largest number that a line's picture shows."""
    return max(abs(number) for number in (line.limit or 0.0, *line.difference.ci95, 1e-6))


_PICTURE_WIDTH = 240
"""Of a picture, in its own units; `extent` is 5 from its edge."""


def _picture(line: Line, extent: float) -> dict[str, float | None]:
    """Horizontal places: of no change, of the interval, of the difference and of the limit."""

    def place(value: float) -> float:
        return round(_PICTURE_WIDTH / 2 + value / extent * (_PICTURE_WIDTH / 2 - 5), 1)

    sign = -1 if is_higher_better(line.metric) else 1
    low, high = map(place, line.difference.ci95)
    limit = None if line.limit is None else place(sign * line.limit)
    # What is allowed reaches from the limit to the edge on the better side.
    allowed = None if limit is None else ((0.0, limit) if sign > 0 else (limit, float(_PICTURE_WIDTH)))
    return {
        "zero": place(0.0),
        "low": low,
        "width": max(2.0, round(high - low, 1)),
        "value": place(line.difference.value),
        "limit": limit,
        "from": None if allowed is None else allowed[0],
        "span": None if allowed is None else round(allowed[1] - allowed[0], 1),
    }


def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=jinja2.DictLoader(_TEMPLATES)
    )
    return environment.get_template(name)


_TEMPLATES = {
    "page": """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Audit: {{ audit.verdict }}</title>
<style>
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: #fff; }
@media (prefers-color-scheme: dark) { body { background: #16181d; } }
</style>
</head>
<body>
{{ body|safe }}
<div class="secvec-audit">
<details><summary>Command, time and environment</summary>
<pre>{{ command }}</pre>
<table>
{% for stage, spent in seconds.items() %}
<tr><td>{{ stage }}</td><td>{{ "%.1f"|format(spent) }} s</td></tr>
{% endfor %}
{% for name, value in facts %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
</details>
</div>
</body>
</html>
""",
    "audit": """<div class="secvec-audit">
<style>
.secvec-audit { font: 15px/1.5 system-ui, sans-serif; color: var(--text); --text: #1c1f24; --line: #d8dbe0;
  --soft: #5a626e; --passes: #1a7f37; --fails: #c62828; --inconclusive: #8a5a00; --allowed: #e3f3e6; }
@media (prefers-color-scheme: dark) {
  .secvec-audit { --text: #e4e6ea; --line: #3a3f48; --soft: #a2a9b4; --passes: #3fb950; --fails: #ff7b72;
    --inconclusive: #e3a33b; --allowed: #1d3325; }
}
.secvec-audit h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
.secvec-audit h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
.secvec-audit code, .secvec-audit pre { font: 13px/1.45 ui-monospace, monospace; overflow-wrap: anywhere;
  white-space: pre-wrap; }
.secvec-audit table { border-collapse: collapse; width: 100%; }
.secvec-audit th, .secvec-audit td { text-align: left; padding: .35rem .6rem .35rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.secvec-audit th { color: var(--soft); font-weight: 600; overflow-wrap: normal; }
.secvec-audit .lines th:nth-child(1) { width: 28%; } .secvec-audit .lines th:nth-child(2) { width: 14%; }
.secvec-audit .lines th:nth-child(5) { width: 19%; } .secvec-audit .lines th:nth-child(6) { width: 17%; }
.secvec-audit td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.secvec-audit .note { color: var(--soft); font-size: 13px; }
.secvec-audit .passes { color: var(--passes); } .secvec-audit .fails { color: var(--fails); }
.secvec-audit .inconclusive { color: var(--inconclusive); }
.secvec-audit .verdict { font-weight: 600; white-space: nowrap; }
.secvec-audit svg { display: block; width: 100%; min-width: 8rem; max-width: 15rem; height: 22px; }
@media (max-width: 44rem) {
  .secvec-audit thead { display: none; }
  .secvec-audit tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  .secvec-audit td { display: flex; gap: .75rem; border: 0; padding: .1rem 0; }
  .secvec-audit td[data-label]::before { content: attr(data-label); color: var(--soft); flex: 0 0 7.5rem; }
  .secvec-audit td.number { white-space: normal; }
  .secvec-audit td.none { display: none; }
}
</style>
<h1>Audit: <span class="{{ audit.verdict }}">{{ audit.verdict }}</span></h1>
<p>{{ headline }}</p>
<p>Before: <code>{{ audit.before }}</code><br>After: <code>{{ audit.after }}</code>
{% if audit.reference %}<br>Reference: <code>{{ audit.reference }}</code>{% endif %}</p>
{% for group in groups %}
<h2>{{ group.title }}</h2>
<table class="lines">
<thead><tr><th>measure</th><th>verdict</th><th>before</th><th>after</th><th>difference [95%]</th>
<th>interval and limit</th><th>limit</th><th>n</th>
{% if audit.reference %}<th>minus reference</th>{% endif %}</tr></thead>
<tbody>
{% for row in group.lines %}
{% set line = row.line %}
{% set picture = row.picture %}
<tr data-metric="{{ line.metric }}">
<td><span><b>{{ row.name }}</b>{% if line.metric in meanings %}<br>
<span class="note">{{ meanings[line.metric] }}</span>{% endif %}</span></td>
<td data-label="verdict"{% if not line.verdict %} class="none"{% endif %}>
<span><span class="verdict {{ line.verdict or '' }}">{{ line.verdict or "-" }}</span>
{%- if row.needed %}<br><span class="note">about {{ row.needed }} prompts would decide</span>
{%- endif %}</span></td>
<td class="number" data-label="before" data-value="{{ line.before.value }}">{{ row.before }}</td>
<td class="number" data-label="after" data-value="{{ line.after.value }}">{{ row.after }}</td>
<td class="number" data-label="difference" data-value="{{ line.difference.value }}"
 data-low="{{ line.difference.ci95[0] }}" data-high="{{ line.difference.ci95[1] }}">{{ row.difference }}</td>
<td data-label=""><svg viewBox="0 0 240 22" preserveAspectRatio="none" role="img"
 aria-label="{{ row.name }}: {{ row.difference }}, limit {{ row.limit }}">
{% if picture.limit is not none %}
<rect x="{{ picture.from }}" y="0" width="{{ picture.span }}" height="22" style="fill: var(--allowed)"/>
<line x1="{{ picture.limit }}" x2="{{ picture.limit }}" y1="0" y2="22" style="stroke: var(--soft)"
 stroke-dasharray="3 2"/>
{% endif %}
<line x1="{{ picture.zero }}" x2="{{ picture.zero }}" y1="0" y2="22" style="stroke: var(--line)"/>
<rect x="{{ picture.low }}" y="10" width="{{ picture.width }}" height="2" fill="currentColor"/>
<rect x="{{ picture.value - 2 }}" y="6" width="4" height="10" class="{{ line.verdict or '' }}" fill="currentColor"/>
</svg></td>
<td class="number{{ '' if line.verdict else ' none' }}" data-label="limit">{{ row.limit }}</td>
<td class="number" data-label="n" data-value="{{ line.difference.n }}">{{ line.difference.n }}</td>
{% if audit.reference %}
<td class="number" data-label="minus reference"
{%- if line.to_reference %} data-value="{{ line.to_reference.value }}"{% endif %}>{{ row.to_reference or "-" }}</td>
{% endif %}
</tr>
{% endfor %}
</tbody>
</table>
{% endfor %}
<p class="note">{{ intervals }} Shaded: within the limit.</p>
{% if audit.changes %}
<h2>Prompts that changed most</h2>
<p class="note">{{ one_line }}</p>
<table>
<thead><tr><th>prompt</th><th>what changed</th><th>reply before</th><th>reply after</th></tr></thead>
<tbody>
{% for change in audit.changes %}
<tr><td data-label="{{ change.kind }} prompt"><span>{{ change.prompt }}</span></td>
<td data-label="what changed"><span>{{ change.what }}</span></td>
<td data-label="reply before"><span>{{ change.before }}</span></td>
<td data-label="reply after"><span>{{ change.after }}</span></td></tr>
{% endfor %}
</tbody>
</table>
{% endif %}
{% if audit.notes %}
<h2>Notes</h2>
<ul>
{% for note in audit.notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
</div>
""",
}
