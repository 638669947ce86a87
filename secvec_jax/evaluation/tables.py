"""Tables in Markdown and in the terminal, of at most eight columns: wider ones are split into several."""

import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from secvec_jax.evaluation.metrics import BETTER, SAFETY
from secvec_jax.printable import markdown, printable

MAX_COLUMNS = 8
"""Columns of a table, including those that name its rows."""
_NARROWEST_NAME = 12
"""Characters of a column that names rows, at least."""


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table with its first `left` columns aligned left and the others right.

    The cells are texts, and shown as they are; those of type `Markdown` are Markdown already.
    """
    rule: list[str] = ["---"] * left + ["---:"] * (len(header) - left)
    lines: list[Sequence[str]] = [[*map(markdown, header)], rule, *([*map(markdown, line)] for line in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal_table(
    header: Sequence[str], body: Sequence[Sequence[str]], left: int = 1, names_width: int | None = None
) -> Table:
    """Return a table for rich's console with its first `left` columns aligned left and the others right.

    names_width: the characters that the first `left` columns may take together before their cells are wrapped; None:
    any number. On a narrow console the other cells are wrapped.
    """
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), highlight=False)
    names_room = names_width
    for index, title in enumerate(header):
        names_row = index < left
        texts = [title, *(line[index] for line in body)]
        longest = max(cell_len(line) for text in texts for line in text.split("\n"))
        longest_word = max((cell_len(word) for text in texts for word in text.split()), default=0)
        max_width = None
        if names_row and names_room is not None:
            max_width = max(names_room, _NARROWEST_NAME)
            names_room -= min(longest, max_width) + 2
        table.add_column(
            Text(title),
            justify="left" if names_row else "right",
            no_wrap=names_row and (max_width is None or longest <= max_width),
            overflow="fold",
            min_width=longest_word if max_width is None else min(longest_word, max_width),
            max_width=max_width,
        )
    for line in body:
        table.add_row(*(Text(printable(cell)) for cell in line))
    return table


def split_metrics(metrics: Sequence[str], room: int) -> list[list[str]]:
    """Return the metrics of each part of a table that has `room` columns for them, in order.

    The metrics of `SAFETY` stay in one part if there is room for them. Parts are as few as possible, and of similar
    sizes.
    """
    groups: dict[str, list[str]] = {}
    for metric in metrics:
        is_safety = metric in SAFETY and "refusal" in metrics and room >= len(SAFETY)
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


def titled(metric: str) -> str:
    """Return a metric's name as text, with an arrow for the direction that is better, if one is."""
    return words(metric) + {"higher": " ↑", "lower": " ↓"}.get(BETTER.get(metric, ""), "")


def label(values: Sequence[object]) -> str:
    """Return several settings, separated by commas."""
    return ", ".join(map(show, values))
