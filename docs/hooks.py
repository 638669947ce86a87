"""Writes the page of commands from the settings themselves, so that none is missing and no default is old."""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

from simple_parsing.docstring import get_attribute_docstring

ROOT = Path(__file__).parent.parent
PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for each page."""
    return markdown.replace(PLACE, commands()) if PLACE in markdown else markdown


def commands() -> str:
    """Every verb of train.py and eval.py with its settings, as Markdown."""
    sys.path.insert(0, str(ROOT))
    try:
        scripts = {name: importlib.import_module(name) for name in ("train", "eval")}
        cluster = importlib.import_module("secvec_jax.command_line").Cluster
    finally:
        sys.path.remove(str(ROOT))
    parts = []
    for script, module in scripts.items():
        for verb, (settings, _) in module.VERBS.items():
            parts.append(f"## {script}.py {verb}\n\n{_prose(settings)}\n\n{_table(settings)}")
    parts.append(f"## The devices, of every verb but plan\n\n{_prose(cluster)}\n\n{_table(cluster)}")
    return "\n\n".join(parts)


def _table(settings: type, prefix: str = "") -> str:
    lines = [] if prefix else ["| setting | default | |", "|---|---|---|"]
    for field in dataclasses.fields(settings):
        kind = type(_default(field))
        if dataclasses.is_dataclass(kind):
            lines.append(_table(_default(field), f"{prefix}{field.name}."))
            continue
        shown = "" if _default(field) in ("", None, ()) else f"`{_plain(_default(field))}`"
        owner = settings if isinstance(settings, type) else type(settings)
        meaning = " ".join(get_attribute_docstring(owner, field.name).docstring_below.split())
        value = shown if isinstance(settings, type) else f"`{_plain(getattr(settings, field.name))}`"
        lines.append(f"| `{prefix}{field.name}` | {value} | {meaning} |".replace("| `` |", "| |"))
    return "\n".join(line for line in lines if line)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _prose(settings: type) -> str:
    return " ".join((settings.__doc__ or "").split())
