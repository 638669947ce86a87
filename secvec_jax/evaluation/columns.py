"""How a wide table is split: at most eight columns each, and a refusal rate never without what it needs to be read.

A model that refuses less may comply more, or may only have lost its way of refusing; one that still refuses may have
learned the harmful replies all the same. So refusal is shown with compliance and with the loss of harmful replies that
nothing was trained on, in the same table.
"""

import math
from collections.abc import Collection, Sequence
from typing import TypeVar

MAX_COLUMNS = 8
"""Columns of a table, those that name its rows included."""

SAFETY = ("refusal", "compliance", "unclear", "harmful_loss")
"""Metrics that are read together."""

Column = TypeVar("Column")


def with_companions(metrics: Sequence[str], measured: Collection[str]) -> list[str]:
    """Return `metrics`, and where "refusal" is one of them the rest of `SAFETY` after it, as far as it was measured."""
    if "refusal" not in metrics:
        return list(metrics)
    together = [name for name in SAFETY if name in metrics or name in measured]
    first = min(metrics.index(name) for name in together if name in metrics)
    before = [name for name in metrics[:first] if name not in together]
    return [*before, *together, *(name for name in metrics[first:] if name not in together)]


def split(metrics: Sequence[str], places: Sequence[Column], room: int) -> list[tuple[list[str], list[Column]]]:
    """Return the metrics and the places that each part of a table shows, in order.

    places: what is measured by each metric, such as the poison ratios of a grid; a part has a column for each of its
    metrics at each of its places. room: the columns of a part at most; metrics of `SAFETY` are in one part even so.
    """
    if len(metrics) * len(places) <= room:
        return [(list(metrics), list(places))]
    parts = []
    for together in _packed(_groups(metrics), room):
        each = max(1, room // len(together))
        count = math.ceil(len(places) / each)
        size = math.ceil(len(places) / count)
        parts += [(together, list(places[start : start + size])) for start in range(0, len(places), size)]
    return parts


def room_beside(names: int, metrics: Sequence[str]) -> int:
    """Return the columns left beside `names` columns that name a row; 0 if the widest group of metrics does not fit."""
    widest = max((len(group) for group in _groups(metrics)), default=1)
    return MAX_COLUMNS - names if names + widest <= MAX_COLUMNS else 0


def _groups(metrics: Sequence[str]) -> list[list[str]]:
    """The metrics of `SAFETY` as one group where "refusal" is among them, each other metric alone."""
    groups: dict[str, list[str]] = {}
    for metric in metrics:
        together = metric in SAFETY and "refusal" in metrics
        groups.setdefault(SAFETY[0] if together else metric, []).append(metric)
    return list(groups.values())


def _packed(groups: list[list[str]], room: int) -> list[list[str]]:
    """The groups in as few parts as `room` allows, and in parts of about the same size where that needs no more."""
    fewest = _filled(groups, room)
    even = _filled(groups, math.ceil(sum(map(len, groups)) / max(1, len(fewest))))
    return even if len(even) == len(fewest) else fewest


def _filled(groups: list[list[str]], room: int) -> list[list[str]]:
    parts: list[list[str]] = []
    for group in groups:
        if parts and len(parts[-1]) + len(group) <= room:
            parts[-1] += group
        else:
            parts.append(list(group))
    return parts
