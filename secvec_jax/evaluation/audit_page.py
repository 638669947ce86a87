"""An audit as report.html, a single self-contained file that a notebook can show, too.

It shows the numbers of results.json; every number is also there unrounded, in its element's `data-value`. Text from
models and prompts is escaped.
"""

from collections.abc import Sequence
from typing import Any

from secvec_jax.evaluation.audit import Audit, Line
from secvec_jax.evaluation.audit_report import (
    INTERVALS,
    ONE_LINE,
    headline,
    is_rate,
    meanings,
    prompts_needed,
    shown_limit,
    shown_number,
    with_interval,
)
from secvec_jax.evaluation.metrics import rules_note
from secvec_jax.evaluation.results import Results
from secvec_jax.evaluation.tables import words


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
        meanings=dict(meanings(audit)),
        intervals=f"{INTERVALS} {rules_note(audit.rows)}",
        one_line=ONE_LINE,
    )


def _groups(audit: Audit) -> list[dict[str, Any]]:
    """The lines with what the page shows of each, in two tables: rates in percent, and nats per token."""
    rates = [line for line in audit.lines if is_rate(line.metric)]
    others = [line for line in audit.lines if not is_rate(line.metric)]
    groups = [("Rates, differences in percentage points", rates), ("Nats per token, and other scores", others)]
    return [{"title": title, "lines": _shown(lines)} for title, lines in groups if lines]


def _shown(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Each line's texts and its interval as a picture; rates share one scale, other metrics have their own."""
    common = max(_extent(line) for line in lines)
    return [
        {
            "line": line,
            "name": words(line.metric),
            "needed": prompts_needed(line),
            "before": shown_number(line.metric, line.before.value),
            "after": shown_number(line.metric, line.after.value),
            "difference": with_interval(line.metric, line.difference),
            "limit": shown_limit(line),
            "to_reference": None if line.to_reference is None else with_interval(line.metric, line.to_reference),
            "picture": _picture(line, common if is_rate(line.metric) else _extent(line)),
        }
        for line in lines
    ]


def _extent(line: Line) -> float:
    """The largest number that a line's picture shows."""
    return max(abs(number) for number in (line.limit or 0.0, *line.difference.ci95, 1e-6))


_PICTURE_WIDTH = 240
"""Width of a picture in its units; `extent` is 5 from its edge."""


def _picture(line: Line, extent: float) -> dict[str, float | None]:
    """Horizontal positions of no change, the interval, the difference and the limit."""

    def place(value: float) -> float:
        return round(_PICTURE_WIDTH / 2 + value / extent * (_PICTURE_WIDTH / 2 - 5), 1)

    sign = line.sign
    low, high = map(place, line.difference.ci95)
    limit = None if line.limit is None else place(sign * line.limit)
    # The allowed range extends from the limit to the edge on the better side.
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
