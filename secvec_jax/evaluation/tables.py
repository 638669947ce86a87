"""Tables in Markdown and in the terminal, of at most eight columns: wider ones are split into several."""

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from secvec_jax.evaluation.metrics import SAFETY
from secvec_jax.printable import markdown, printable

MAX_COLUMNS = 8
"""Columns of a table, including those that name its rows."""


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table with its first `left` columns aligned left and the others right.

    The cells are texts, and shown as they are; those of type `Markdown` are Markdown already.
    """
    rule: list[str] = ["---"] * left + ["---:"] * (len(header) - left)
    lines: list[Sequence[str]] = [[*map(markdown, header)], rule, *([*map(markdown, line)] for line in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal_table(header: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> Table:
    """Return a table for rich's console with its first `left` columns aligned left and the others right.

    On a narrow console the cells are wrapped, except for those of the first `left` columns.
    """
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), highlight=False)
    for index, title in enumerate(header):
        names_row = index < left
        table.add_column(Text(title), justify="left" if names_row else "right", no_wrap=names_row, overflow="fold")
    for line in body:
        table.add_row(*(Text(printable(cell)) for cell in line))
    return table


def split_metrics(metrics: Sequence[str], room: int) -> list[list[str]]:
    """Return the metrics of each part of a table that has `room` columns for them, in order.

    The metrics of `SAFETY` stay in one part. Parts are as few as possible, and of similar sizes.
    """
    groups: dict[str, list[str]] = {}
    for metric in metrics:
        is_safety = metric in SAFETY and "refusal" in metrics
        groups.setdefault(SAFETY[0] if is_safety else metric, []).append(metric)
    fewest = _fill(list(groups.values()), room)
    even = _fill(list(groups.values()), math.ceil(len(metrics) / max(1, len(fewest))))
    return even if len(even) == len(fewest) else fewest


def _fill(groups: list[list[str]], room: int) -> list[list[str]]:
    parts: list[list[str]] = []
    for group in groups:
        if parts and len(parts[-1]) + len(group) <= room:
            parts[-1] += group
        else:
            parts.append(list(group))
    return parts


def split_evenly(count: int, room: int) -> list[range]:
    """Return the positions 0 to `count` in as few ranges of at most `room` as possible, of similar sizes."""
    size = math.ceil(count / math.ceil(count / room)) if count else 1
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def show(value: object) -> str:
    """Return a setting as tables and file names show it."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def words(name: str) -> str:
    """Return the name of a field or metric as text."""
    return name.replace("_", " ")


def label(values: Sequence[object]) -> str:
    """Return several settings, separated by commas."""
    return ", ".join(map(show, values))
