"""Writes the page of commands from the settings themselves, so that none is missing and no default is old.

    python docs/hooks.py        # writes docs/commands.md, which is committed for those who read it on a code host

`mkdocs` writes it anew each time that the site is built.
"""

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simple_parsing.docstring import get_attribute_docstring

ROOT = Path(__file__).parent.parent
PAGE = Path(__file__).parent / "commands.md"
START, END = "<!-- commands: written by `python docs/hooks.py` -->", "<!-- end of commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for each page."""
    return filled(markdown) if START in markdown else markdown


def filled(page: str) -> str:
    """The page with the commands as they are now between the two marks."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n\n{commands()}\n\n{END}{rest.partition(END)[2]}"


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


def _table(settings: type) -> str:
    return "\n".join(["| setting | default | |", "|---|---|---|", *_lines(settings(), "")])


def _lines(settings: Any, group: str) -> Iterator[str]:
    for field in dataclasses.fields(settings):
        name, default = f"{group}{field.name}", getattr(settings, field.name)
        if dataclasses.is_dataclass(default):
            yield from _lines(default, f"{name}.")
            continue
        plain = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        meaning = " ".join(get_attribute_docstring(type(settings), field.name).docstring_below.split())
        meaning = meaning.replace("|", r"\|")
        yield f"| `{name}` | {f'`{plain}`' if plain and default is not None else ''} | {meaning} |"


def _prose(settings: type) -> str:
    return " ".join((settings.__doc__ or "").split())


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
